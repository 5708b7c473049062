"""The types of option values: text from the command line -> a value, or a one-line message with what is expected."""

import argparse
import math
import os
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar('Value')

MOST_INT = 2**31 - 1  # of counts and sizes
SMALLEST = 2.0**-126  # the smallest normal float32: what is smaller may become 0, and must not divide


def _number(text: str, kind: Callable[[str], Value], least: float, expected: str, most: float = math.inf) -> Value:
    try:
        value = kind(text)
        fits = math.isfinite(value) and least <= value <= most  # type: ignore[arg-type,operator]  # int or float
    except (ValueError, OverflowError):  # OverflowError: an integer that is too large for a float
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f'must be {expected}, not {text!r}')
    return value


def path(text: str) -> str:
    """A path, with `~` expanded, because the shell does not expand it in `--save-dir=~/log`."""
    return os.path.expanduser(text)


def page(text: str) -> str:
    """The path of a page to write. It replaces a file of this name, so other kinds of files are refused."""
    if not text.lower().endswith('.html'):
        raise argparse.ArgumentTypeError(f'must end in .html, not {text!r}')
    return path(text)


def positive_int(text: str) -> int:
    return _number(text, int, 1, f'an integer of at least 1 (at most {MOST_INT})', most=MOST_INT)


def seed(text: str) -> int:
    return _number(text, int, 0, 'an integer from 0 to 2^64 - 1', most=2**64 - 1)


def nonnegative_int(text: str) -> int:
    return _number(text, int, 0, f'an integer of at least 0 (at most {MOST_INT})', most=MOST_INT)


def positive_float(text: str) -> float:
    return _number(text, float, SMALLEST, 'a number greater than 0 (at least 1.2e-38)')


def nonnegative_float(text: str) -> float:
    return _number(text, float, 0.0, 'a number of at least 0')


def fraction(text: str) -> float:
    return _number(text, float, 0.0, 'a number from 0 to 1', most=1.0)


def epochs_or_never(text: str) -> int | float:
    """A number of epochs; infinite for 0 or less, and for inf, which is how infinity is printed."""
    if text == 'inf':
        return math.inf
    try:
        return int(text) if int(text) > 0 else math.inf
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be an integer, not {text!r}') from None


def gpu_list(text: str) -> str:
    """'0' or '0,1,2,3', each index once."""
    indices = text.split(',')
    if not all(index.isdecimal() for index in indices) or len({int(index) for index in indices}) < len(indices):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of GPU indices such as 0 or 0,1,2,3')
    return text


def check_reranking(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Report options that have no effect without --rerank."""
    for flag, name in (('--k1', 'k1'), ('--k2', 'k2'), ('--lambda', 'lambda_value')):
        if not args.rerank and getattr(args, name) != parser.get_default(name):
            parser.error(f'{flag} is an option of re-ranking: add --rerank, or remove it')
