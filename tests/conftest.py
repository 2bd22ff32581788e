"""Fixtures that every test runs under."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import types
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Read when OpenMP is loaded, that is, with torch. Threads that spin while they wait slow the suite
# manyfold on a machine that something else keeps busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Read by the native library: what its operators allocate starts as NaN, as below what torch does.
os.environ.setdefault("FMKERNELS_POISON", "1")

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402

from fmkernels import UnsupportedError  # noqa: E402
from fmkernels.ops._triton import support  # noqa: E402

# What PyTorch calls deprecated, and an error only where the variable CI is set.
torch._functorch.config.error_on_custom_op_aliasing = True

ROOT = Path(__file__).resolve().parent.parent

# The same examples on every run: a red test is red for everyone.
hypothesis.settings.register_profile("fmkernels", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fmkernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under TRITON_INTERPRET=1 the families' tests run Triton's kernels too: `-m interpret`."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") != "triton":
            continue
        item.add_marker(pytest.mark.interpret)
        if parameters.get("dtype") is torch.bfloat16:
            reason = "the interpreter truncates where bfloat16 should be rounded"
            item.add_marker(pytest.mark.skip(reason=reason))


# How the attention and rnn families' Triton kernels, the only ones without it, refuse float64.
_NO_FLOAT64 = (
    "triton: attends in float32, bfloat16 and float16; got torch.float64",
    "triton: runs in float32, bfloat16 and float16; got torch.float64",
)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Skips a test of a Triton kernel in float64 where the family has none.

    A test of another dtype that meets this refusal fails: it must not ask for float64.
    """
    try:
        return (yield)
    except UnsupportedError as error:
        parameters = pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else {}
        asked = parameters.get("backend"), parameters.get("dtype", torch.float64)
        request, *reasons = (line.strip() for line in str(error).splitlines())
        refused = "backend 'triton'" in request and not set(reasons).isdisjoint(_NO_FLOAT64)
        if refused and asked == ("triton", torch.float64):
            pytest.skip("Triton's kernels of this family have no float64")
        raise


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws while it is imported, its tables of cases, is the same in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Tests draw from torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN (integers: their maximum): none can pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def checked_triton(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every access of an interpreted kernel is to an element of the argument it points into."""
    marked = request.node.get_closest_marker
    if support.INTERPRETING and marked("interpret") and not marked("unchecked"):
        # Needs NumPy, as the interpreter does, and an installation of the package alone has none.
        from fmkernels.ops._triton.bounds import checked_kernels

        with checked_kernels(), unchecked_integers(), language_patched_once(), sums_in_pairs():
            yield
    else:
        yield


@contextlib.contextmanager
def unchecked_integers() -> Iterator[None]:
    """Triton's interpreter does not look for overflows of integers, which takes half of its time.

    Tensors that could make an offset overflow are those of the tests marked ``unchecked``.
    """
    from triton.runtime.interpreter import interpreter_builder

    checked = interpreter_builder.options
    interpreter_builder.options = dataclasses.replace(checked, sanitize_overflow=False)
    yield
    interpreter_builder.options = checked


@contextlib.contextmanager
def language_patched_once() -> Iterator[None]:
    """Triton's interpreter puts its own functions into the language at a launch, as it should, and
    looks for more of them at each call of a device function, which takes half of its time."""
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def languages(fn: Callable[..., object]) -> list[types.ModuleType]:
        visible = fn.__globals__.values()
        return [value for value in visible if value is language or value is language.core]

    def patch_once(fn: Callable[..., object]) -> object:
        # A launch restores the language when it ends: at the next one it is original again.
        if any(language.core.is_builtin(one.load) for one in languages(fn)):
            return patch(fn)
        return None

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch


@contextlib.contextmanager
def sums_in_pairs() -> Iterator[None]:
    """``tl.sum`` adds up as compiled kernels do: a few strands, and these in pairs.

    Triton's interpreter adds the rows of a matrix one after another, which rounds far more often
    than a multiprocessor, where each thread adds a few rows and a tree joins the threads.
    """
    import numpy
    from triton.runtime.interpreter import ReduceOps

    original = ReduceOps.sum

    def summed(self: Any, operand: Any) -> Any:
        if self.axis is None:
            return original(self, operand)
        # Along adjacent numbers numpy adds in eight strands of sixteen, and these in pairs.
        data = numpy.ascontiguousarray(numpy.moveaxis(operand.handle.data, self.axis, -1))
        total = data.sum(-1)
        total = numpy.expand_dims(total, self.axis) if self.keep_dims else total
        return self.to_tensor(total, operand.dtype)

    ReduceOps.sum = summed
    yield
    ReduceOps.sum = original


@pytest.fixture(scope="session")
def emulated_ops() -> Path:
    """The CUDA operators compiled for the CPU, loaded into torch."""
    sys.path.insert(0, str(ROOT))
    from build_support import emulator, native

    given = os.environ.get("FMK_EMULATED_OPS")  # a sanitizer's build, in a process of its own
    try:
        library = emulator.build("plain") if given is None else Path(given)
    except native.BuildError as error:
        if native.find_compiler(os.environ) is None:
            pytest.skip(f"the emulator cannot be built: {error}")
        raise
    torch.ops.load_library(str(library))
    return library


@pytest.fixture
def emulated_cuda(emulated_ops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are served by the backend "cuda", whose kernels run in the emulator."""
    monkeypatch.setattr("fmkernels.ops._cuda_support.EMULATED", True)


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request):
    """A number of threads that PyTorch and the kernels use during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
