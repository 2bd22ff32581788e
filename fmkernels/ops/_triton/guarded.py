"""Runs interpreted Triton kernels on copies of their arguments inside larger, poisoned buffers.

A kernel that reads past a tensor gets NaN, one that writes past it changes the margin, whatever
lies beside the tensor in the caller's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Longer than a tile's row of any kernel under test.
MARGIN = 1 << 14


class _Guard:
    """A tensor's memory, from its first to its last element, between two margins."""

    def __init__(self, tensor: Tensor) -> None:
        spans = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        self.span = sum(spans) + 1 if tensor.numel() else 0
        # .data: to copy back must not count as an in-place change of a tensor that autograd saved.
        self.source = tensor.data.as_strided((self.span,), (1,))
        if tensor.is_floating_point():
            self.poison = float("nan")
        else:
            self.poison = torch.iinfo(tensor.dtype).max
        self.buffer = torch.full((self.span + 2 * MARGIN,), self.poison, dtype=tensor.dtype)
        self.inside = self.buffer[MARGIN : MARGIN + self.span]
        self.inside.copy_(self.source)

    def view(self, tensor: Tensor) -> Tensor:
        return self.buffer.as_strided(tensor.shape, tensor.stride(), MARGIN)

    def release(self, kernel: str, position: int) -> None:
        """Copy back, and fail if the margins have changed."""
        margins = torch.cat((self.buffer[:MARGIN], self.buffer[MARGIN + self.span :]))
        intact = margins.isnan() if margins.is_floating_point() else margins == self.poison
        assert intact.all(), f"{kernel} wrote outside of its argument {position}"
        self.source.copy_(self.inside)


@contextmanager
def guarded_kernels() -> Iterator[None]:
    """Guard every launch made inside."""
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.__getitem__

    def guarded(kernel, grid):
        run = original(kernel, grid)

        def call(*arguments, **options):
            guards: dict[tuple, _Guard] = {}
            inside = list(arguments)
            for position, value in enumerate(arguments):
                if isinstance(value, Tensor):
                    key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
                    guard = guards.setdefault(key, _Guard(value))
                    inside[position] = guard.view(value)
            run(*inside, **options)
            for position, guard in enumerate(guards.values()):
                guard.release(kernel.fn.__name__, position)

        return call

    InterpretedFunction.__getitem__ = guarded
    try:
        yield
    finally:
        InterpretedFunction.__getitem__ = original
