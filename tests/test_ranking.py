import numpy as np
import pytest
import torch
from test_eval_metrics import draw_ids, figures, textbook

import ranking
import reranking
from eval_metrics import evaluate, match_ranks, same_identity
from runtime import tiles
from runtime.errors import UserError


@pytest.fixture(autouse=True)
def two_threads(one_thread):
    """They share the work of a ranking."""
    torch.set_num_threads(2)


@pytest.fixture(params=['host', 'device'])
def path(request, monkeypatch):
    """Both ways to count, the one for CUDA on CPU tensors."""
    for room in (ranking, reranking, tiles):
        monkeypatch.setattr(room, 'is_host', lambda device: request.param == 'host')
    if request.param == 'device':
        for room in (ranking, reranking):
            monkeypatch.setattr(room, 'tile_of', lambda device: (64, 48))


def draw_integers(rng, num_queries, num_gallery, dim, high):
    """Features whose squared distances float32 holds exactly, with many ties."""
    return [
        torch.from_numpy(rng.integers(-high, high + 1, (size, dim)).astype(np.float32))
        for size in (num_queries, num_gallery)
    ]


def draw_persons(rng, pids, camids, dim=64, noise=1.0):
    """Features as of a trained network: near each other by person and, less so, by camera."""
    persons, cameras = np.random.default_rng(5).standard_normal((2, 100, dim))
    features = persons[pids] + 0.5 * cameras[camids] + noise * rng.standard_normal((len(pids), dim))
    return torch.from_numpy(np.maximum(features, 0).astype(np.float32))


def exact_distances(queries, gallery):
    return (queries.double()[:, None] - gallery.double()).square().sum(2).numpy()  # (Q, G)


def check(result: ranking.Ranking, distmat, ids):
    """Everything in a ranking against the distance matrix."""
    expected = match_ranks(distmat, *ids)
    for field in ('offsets', 'places', 'distances', 'ranks', 'num_dropped'):
        np.testing.assert_array_equal(getattr(result, field), getattr(expected, field), field)
    assert [list(part) for part in np.split(result.ranks, result.offsets[1:-1])] == textbook(distmat, *ids)
    q_pids, g_pids, q_camids, g_camids = ids
    same = q_pids[:, None] == g_pids  # (Q, G)
    dropped = same & (q_camids[:, None] == g_camids)
    for query, distances in enumerate(distmat):
        order = [place for place in np.argsort(distances, kind='stable') if not dropped[query, place]][:10]
        rest = 10 - len(order)
        np.testing.assert_array_equal(result.nearest[query], order + [-1] * rest)
        np.testing.assert_array_equal(result.nearest_distances[query], [*distances[order], *[np.nan] * rest])
    for histogram, pairs in ((result.match_histogram, same & ~dropped), (result.other_histogram, ~same)):
        assert histogram.sum() == pairs.sum()
        if len(histogram):
            np.testing.assert_array_equal(histogram, np.histogram(distmat[pairs], result.edges.astype(float))[0])


