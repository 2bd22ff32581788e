"""Input factories, float64 oracles and the tolerance policy, for tests and benchmarks alike.

The policy: against PyTorch in float64 on the same (already rounded) inputs, the largest error of a
result is at most twice that of PyTorch's own run in the result's dtype, plus a floor that depends
on the dtype and scales with the largest magnitude of the result. NaN and infinities must stand at
the same places as in the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels._dispatch import Backend
from fmkernels.ops import _activations

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Relative to max|result|: what summation in another order costs in float32 and float64, and half a
# unit in the last place (at a magnitude just above a power of two) where results are rounded.
FLOORS = {
    torch.float64: 64 * torch.finfo(torch.float64).eps,
    torch.float32: 8 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2,
    torch.float16: torch.finfo(torch.float16).eps / 2,
}

Arguments = Mapping[str, Tensor | None]


def available_backends(backends: Mapping[str, Backend], *problem: Any) -> list[str]:
    """Names of the backends that serve this problem on this machine."""
    return [name for name, backend in backends.items() if backend.supports(*problem).ok]


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``: a test id."""
    return str(dtype).removeprefix("torch.")


# --- inputs ---

LAYOUTS = ("contiguous", "channels_last", "transposed", "expanded", "strided", "offset")


def in_layout(values: Tensor, layout: str) -> Tensor:
    """The same values (for "expanded": the first slice repeated) in memory of another kind.

    Args:
        values: any tensor with at least two dimensions; four for channels_last.
        layout: ``"contiguous"``; ``"channels_last"``; ``"transposed"``: the last two dimensions
            are swapped in memory; ``"expanded"``: stride 0 along the first dimension;
            ``"strided"``: every other element, from the second on, of a larger buffer that holds
            NaN elsewhere; ``"offset"``: contiguous from one element past the start of a buffer, so
            not aligned.
    """
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return values[:1].contiguous().expand(values.shape)
    if layout == "strided":
        buffer = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), float("nan"))
        view = buffer[..., 1::2]
        view.copy_(values)
        return view
    if layout == "offset":
        buffer = values.new_empty(values.numel() + 1)
        view = buffer[1:].view(values.shape)
        view.copy_(values)
        return view
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def normal(
    *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", std: float = 1.0
) -> Tensor:
    """Normally distributed values, drawn in float64 and rounded, so the same for every dtype."""
    return in_layout((torch.randn(shape, dtype=torch.float64) * std).to(dtype), layout)


def integers(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    low: int = -2,
    high: int = 2,
) -> Tensor:
    """Small integers in ``[low, high]``: short sums of products are exact in every dtype."""
    return in_layout(torch.randint(low, high + 1, shape).to(dtype), layout)


GRADIENT_LAYOUTS = ("contiguous", "expanded", "transposed", "narrowed")


def gradient_in_layout(values: Tensor, layout: str) -> Tensor:
    """An incoming gradient with the strides that autograd really delivers.

    ``"expanded"`` comes from ``sum`` (stride 0 everywhere, the first value throughout),
    ``"transposed"`` from a transpose, ``"narrowed"`` from ``cat`` or slicing.
    """
    if layout == "contiguous":
        return values.contiguous()
    if layout == "expanded":
        first = values.flatten()[:1] if values.numel() else values.new_ones(1)
        return first.reshape(()).expand(values.shape)
    if layout == "transposed":
        if values.dim() < 2:
            return values.contiguous()
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "narrowed":
        buffer = values.new_full((*values.shape[:-1], values.shape[-1] + 3), float("nan"))
        view = buffer.narrow(-1, 1, values.shape[-1])
        view.copy_(values)
        return view
    raise ValueError(f"layout must be one of {', '.join(GRADIENT_LAYOUTS)}, got {layout!r}")


def torch_activation(name: str | None, x: Tensor) -> Tensor:
    """The activation in plain PyTorch, for oracles."""
    if name == "hardsigmoid":
        # The gradient of F.hardsigmoid in float64 carries a 1/6 rounded to float32.
        return F.relu6(x + 3) / 6
    return _activations.apply(name, x)


