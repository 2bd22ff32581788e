"""Checks every address that interpreted Triton kernels load from, store to or update.

A pointer argument is given a stretch of an address space that does not exist, far away from those
of the others, and each access is led back to the tensor's memory after it was looked at. So an
address says which argument it was computed from, and an access may reach that tensor's elements
alone: not what lies beside them in memory, not another argument, not the gaps of a strided view.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import numpy
import torch
import triton
from torch import Tensor

# Of an address, the bits above these are the number of the argument, counted from one.
_BITS = 44


class OutOfBoundsError(AssertionError):
    """A kernel's access to memory outside of the tensor whose pointer it started from."""


class _Region:
    """The elements of one pointer argument, and where a kernel sees them."""

    def __init__(self, name: str, number: int, tensor: Tensor) -> None:
        self.name = name
        self.layout = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        self.itemsize = tensor.itemsize
        # In the middle, so that what lies before the tensor has the same number.
        self.start = numpy.uint64((number << _BITS) + (1 << _BITS - 1))
        self.real = numpy.uint64(tensor.data_ptr())
        steps = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        self.span = sum(steps) + 1 if tensor.numel() else 0
        self.elements = None if tensor.numel() >= self.span else self._elements(tensor)
        self._limits: dict[int, numpy.uint64] = {}

    def _elements(self, tensor: Tensor) -> numpy.ndarray:
        """Which positions of the span are elements, not gaps; expanded axes count once."""
        held = torch.zeros(self.span, dtype=torch.bool)
        held.as_strided(tensor.shape, tensor.stride()).fill_(True)
        return held.numpy()

    def inside(self, offsets: numpy.ndarray, width: int) -> numpy.ndarray:
        """Which accesses of ``width`` bytes, ``offsets`` bytes from the start, meet an element."""
        limit = self._limits.get(width)
        if limit is None:
            limit = numpy.uint64(max(0, self.span * self.itemsize - width + 1))
            self._limits[width] = limit
        # Unsigned: what lies before the start is far behind the end.
        inside = offsets < limit
        if self.elements is not None:
            positions = (offsets // numpy.uint64(self.itemsize)).astype(numpy.int64)
            inside &= self.elements.take(positions, mode="clip")
        return inside


class _Launch:
    """The pointer arguments of a launch, and the check of an access."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel.fn.__name__
        self.regions: dict[int, _Region] = {}
        self.error: OutOfBoundsError | None = None

    def add(self, name: str, tensor: Tensor) -> _Region:
        number = len(self.regions) + 1
        self.regions[number] = _Region(name, number, tensor)
        return self.regions[number]

    def memory(self, pointers: Any, mask: numpy.ndarray | None, verb: str) -> numpy.ndarray:
        """Where in memory ``pointers`` are; those that ``mask`` leaves out may be anywhere.

        Raises:
            OutOfBoundsError: one of the others is not at an element of its argument.
        """
        addresses = pointers.data
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        region = self.regions.get(int(addresses.item(0)) >> _BITS)
        if region is not None:
            offsets = addresses - region.start
            inside = region.inside(offsets, width)
            if inside.all() or (mask is not None and (inside | ~mask).all()):
                return offsets + region.real
        return self._one_by_one(addresses, width, mask, verb)

    def _one_by_one(
        self, addresses: numpy.ndarray, width: int, mask: numpy.ndarray | None, verb: str
    ) -> numpy.ndarray:
        """As :meth:`memory`, for pointers of several arguments in one access, or a wrong one."""
        used = numpy.ones(addresses.shape, bool) if mask is None else mask
        used = numpy.broadcast_to(used, addresses.shape)
        numbers = addresses >> numpy.uint64(_BITS)
        memory = numpy.zeros_like(addresses)
        for number in numpy.unique(numbers[used]).tolist():
            chosen = used & (numbers == number)
            region = self.regions.get(number)
            if region is None:
                self._fail(f"{verb} {int(chosen.sum())} elements by pointers of no argument")
            offsets = addresses[chosen] - region.start
            wrong = ~region.inside(offsets, width)
            if wrong.any():
                self._fail(_described(region, offsets[wrong].astype(numpy.int64), verb))
            memory[chosen] = offsets + region.real
        return memory

    def _fail(self, what: str) -> NoReturn:
        from triton.runtime.interpreter import interpreter_builder

        program = interpreter_builder.grid_idx
        self.error = OutOfBoundsError(f"{self.kernel} {what}; program {program}{_line()}")
        raise self.error


def _described(region: _Region, offsets: numpy.ndarray, verb: str) -> str:
    positions = numpy.unique(offsets // region.itemsize)
    first, last = int(positions[0]), int(positions[-1])
    reach = f"{first}" if first == last else f"{first} ... {last}"
    outside = (positions < 0).any() or (positions >= region.span).any()
    where = f"outside of its {region.span}" if outside else "between its elements"
    return f"{verb} {region.name} at {reach} ({len(positions)} places), {where} ({region.layout})"


def _line() -> str:
    """The line of the kernel, or of a function that it calls, which makes the access."""
    here = (os.path.dirname(triton.__file__), os.path.abspath(__file__))
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(here):
        frame = frame.f_back
    if frame is None:
        return ""
    return f", {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


@contextmanager
def checked_kernels() -> Iterator[None]:
    """Check every launch made inside.

    Raises:
        OutOfBoundsError: at the launch, naming kernel, argument, place, program and line.
    """
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    current: list[_Launch] = []
    subscript = InterpretedFunction.__getitem__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    exchange, update = InterpreterBuilder.create_atomic_cas, InterpreterBuilder.create_atomic_rmw

    def checked(kernel: Any, grid: Any) -> Callable[..., None]:
        run = subscript(kernel, grid)

        def call(*arguments: Any, **options: Any) -> None:
            launch = _Launch(kernel)

            def seen(name: str, value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                pointer = interpreter._implicit_cvt(value)
                pointer.handle.data = numpy.array([launch.add(name, value).start])
                return pointer

            named = zip(kernel.arg_names, arguments, strict=False)
            inside = [seen(name, value) for name, value in named]
            current.append(launch)
            try:
                run(*inside, **{name: seen(name, value) for name, value in options.items()})
            except interpreter.InterpreterError:
                if launch.error is not None:
                    raise launch.error from None
                raise
            finally:
                current.pop()

        return call

    def real(pointers: Any, mask: Any, verb: str) -> Any:
        # The interpreter's block pointers come with an array for a mask, whose data is a buffer.
        used = None if mask is None else numpy.asarray(mask.data)
        return TensorHandle(current[-1].memory(pointers, used, verb), pointers.dtype)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return load(self, real(pointers, mask, "loads"), mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, real(pointers, mask, "stores"), value, mask, *rest)

    def checked_exchange(self: Any, pointers: Any, *rest: Any) -> Any:
        return exchange(self, real(pointers, None, "exchanges"), *rest)

    def checked_update(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *rest: Any):
        return update(self, how, real(pointers, mask, "updates"), value, mask, *rest)

    InterpretedFunction.__getitem__ = checked
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    InterpreterBuilder.create_atomic_cas = checked_exchange
    InterpreterBuilder.create_atomic_rmw = checked_update
    try:
        yield
    finally:
        InterpretedFunction.__getitem__ = subscript
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
        InterpreterBuilder.create_atomic_cas = exchange
        InterpreterBuilder.create_atomic_rmw = update
