"""Orders in which items are used in rounds: all of them in random order, before any is repeated."""

import numpy as np


def balanced_order(groups: np.ndarray, count: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Indices int64 (count,) of `count` items in batches of `batch`, with equal shares of the groups.

    groups: (N,), the group of each item, any integers

    The groups take turns, in random order, so the shares of two groups, in a batch and in total, differ by at most 1;
    in a batch that is smaller than the number of groups, all items are from different groups. The items of a group are
    used in random order, all of them before any is repeated, and none is twice in a batch unless its group has fewer
    items than its share of that batch. Within a batch the order is random.
    """
    items = split_by(groups)
    chosen = np.empty(count, dtype=np.int64)
    for turn, group in enumerate(rng.permutation(len(items))):
        places = np.arange(turn, count, len(items))
        chosen[places] = repeated(items[group], places // batch, rng)
    for begin in range(0, count, batch):
        rng.shuffle(chosen[begin : begin + batch])
    return chosen


def repeated(
    items: np.ndarray, blocks: np.ndarray, rng: np.random.Generator, first_round: np.ndarray | None = None
) -> np.ndarray:
    """Items in random order, all of them before any is repeated, one for each element of `blocks`: (n,).

    blocks: (n,), ascending: the block of each, such as a batch. The items of a block are different ones, and if it has
        more than there are, they are in it equally often, to within one.
    first_round: some of the items; a shorter round of these precedes the rounds of all
    """
    first = rng.permutation(items if first_round is None else first_round)
    order, count = np.empty(len(blocks) + len(items), dtype=items.dtype), len(first)
    order[:count] = first
    while count < len(blocks):
        begin, end = np.searchsorted(blocks, blocks[count], 'left'), np.searchsorted(blocks, blocks[count], 'right')
        more = rng.permutation(items)
        times = (more[:, None] == order[begin:count]).sum(1)  # that each is in this block so far
        first = np.argsort(times, kind='stable')[: end - count]  # the rarest complete it
        order[count : count + len(items)] = np.concatenate([more[first], np.delete(more, first)])
        count += len(items)
    return order[: len(blocks)]


def split_by(values: np.ndarray) -> list[np.ndarray]:
    """The indices of each distinct value of `values` (N,), in ascending order of the values."""
    by_value = np.argsort(values, kind='stable')  # (N,)
    _, starts = np.unique(values[by_value], return_index=True)
    return np.split(by_value, starts[1:])
