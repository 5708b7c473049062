import numpy as np
import pytest
import torch
from textbook import match_ranks as match_ranks_plainly

from eval_metrics import (
    METRICS,
    average_precision,
    check_ids,
    cmc,
    evaluate,
    hit,
    inverse_negative_penalty,
    match_ranks,
)
from runtime.errors import UserError


def textbook(distmat, q_pids, g_pids, q_camids, g_camids):
    """For each query the ranks of its matches; items of its own camera are dropped."""
    return match_ranks_plainly(distmat, q_pids, g_pids, lambda query, item: q_camids[query] == g_camids[item])


def figures(ranks, max_rank=50):
    """CMC, mAP and mINP from lists of ranks, by the definitions."""
    scored = [found for found in ranks if found]
    curve = [sum(found[0] <= rank for found in scored) / len(scored) for rank in range(1, max_rank + 1)]
    precisions = [sum((hit + 1) / rank for hit, rank in enumerate(found)) / len(found) for found in scored]
    penalties = [len(found) / found[-1] for found in scored]
    return curve, sum(precisions) / len(scored), sum(penalties) / len(scored)


def draw_ids(rng, num_queries, num_gallery, num_pids, num_camids):
    return [
        rng.integers(0, high, size) for high in (num_pids, num_camids) for size in (num_queries, num_gallery)
    ]  # q_pids, g_pids, q_camids, g_camids


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.int32, np.float16])
@pytest.mark.parametrize('levels', [1, 3, 1000])  # number of different distances: all tied, most, hardly any
@pytest.mark.parametrize('num_camids', [1, 2, 6])
def test_equals_the_textbook(levels, num_camids, dtype):
    rng = np.random.default_rng(levels)
    scored = 0
    for num_pids in (1, 2, 9, 60):
        num_queries, num_gallery = rng.integers(1, 12), rng.integers(1, 90)
        ids = draw_ids(rng, num_queries, num_gallery, num_pids, num_camids)  # pid 0 like any other
        distmat = rng.integers(0, levels, (num_queries, num_gallery)).astype(dtype)
        expected = textbook(distmat, *ids)
        matches = match_ranks(distmat, *ids)
        assert [list(part) for part in np.split(matches.ranks, matches.offsets[1:-1])] == expected
        assert matches.num_valid == sum(bool(found) for found in expected)
        if matches.num_valid:
            scored += 1
            curve, mean, penalty = figures(expected)
            found_curve, found_mean = evaluate(distmat, *ids)
            np.testing.assert_allclose(found_curve, curve, atol=1e-12)
            assert (found_mean, matches.mINP) == pytest.approx((mean, penalty), abs=1e-12)
    assert scored or num_camids == 1  # with one camera everything is dropped


def test_the_means_of_the_metrics_are_the_reported_figures():
    rng = np.random.default_rng(2)
    matches = match_ranks(rng.random((40, 200)), *draw_ids(rng, 40, 200, 30, 3))
    means = {metric.name: np.nanmean(metric.score(matches.ranks, matches.offsets)) for metric in METRICS}
    assert 0 < matches.num_skipped < 40
    curve = matches.cmc()
    assert means == {
        'mAP': matches.mAP, 'mINP': matches.mINP, 'rank1': curve[0], 'rank5': curve[4], 'rank10': curve[9],
    }  # fmt: skip
    assert [metric.label for metric in METRICS] == ['mAP', 'mINP', 'Rank-1', 'Rank-5', 'Rank-10']


def test_small_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    ids, distmat = draw_ids(rng, 40, 70, 6, 3), rng.integers(0, 9, (40, 70))
    whole = match_ranks(distmat, *ids)
    monkeypatch.setattr('eval_metrics.BLOCK', 150)
    for field, expected in vars(whole).items():
        np.testing.assert_array_equal(getattr(match_ranks(distmat, *ids), field), expected)


