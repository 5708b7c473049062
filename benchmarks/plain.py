"""The original's test method in straightforward code: whole matrices, argsort, a loop over queries."""

import numpy as np
from torch import Tensor

Array = np.ndarray


def distance_matrix(q_features: Tensor, g_features: Tensor) -> np.ndarray:
    """(Q, G) squared Euclidean distances."""
    distances = q_features.pow(2).sum(1, keepdim=True) + g_features.pow(2).sum(1)  # (Q, G)
    return distances.addmm_(q_features, g_features.t(), alpha=-2).numpy()


def evaluate(
    distmat: Array, q_pids: Array, g_pids: Array, q_camids: Array, g_camids: Array, max_rank: int = 50
) -> tuple[Array, float]:
    """CMC and mAP by an argsort of the whole matrix and a list of precisions for each query."""
    order = np.argsort(distmat, axis=1)
    matches = (g_pids[order] == q_pids[:, None]).astype(np.int32)
    curves, precisions = [], []
    for query, ranked in enumerate(order):
        dropped = (g_pids[ranked] == q_pids[query]) & (g_camids[ranked] == q_camids[query])
        hits = matches[query][~dropped]
        if not hits.any():
            continue
        found = hits.cumsum()
        curves.append(np.minimum(found, 1)[:max_rank])
        precision = np.asarray([count / (place + 1.0) for place, count in enumerate(found)])
        precisions.append((precision * hits).sum() / hits.sum())
    return np.mean(curves, axis=0), float(np.mean(precisions))


def evaluate_tightly(
    distmat: Array, q_pids: Array, g_pids: Array, q_camids: Array, g_camids: Array, max_rank: int = 50
) -> tuple[Array, float]:
    """The same with a lean loop: a stable argsort of each row, then only its matches."""
    curve, precisions = np.zeros(max_rank), []
    for distances, pid, camid in zip(distmat, q_pids, q_camids, strict=True):
        order = np.argsort(distances, kind='stable')
        order = order[(g_pids[order] != pid) | (g_camids[order] != camid)]
        ranks = np.flatnonzero(g_pids[order] == pid) + 1
        if len(ranks):
            curve[ranks[0] - 1 :] += 1
            precisions.append((np.arange(1, len(ranks) + 1) / ranks).mean())
    return curve / len(precisions), float(np.mean(precisions))


def rerank(
    q_features: np.ndarray, g_features: np.ndarray, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> np.ndarray:
    """(Q, G) k-reciprocal distances (Zhong et al., CVPR 2017), with every matrix dense."""
    everyone = np.concatenate([q_features, g_features])
    norms = np.square(everyone).sum(1)
    distances = norms[:, None] + norms - 2 * everyone @ everyone.T  # (N, N)
    distances /= distances.max(1, keepdims=True)
    order = np.argsort(distances, axis=1, kind='stable')
    weights = np.zeros_like(distances)

    def reciprocal(item: int, k: int) -> np.ndarray:
        near = order[item, : k + 1]
        mutual: np.ndarray = near[(order[near, : k + 1] == item).any(1)]
        return mutual

    for item in range(len(everyone)):
        near = members = reciprocal(item, k1)
        for neighbour in near:
            others = reciprocal(neighbour, int(np.around(k1 / 2)))
            if len(np.intersect1d(others, near)) > 2 / 3 * len(others):
                members = np.append(members, others)
        members = np.unique(members)
        weights[item, members] = np.exp(-distances[item, members])
        weights[item] /= weights[item].sum()
    if k2 > 1:
        weights = np.stack([weights[order[item, :k2]].mean(0) for item in range(len(everyone))])
    holders = [np.flatnonzero(column) for column in weights.T]
    result = np.empty((len(q_features), len(everyone)), np.float32)
    for query in range(len(q_features)):
        shared = np.zeros(len(everyone), np.float32)
        for one in np.flatnonzero(weights[query]):
            shared[holders[one]] += np.minimum(weights[query, one], weights[holders[one], one])
        result[query] = (1 - lambda_value) * (1 - shared / (2 - shared)) + lambda_value * distances[query]
    return result[:, len(q_features) :]
