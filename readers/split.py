"""Persons drawn by identity, for a test or a validation, and the queries among their items.

Everything is drawn by digests of (seed, name): a person or an item that is added changes the place of few others.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar('T')


def smallest(names: Iterable[str], number: int, seed: int) -> set[str]:
    """The `number` names with the smallest digests."""
    return set(sorted(set(names), key=lambda name: digest(name, seed))[:number])


def one_of_each(items: Iterable[T], key: Callable[[T], Hashable], name: Callable[[T], str], seed: int) -> list[T]:
    """The item with the smallest digest of its name for each key, in the order in which the keys appear."""
    chosen: dict[Hashable, tuple[bytes, T]] = {}
    for item in items:
        mark = digest(name(item), seed)
        if (known := chosen.get(key(item))) is None or mark < known[0]:
            chosen[key(item)] = mark, item
    return [item for _, item in chosen.values()]


def digest(text: str, seed: int) -> bytes:
    return hashlib.sha256(f'{seed} {text}'.encode(errors='surrogateescape')).digest()