def test_figures_by_hand():
    #          match at 1 and 4 | dropped, then a match at 2 | only in its own camera | not in the gallery
    g_pids, g_camids = [7, 1, 2, 7, 8, 9], [1, 0, 0, 2, 1, 0]
    distmat = np.array([
        [0.1, 0.2, 0.3, 0.4, 9, 9],
        [9, 9, 0.1, 9, 0.2, 9],
        [1, 2, 3, 4, 5, 0],
        [1, 2, 3, 4, 5, 0],
    ])  # fmt: skip
    matches = match_ranks(distmat, [7, 8, 9, 5], g_pids, [0, 0, 0, 0], g_camids)
    assert matches.ranks.tolist() == [1, 4, 2]
    assert matches.places.tolist() == [0, 3, 4]
    assert matches.distances.tolist() == [0.1, 0.4, 0.2]
    assert matches.offsets.tolist() == [0, 2, 3, 3, 3]
    assert (matches.num_valid, matches.num_skipped, matches.num_same_camera, matches.num_absent) == (2, 2, 1, 1)
    np.testing.assert_allclose(
        average_precision(matches.ranks, matches.offsets), [(1 + 2 / 4) / 2, 1 / 2, np.nan, np.nan]
    )
    np.testing.assert_allclose(inverse_negative_penalty(matches.ranks, matches.offsets), [2 / 4, 1 / 2, np.nan, np.nan])
    for k, hits in ((1, [1, 0]), (2, [1, 1])):
        np.testing.assert_array_equal(hit(matches.ranks, matches.offsets, k), [*hits, np.nan, np.nan])
    assert matches.cmc(3).tolist() == cmc(matches.ranks, matches.offsets, 3).tolist() == [0.5, 1, 1]
    assert (matches.mAP, matches.mINP) == pytest.approx((0.625, 0.5))


def test_ties_go_by_place_in_the_gallery():
    for place in range(4):
        g_pids = np.full(4, 2)
        g_pids[place] = 1
        assert match_ranks(np.ones((1, 4)), [1], g_pids, [0], np.ones(4)).ranks.tolist() == [place + 1]


def test_infinite_distances_are_the_farthest():
    distmat = [[np.inf, 1, np.inf, np.inf]]
    assert match_ranks(np.array(distmat), [1], [2, 2, 1, 2], [0], [1, 1, 1, 1]).ranks.tolist() == [3]


def test_cmc_of_a_small_gallery_stays_flat():
    curve, mean = evaluate(np.array([[2.0, 1.0]]), [1], [1, 2], [0], [1, 1], max_rank=5)
    assert curve.tolist() == [0, 1, 1, 1, 1]
    assert mean == 0.5


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_tensors_are_welcome_and_left_alone(dtype):
    rng = np.random.default_rng(1)
    ids, distmat = draw_ids(rng, 9, 30, 3, 3), rng.integers(0, 9, (9, 30)).astype(np.float32)
    tensor = torch.from_numpy(distmat).to(dtype).requires_grad_(dtype.is_floating_point)
    before = tensor.detach().clone()
    curve, mean = evaluate(tensor, *map(torch.from_numpy, ids))
    expected = evaluate(distmat, *map(list, ids))
    assert (curve.tolist(), mean) == (expected[0].tolist(), expected[1])
    assert torch.equal(tensor, before)


def test_no_valid_query_is_explained():
    with pytest.raises(UserError, match=r'none of the 3 queries .* 2 .* not in the gallery, 1 .* same camera only'):
        evaluate(np.zeros((3, 2)), [1, 2, 3], [1, 4], [0, 0, 0], [0, 0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r'is \(2, 3\), but there are 3 queries and 2 gallery items'):
        evaluate(np.zeros((2, 3)), [1, 2, 3], [1, 4], [0, 0, 0], [0, 0])
    with pytest.raises(UserError, match='gallery has 2 pids but 3 camids'):
        check_ids([1], [1, 2], [0], [0, 1, 2])
    with pytest.raises(UserError, match='NaN'):
        evaluate(np.array([[1.0, np.nan]]), [1], [1, 2], [0], [1, 1])
