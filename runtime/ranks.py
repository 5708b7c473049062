"""The ranking of features by several processes, each of which counts in its part of the gallery.

Gallery features never leave their process, except for re-ranking and for the few that a plot shows.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import ranking
from arguments import TestOptions
from readers.tree import Dataset, ids_of
from runtime.device import Run
from runtime.testset import Averaged

EMBEDDED, EMBEDDED_ROWS = 12, 400  # identities and images whose features are kept for a plot

Extracted = tuple[Tensor, Tensor]  # features (n, D) of this process's items, and the indices of these items (n,)


def mean_features(
    features: Tensor, indices: Tensor, several: Averaged, run: Run, distance: str = 'euclidean'
) -> Extracted:
    """The features of the queries: for each, the mean of the features (N, D) of all items of its person in its camera.

    As is usual in the field, the features are averaged in the form that the single-query test compares: with cosine
    distance at length 1, otherwise as they are.
    """
    if distance == 'cosine':
        features = F.normalize(features)
    groups, numbers = (torch.from_numpy(each) for each in (several.groups, several.of_queries))  # (N,), (Q,)
    sizes = groups.bincount()  # (P,)
    group = groups[indices]  # (n,)
    order = group.argsort(stable=True).to(features.device)
    parts = features[order].split(group.bincount(minlength=len(sizes)).tolist())
    sums = run.sum(torch.stack([part.sum(0) for part in parts]))  # (P, D), in every process
    rows = torch.arange(run.rank, len(numbers), run.world_size)  # (q,) of this process
    numbers = numbers[rows].to(features.device)
    means = sums[numbers] / sizes.to(features.device)[numbers, None]  # (q, D)
    print('Multi-query: the feature of a query is the mean over the images of its person in its camera')
    return means, rows


def rank(
    query: Extracted, gallery: Extracted, ids: Sequence[np.ndarray], run: Run, distance: str = 'euclidean'
) -> ranking.Ranking:
    """The ranking of the whole gallery, in every process, from what `extract` returned in each.

    ids: the pids of query and gallery, then their camids

    Every process receives the features of all queries. The counts over all parts of the gallery add up to exact ranks.
    """
    features, places = gallery[0], gallery[1].numpy()  # (m, D), (m,)
    number = len(ids[0])
    queries, items = ranking.points(_collect(*query, number, run), features, number, len(places), distance)
    pairs = ranking.same_identity(*ids)
    distances = _sum(ranking.measure(queries, items, places, pairs), run)  # (P,), each from the process with the item
    tally = ranking.count(queries, items, places, pairs, distances)
    listed = run.stack(torch.from_numpy(tally.nearest)).transpose(0, 1).flatten(1)  # (Q, W * NEAREST)
    nearest = listed.sort(1).values[:, : ranking.NEAREST].numpy()  # (Q, NEAREST)
    return ranking.assemble(
        pairs, distances, ranking.Tally(_sum(tally.counts, run), nearest, _sum(tally.histogram, run))
    )


def sample(query: Extracted, gallery: Extracted, dataset: Dataset, run: Run) -> dict[str, np.ndarray]:
    """The features of the EMBEDDED identities with the most images, for a plot; the same in every process."""
    q_pids, g_pids, q_camids, g_camids = ids_of(dataset.query, dataset.gallery)
    pids, camids = np.concatenate([q_pids, g_pids]), np.concatenate([q_camids, g_camids])
    known, sizes = np.unique(pids[np.isin(pids, q_pids)], return_counts=True)
    chosen = known[np.argsort(-sizes, kind='stable')[:EMBEDDED]]
    rows = np.flatnonzero(np.isin(pids, chosen))[:EMBEDDED_ROWS]  # (n,) of the queries, then the gallery
    features = torch.zeros(len(rows), query[0].size(1))
    for (part, indices), first in ((query, 0), (gallery, len(q_pids))):
        held = indices.numpy() + first  # (m,) rows held by this process, ascending
        sampled = np.isin(held, rows)
        features[np.searchsorted(rows, held[sampled])] = part[torch.from_numpy(sampled).to(part.device)].cpu()
    features = run.sum(features)
    features /= (features.abs().max() / 1000).clamp(min=1)  # features beyond 65504 would be infinite in half precision
    return {
        'embedding_features': features.half().numpy(),
        'embedding_pids': pids[rows],
        'embedding_camids': camids[rows],
        'embedding_is_query': rows < len(q_pids),
    }


def rerank(
    query: Extracted, gallery: Extracted, ids: Sequence[np.ndarray], options: TestOptions, run: Run
) -> ranking.Ranking | None:
    """The re-ranked gallery in the first process, which receives all features; None in the others."""
    queries, items = (_collect(*each, len(pids), run) for each, pids in zip((query, gallery), ids[:2], strict=True))
    if run.rank:
        return None
    q_pids, g_pids, q_camids, g_camids = ids
    how = options.k1, options.k2, options.lambda_value, options.distance
    return ranking.rerank(queries, items, q_pids, g_pids, q_camids, g_camids, *how)


def _collect(features: Tensor, indices: Tensor, number: int, run: Run) -> Tensor:
    """All features (number, D), in every process, from the rows (n, D) at `indices` (n,) that each process has."""
    everyone = features.new_zeros(number, features.size(1))
    everyone[indices.to(features.device)] = features
    return run.sum(everyone)


def _sum(values: np.ndarray, run: Run) -> np.ndarray:
    total: np.ndarray = run.sum(torch.from_numpy(values)).numpy()
    return total
