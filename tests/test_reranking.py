"""Re-ranking against the definition of the paper, on matrices that hold all distances."""

import numpy as np
import pytest
import torch
from test_eval_metrics import draw_ids
from test_ranking import check, draw_integers, draw_persons, exact_distances, path, two_threads  # noqa: F401 (fixtures)

import ranking
import reranking
from runtime import tiles
from runtime.errors import UserError


def reranked_densely(distances, num_queries, k1, k2, lambda_value):
    """The k-reciprocal distances (Q, G) by the paper's definition; distances (N, N) float, queries first."""
    distances = distances / distances.max(1, keepdims=True)
    order = np.argsort(distances, axis=1, kind='stable')
    number = len(distances)

    def reciprocal(item, k):
        return {near for near in order[item, : k + 1] if item in order[near, : k + 1]}

    encoding = np.zeros((number, number))
    for item in range(number):
        members = set(reciprocal(item, k1))
        for neighbour in reciprocal(item, k1):
            others = reciprocal(neighbour, round(k1 / 2))
            if len(others & reciprocal(item, k1)) > 2 / 3 * len(others):
                members |= others
        for member in members:
            encoding[item, member] = np.exp(-distances[item, member])
    encoding /= np.maximum(encoding.sum(1, keepdims=True), 1e-30)
    if k2 > 1:
        encoding = np.stack([encoding[order[item, :k2]].mean(0) for item in range(number)])
    smaller = np.stack([np.minimum(row, encoding).sum(1) for row in encoding])
    larger = np.stack([np.maximum(row, encoding).sum(1) for row in encoding])
    jaccard = 1 - smaller / np.maximum(larger, 1e-30)
    return ((1 - lambda_value) * jaccard + lambda_value * distances)[:num_queries, num_queries:]


def reranked(queries, gallery, *parameters):
    points = tiles.points(queries, gallery, len(queries), len(gallery))
    distances = reranking.reranked(*points, *parameters)
    return np.concatenate([distances(slice(top, top + 9)) for top in range(0, len(queries), 9)])


@pytest.mark.parametrize('listed', [1, 4])
@pytest.mark.parametrize(
    ('num_queries', 'num_gallery', 'k1', 'k2', 'lambda_value'),
    [
        (30, 120, 20, 6, 0.3),
        (40, 90, 7, 1, 0.0),
        (1, 60, 5, 3, np.float64(1)),
        (10, 100, 3, 8, 0.5),
        (3, 4, 20, 9, 0.3),
    ],
)
@pytest.mark.usefixtures('path')
def test_reranking_equals_the_dense_definition(num_queries, num_gallery, k1, k2, lambda_value, listed, monkeypatch):
    monkeypatch.setattr(reranking, 'LISTED', listed)
    rng = np.random.default_rng(k1)
    parameters = k1, k2, lambda_value
    pids, camids = rng.integers(0, 12, num_queries + num_gallery), rng.integers(0, 3, num_queries + num_gallery)
    for everyone in (draw_persons(rng, pids, camids), draw_integers(rng, 0, len(pids), 4, 3)[1]):
        queries, gallery = everyone[:num_queries], everyone[num_queries:]
        found = reranked(queries, gallery, *parameters)
        expected = reranked_densely(exact_distances(everyone, everyone), num_queries, *parameters)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    ids = pids[:num_queries], pids[num_queries:], camids[:num_queries], camids[num_queries:]
    check(ranking.rerank(queries, gallery, *ids, *parameters), found, ids)


def test_reranking_helps():
    rng = np.random.default_rng(8)
    ids = draw_ids(rng, 60, 800, 40, 6)
    features = draw_persons(rng, ids[0], ids[2]), draw_persons(rng, ids[1], ids[3])
    assert ranking.rerank(*features, *ids).mAP > ranking.rank(*features, *ids).mAP + 0.05


def test_reranking_of_collapsed_features_is_defined():
    result = ranking.rerank(torch.ones(3, 4), torch.ones(9, 4), [1] * 3, [1] * 9, [0] * 3, [1] * 9)
    assert result.ranks.tolist() == [*range(1, 10)] * 3


@pytest.mark.usefixtures('path')
def test_reranking_of_a_collapsed_network_is_as_bad_as_chance():
    """Rounding makes distances of equal features negative; they were divided by a number next to 0, and all NaN."""
    pids, camids = np.arange(120) % 20, np.arange(120) % 3
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(512, generator=generator) + 1e-7 * (seed % 2) * torch.randn(
            120, 512, generator=generator
        )
        features = features.expand(120, 512).contiguous()
        ids = pids[:40], pids[40:], camids[:40], camids[40:]
        result = ranking.rerank(features[:40], features[40:], *ids)
        assert np.isfinite(result.distances).all() and result.mAP < 0.3


@pytest.mark.parametrize('parameters', [(0, 6, 0.3), (20, 0, 0.3), (20, 6, 1.5)])
def test_reranking_refuses_odd_parameters(parameters):
    with pytest.raises(UserError, match='re-ranking needs'):
        ranking.rerank(torch.ones(3, 4), torch.ones(9, 4), [1] * 3, [1] * 9, [0] * 3, [1] * 9, *parameters)