@pytest.mark.parametrize('seed', range(12))
def test_equals_the_textbook_under_any_tiles(seed, path, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(ranking, 'QUERIES_AT_ONCE', int(rng.integers(1, 9)))
    num_queries, num_gallery, dim = rng.integers(1, 30), rng.integers(1, 80), int(rng.integers(1, 12))
    ids = draw_ids(rng, num_queries, num_gallery, *rng.integers(1, [9, 4]))
    features = draw_integers(rng, num_queries, num_gallery, dim, rng.integers(1, 6))
    for tile in ((1, 1), (3, 7), (16, 32), (5, 100), None):
        check(ranking.rank(*features, *ids, tile=tile), exact_distances(*features), ids)


@pytest.mark.parametrize('high', [0, 1])  # everything tied, nearly everything tied
def test_collapsed_features(high, path):
    rng = np.random.default_rng(0)
    ids = draw_ids(rng, 20, 150, 5, 3)
    features = draw_integers(rng, 20, 150, 2, high)
    check(ranking.rank(*features, *ids, tile=(7, 16)), exact_distances(*features), ids)


@pytest.mark.parametrize('length', [0, 1e-30, 1e-21, 1e-20])
def test_features_too_short_for_the_cosine_distance_have_distance_1_from_all_others(length, path):
    """The factor that would scale them is infinite, so that distances were NaN, and all matches came first."""
    rng = np.random.default_rng(0)
    ids = draw_ids(rng, 20, 150, 5, 3)
    features = [length * np.ones((number, 4), np.float32) for number in (20, 150)]
    check(ranking.rank(*features, *ids, distance='cosine'), np.ones((20, 150)), ids)


def test_a_run_that_computes_with_0_in_place_of_small_numbers_ranks_equally(path):
    """Distances of exactly 0 are nearer than the next larger number, and equally near."""
    rng = np.random.default_rng(0)
    ids = draw_ids(rng, 20, 150, 5, 3)
    results = []
    for high in (1, 3):
        features = draw_integers(rng, 20, 150, 2, high)
        for flushed in (False, True):
            torch.set_flush_denormal(flushed)
            results.append(ranking.rank(*features, *ids, tile=(7, 16)))
    for exact, result in zip(results[::2], results[1::2], strict=True):
        for name, values in vars(exact).items():
            np.testing.assert_array_equal(np.asarray(getattr(result, name)), np.asarray(values), name)


def test_empty_sides():
    ids = [np.array([1, 2]), np.zeros(0, int), np.array([0, 0]), np.zeros(0, int)]
    result = ranking.rank(torch.ones(2, 4), torch.ones(0, 4), *ids)
    again = ranking.rerank(torch.ones(2, 4), torch.ones(0, 4), *ids)
    assert (result.nearest == -1).all() and (again.nearest == -1).all()
    for each in (result, again):
        with pytest.raises(UserError, match=r'none of the 2 queries has a match: 2 whose person is not in the gallery'):
            each.cmc()
    result = ranking.rank(torch.ones(0, 4), torch.ones(2, 4), ids[1], ids[0], ids[3], ids[2])
    assert (result.num_valid, result.num_skipped, len(result.edges)) == (0, 0, 1)


def test_real_features_score_as_the_whole_matrix():
    rng = np.random.default_rng(3)
    ids = draw_ids(rng, 300, 2500, 100, 6)
    queries, gallery = draw_persons(rng, ids[0], ids[2]), draw_persons(rng, ids[1], ids[3])
    whole = queries.square().sum(1, keepdim=True) + gallery.square().sum(1)
    whole.addmm_(queries, gallery.t(), alpha=-2)  # (Q, G), in float32
    curve, mean, penalty = figures(textbook(whole.numpy(), *ids))
    tile = ranking.squared_distances(*ranking.points(queries, gallery, 300, 2500)).numpy()  # (Q, G), all in one
    expected = match_ranks(tile, *ids)
    assert 0.2 < mean < 0.9
    for tile in ((64, 300), None):
        result = ranking.rank(queries, gallery, *ids, tile=tile)
        np.testing.assert_allclose(result.cmc(), curve, atol=1e-9)
        assert (result.mAP, result.mINP) == pytest.approx((mean, penalty), abs=1e-6)
        for field in ('ranks', 'places', 'distances'):  # bit for bit, whatever the tiles
            np.testing.assert_array_equal(getattr(result, field), getattr(expected, field), field)


def test_a_copy_under_another_pid_is_a_tie():
    """Equal features are equally far, in whatever product they were: their places decide."""
    torch.manual_seed(0)
    queries, some = torch.randn(64, 512), torch.randn(300, 512)
    rng = np.random.default_rng(4)
    q_pids, pids, q_camids, camids = rng.integers(10, 310, 64), rng.permutation(300) + 10, [0] * 64, [1] * 300
    once = match_ranks(exact_distances(queries, some), q_pids, pids, q_camids, camids)
    g_pids = np.concatenate([np.full(300, 1), pids, np.full(300, 2)])  # the second of three copies is the match
    result = ranking.rank(queries, some.repeat(3, 1), q_pids, g_pids, q_camids, camids * 3, tile=(32, 130))
    np.testing.assert_array_equal(result.ranks, 3 * once.ranks - 1)


def test_distances_below_zero(path):
    """Rounding leaves some images a little less than nothing from themselves."""
    torch.manual_seed(0)
    features, ids = torch.randn(100, 300), [np.arange(100), np.arange(100) + 100, np.zeros(100, int), np.ones(100, int)]
    result = ranking.rank(features, features, *ids)
    assert (result.nearest_distances[:, 0] < 0).any()
    assert (result.nearest[:, 0] == np.arange(100)).all()
    assert (np.diff(result.nearest_distances, axis=1) >= 0).all()
    assert (result.other_histogram.sum(), result.edges[0]) == (100 * 100, 0)
    matches = ranking.rank(features, features, ids[0], ids[0], *ids[2:])
    assert (matches.ranks == 1).all()
    assert matches.match_histogram[0] == (matches.distances < matches.edges[1]).sum() > 10
    assert (matches.match_histogram.sum(), matches.other_histogram.sum()) == (100, 100 * 99)


@pytest.mark.parametrize('deal', ['in turn', 'in one piece', 'with nothing for one'])
def test_shards_of_the_gallery_add_up(deal, path):
    rng = np.random.default_rng(6)
    ids = draw_ids(rng, 25, 90, 6, 3)
    features = draw_integers(rng, 25, 90, 4, 3)
    everything = np.arange(90)
    shards = {
        'in turn': [everything[rank::3] for rank in range(3)],
        'in one piece': np.split(everything, [20, 70]),
        'with nothing for one': [everything, everything[:0]],
    }[deal]
    pairs = same_identity(*ids)
    parts = [(*ranking.points(features[0], features[1][places], 25, len(places)), places, pairs) for places in shards]
    distances = sum(ranking.measure(*part) for part in parts)
    tallies = [ranking.count(*part, distances, (8, 16)) for part in parts]
    nearest = np.sort(np.hstack([tally.nearest for tally in tallies]), axis=1)[:, : ranking.NEAREST]
    counts, histogram = (sum(getattr(tally, name) for tally in tallies) for name in ('counts', 'histogram'))
    whole = ranking.Tally(counts, nearest, histogram)
    check(ranking.assemble(pairs, distances, whole), exact_distances(*features), ids)


def test_no_product_is_larger_than_a_tile(monkeypatch):
    shapes = []
    original = ranking.squared_distances

    def spy(queries, gallery):
        shapes.append((len(queries), len(gallery)))
        return original(queries, gallery)

    monkeypatch.setattr(ranking, 'squared_distances', spy)
    rng = np.random.default_rng(0)
    ids = [np.ones(200, int), np.ones(700, int), np.zeros(200, int), np.ones(700, int)]  # all of one identity
    ranking.rank(*draw_integers(rng, 200, 700, 4, 3), *ids, tile=(80, 128))
    assert len(shapes) > 20
    assert max(height for height, _ in shapes) <= 80
    assert max(width for _, width in shapes) <= 128


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_and_layouts(dtype):
    rng = np.random.default_rng(7)
    ids = draw_ids(rng, 20, 50, 5, 3)
    queries, gallery = draw_integers(rng, 20, 50, 16, 3)
    expected = ranking.rank(queries, gallery, *ids)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        found = ranking.rank(queries.to(dtype), gallery.to(dtype).t().contiguous().t(), *map(torch.from_numpy, ids))
    for field, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, field), value, field)
    found = ranking.rank(queries.requires_grad_(), gallery.double().numpy(), *map(list, ids))
    np.testing.assert_array_equal(found.ranks, expected.ranks)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e20])
