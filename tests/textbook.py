"""The experiments' arithmetic as a textbook writes it: plain loops over images and identities.

Slow on purpose, and without a line of the rooms. They can be differentiated, and are the references of the tests.
"""

from torch import Tensor


def cross_entropy_label_smooth(logits: Tensor, pids: Tensor, epsilon: float = 0.1) -> Tensor:
    """-sum_k y_k log p_k with y = (1 - epsilon) onehot + epsilon / K, averaged over the batch."""
    num_classes = logits.shape[1]
    total = logits.new_zeros(())
    for row, pid in zip(logits, pids.tolist(), strict=True):
        top = row.detach().max()
        log_sum = (row - top).exp().sum().log() + top
        for k in range(num_classes):
            label = (1 - epsilon) * (k == pid) + epsilon / num_classes
            total = total - label * (row[k] - log_sum)
    return total / len(pids)


def triplet(features: Tensor, pids: Tensor, margin: float | None = 0.3) -> tuple[Tensor, float]:
    """Batch-hard triplet loss, averaged over the anchors, and the fraction of them with a positive hinge.

    Without a margin it is the soft margin, and the fraction counts the positives that are farther than the negative.
    An anchor counts among its own positives. Without a triplet in the batch the loss is zero.
    """
    pids = pids.tolist()
    if len(set(pids)) in (1, len(pids)):
        return 0 * features.sum(), 0.0
    differences = []
    for anchor, pid in zip(features, pids, strict=True):
        hardest_positive = hardest_negative = None
        for other, other_pid in zip(features, pids, strict=True):
            distance = ((anchor - other) ** 2).sum().clamp(min=1e-12).sqrt()
            if other_pid == pid and (hardest_positive is None or distance > hardest_positive):
                hardest_positive = distance
            if other_pid != pid and (hardest_negative is None or distance < hardest_negative):
                hardest_negative = distance
        differences.append(hardest_positive - hardest_negative)
    if margin is None:
        terms = [(1 + difference.exp()).log() for difference in differences]
    else:
        terms = [(margin + difference).clamp(min=0) for difference in differences]
    return sum(terms) / len(terms), sum(d.item() > -(margin or 0) for d in differences) / len(terms)


def match_ranks(distances, q_pids, g_pids, is_dropped) -> list[list[int]]:
    """For each query the ranks of its matches, from 1, found by walking along its sorted gallery.

    distances: (Q, G); equal ones are sorted by gallery index
    is_dropped: (query, item) -> whether an item of the query's own pid is dropped, so that it has no rank
    """
    ranks = []
    for query, pid in enumerate(q_pids):
        found, rank = [], 0
        for item in sorted(range(len(g_pids)), key=lambda item, row=distances[query]: (row[item], item)):
            if g_pids[item] == pid and is_dropped(query, item):
                continue
            rank += 1
            if g_pids[item] == pid:
                found.append(rank)
        ranks.append(found)
    return ranks


def mean_feature(features) -> list[float]:
    """The mean of features (n, D), dimension by dimension."""
    return [sum(float(feature[d]) for feature in features) / len(features) for d in range(len(features[0]))]


def center(features: Tensor, centers: Tensor, pids: Tensor) -> Tensor:
    """Squared distance to the center of the own identity, clamped to [1e-12, 1e12], averaged over the batch."""
    total = features.new_zeros(())
    for feature, pid in zip(features, pids.tolist(), strict=True):
        square = features.new_zeros(())
        for d in range(len(feature)):
            square = square + (feature[d] - centers[pid, d]) ** 2
        total = total + square.clamp(1e-12, 1e12)
    return total / len(pids)