# --- comparison ---


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinity where the kinds of value differ.

    NaN must meet NaN, and an infinity the same infinity. An oracle value beyond the range of
    ``actual``'s dtype counts as an infinity.
    """
    exact = exact.to(torch.float64)
    limit = torch.finfo(actual.dtype).max
    rounded = exact.to(actual.dtype).to(torch.float64)
    exact = torch.where(exact.abs() > limit, rounded, exact)
    actual = actual.to(torch.float64)
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, torch.zeros_like(exact), (actual - exact).abs())
    difference = torch.where(
        difference.isnan(), torch.full_like(difference, torch.inf), difference
    )
    return difference.max().item() if difference.numel() else 0.0


def allowed_error(
    torch_error: float, exact: Tensor, dtype: torch.dtype, floor_factor: float = 1.0
) -> float:
    """Twice PyTorch's own error plus the dtype's floor at the magnitude of ``exact``."""
    finite = exact[exact.isfinite()]
    magnitude = finite.abs().max().item() if finite.numel() else 0.0
    return 2 * torch_error + floor_factor * FLOORS[dtype] * magnitude


def assert_within_policy(name: str, actual: Tensor, from_torch: Tensor, exact: Tensor) -> None:
    """Raise AssertionError, naming the tensor, unless ``actual`` meets the tolerance policy.

    Args:
        actual: the result to judge.
        from_torch: PyTorch's result in the same dtype.
        exact: PyTorch's result in float64.
    """
    assert actual.shape == exact.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    )
    assert actual.dtype == from_torch.dtype, (
        f"{name}: dtype {actual.dtype}, expected {from_torch.dtype}"
    )
    torch_error = max_error(from_torch, exact)
    error = max_error(actual, exact)
    allowed = allowed_error(torch_error, exact, actual.dtype)
    assert error <= allowed, (
        f"{name} {tuple(actual.shape)} {dtype_name(actual.dtype)}: error {error:.3g} against "
        f"float64, allowed {allowed:.3g} (PyTorch's own error is {torch_error:.3g})"
    )


def run(
    function: Callable[..., Any],
    arguments: Arguments,
    grad_layout: str | None = "contiguous",
    grad_outputs: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients of ``function(**arguments)``, by name.

    Args:
        function: returns a tensor or a tuple of tensors.
        arguments: each floating-point tensor becomes a leaf, its strides kept. None and tensors of
            other dtypes are passed on.
        grad_layout: one of GRADIENT_LAYOUTS, or None to run the forward alone, without a graph.
        grad_outputs: values of the incoming gradients, one per output; ones if left out.

    Returns:
        ``output`` (or ``output0``, ``output1``, ... for a tuple) and ``grad_<argument>``.
    """
    leaves = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = value.detach()
            if grad_layout is not None and value.is_floating_point():
                value.requires_grad_()
        leaves[name] = value
    with torch.set_grad_enabled(grad_layout is not None):
        outputs = function(**leaves)
    single = isinstance(outputs, Tensor)
    outputs = (outputs,) if single else tuple(outputs)
    names = ["output"] if single else [f"output{i}" for i in range(len(outputs))]
    results = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
    if grad_layout is None:
        return results
    if grad_outputs is None:
        grad_outputs = [torch.ones_like(output) for output in outputs]
    gradients = [
        gradient_in_layout(grad.to(output.dtype), grad_layout)
        for grad, output in zip(grad_outputs, outputs, strict=True)
    ]
    inputs = {n: t for n, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    found = torch.autograd.grad(outputs, list(inputs.values()), gradients, allow_unused=True)
    for (name, leaf), grad in zip(inputs.items(), found, strict=True):
        results[f"grad_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def compare(
    function: Callable[..., Any],
    torch_function: Callable[..., Any],
    arguments: Arguments,
    *,
    grad_layout: str | None = "contiguous",
    integer_gradients: bool = False,
) -> None:
    """Assert that outputs and every gradient of ``function`` meet the tolerance policy.

    Args:
        function: what is tested; takes ``arguments`` as keywords.
        torch_function: the same computation in plain PyTorch; runs in float64 for the oracle and
            in the arguments' dtype for PyTorch's own error.
        arguments: tensors by parameter name; see :func:`run`.
        grad_layout: strides of the incoming gradient, or None to compare the forward alone.
        integer_gradients: incoming gradients are small integers rather than normal values.

    Raises:
        AssertionError: names the tensor, its shape, its error and what is allowed.
    """
    probe = run(torch_function, arguments, None)
    make = integers if integer_gradients else normal
    grads = [make(*output.shape, dtype=output.dtype) for output in probe.values()]
    exact_arguments = {name: _to_float64(value) for name, value in arguments.items()}
    exact = run(torch_function, exact_arguments, grad_layout, grads)
    from_torch = run(torch_function, arguments, grad_layout, grads)
    actual = run(function, arguments, grad_layout, grads)
    assert actual.keys() == exact.keys(), f"got {list(actual)}, expected {list(exact)}"
    for name in exact:
        assert_within_policy(name, actual[name], from_torch[name], exact[name])


def _to_float64(value: Tensor | None) -> Tensor | None:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float64)
    return value
