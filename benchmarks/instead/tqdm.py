"""What the project needs of tqdm, without bars: for `gpu.py` on a machine that has no tqdm and no network."""

from collections.abc import Iterable, Iterator
from datetime import timedelta


class tqdm:
    def __init__(self, iterable: Iterable = (), **_: object):
        self.iterable, self.disable = iterable, True

    def __iter__(self) -> Iterator:
        return iter(self.iterable)

    def __enter__(self) -> 'tqdm':
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _: float = 1) -> None:
        pass

    def set_postfix(self, *_: object, **__: object) -> None:
        pass

    @staticmethod
    def format_interval(seconds: float) -> str:
        return str(timedelta(seconds=int(seconds)))