@pytest.mark.parametrize('side', ['query', 'gallery'])
def test_features_that_are_not_finite_are_refused(side, value):
    features = {'query': torch.ones(3, 4), 'gallery': torch.ones(200, 4)}
    features[side][2, 1] = value
    with pytest.raises(UserError, match=rf'1 of \d+ {side} features are not finite .* first at index 2'):
        ranking.rank(*features.values(), [1] * 3, [1] * 200, [0] * 3, [1] * 200)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r'query features have shape \(2, 5\), not \(2, 4\)'):
        ranking.rank(torch.ones(2, 5), torch.ones(3, 4), [1] * 2, [1] * 3, [0] * 2, [1] * 3)
    with pytest.raises(UserError, match=r'gallery features have shape \(3, 4\), not \(5, 4\)'):
        ranking.rank(torch.ones(2, 4), torch.ones(3, 4), [1] * 2, [1] * 5, [0] * 2, [1] * 5)
    with pytest.raises(UserError, match='query has 2 pids but 1 camids'):
        ranking.rank(torch.ones(2, 4), torch.ones(3, 4), [1] * 2, [1] * 3, [0], [1] * 3)


def test_the_cosine_distance_is_one_minus_the_cosine():
    rng = np.random.default_rng(0)
    features = [
        rng.normal(size=(number, 6)).astype(np.float32) * rng.uniform(0.1, 50, (number, 1)) for number in (9, 70)
    ]
    features[1][3] = 0  # at distance 1 from everything
    pids, camids = [rng.integers(4, size=n) for n in (9, 70)], [rng.integers(3, size=n) for n in (9, 70)]
    result = ranking.rank(*features, *pids, *camids, tile=(4, 16), distance='cosine')
    unit = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) for rows in features]
    distances = 1 - unit[0] @ unit[1].T
    cmc, mean = evaluate(distances, *pids, *camids)
    assert np.allclose(result.cmc(), cmc) and abs(result.mAP - mean) < 1e-9
    for query, (places, shown) in enumerate(zip(result.nearest, result.nearest_distances, strict=True)):
        np.testing.assert_allclose(shown, distances[query, places], atol=1e-5)


def test_reranking_by_cosine_is_that_of_unit_features():
    rng = np.random.default_rng(1)
    features = [rng.normal(size=(number, 6)).astype(np.float32) for number in (9, 70)]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features]
    pids, camids = [rng.integers(4, size=n) for n in (9, 70)], [rng.integers(3, size=n) for n in (9, 70)]
    by_cosine = ranking.rerank(*features, *pids, *camids, distance='cosine')
    of_unit = ranking.rerank(*unit, *pids, *camids)
    np.testing.assert_allclose(by_cosine.distances, of_unit.distances, atol=1e-4)
    assert by_cosine.mAP == pytest.approx(of_unit.mAP, abs=1e-6)
