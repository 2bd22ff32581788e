"""Answers worked out once for the arguments that come back with every call of a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def remember(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which must be pure, with a cache: checking a call must not cost more than it.

    Arguments are told apart by value and type (``True`` is not 1), except inside of tuples. Those
    that cannot be hashed (lists, symbolic sizes) and calls that torch.compile traces are answered
    without the cache. What raises is not remembered.
    """
    cached = functools.lru_cache(maxsize=1024, typed=True)(function)

    @functools.wraps(function)
    def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return cached(*args, **kwargs)
        except TypeError:  # not hashable, or raised by the function: it raises again
            return function(*args, **kwargs)

    return answer
