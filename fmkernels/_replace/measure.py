"""Runs a model before and after replacement on the same inputs, and compares layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fmkernels._replace.steps import RESIDUAL, Step
from fmkernels._replace.trace import random_states_restored


@dataclass
class Call:
    """One call of a module: the tensors that it returned, and its residual if it was given one."""

    outputs: list[Tensor]
    residual: Any = None


Outputs = dict[str, list[Call]]


def run(model: nn.Module, example_inputs: Any, paths: list[str]) -> tuple[list[Tensor], Outputs]:
    """What ``model`` and its modules at ``paths`` return in evaluation, without gradients.

    Leaves the model's mode, its buffers and the random number generators as they were.

    Returns:
        The model's output tensors, and every call of each path that was called.
    """
    args, kwargs = _arguments(example_inputs)
    captured: Outputs = {}

    def capture(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Copies: what follows may work in place.
            outputs = [t.detach().clone() for t in _tensors(output)]
            fuses_a_sum = getattr(module, "residual_sum", None) is not None and len(inputs) > 1
            residual = _copied(inputs[1]) if fuses_a_sum else None
            captured.setdefault(path, []).append(Call(outputs, residual))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(capture(path)) for path in paths]
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    try:
        with (
            random_states_restored(),
            torch.random.fork_rng(devices),
            in_evaluation(model),
            torch.no_grad(),
        ):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [t.detach() for t in _tensors(output)], captured


def apply_steps(calls: list[Call], fused: list[Call], steps: list[Step]) -> list[Call]:
    """What the original modules make of each output of a chain's head.

    ``fused``: the calls of the fused layer, whose residuals are added where a step adds one.
    """
    if len(calls) != len(fused):
        return calls
    results = []
    with torch.no_grad():
        for call, counterpart in zip(calls, fused, strict=True):
            (output,) = call.outputs
            for step in steps:
                if step.kind == RESIDUAL:
                    if counterpart.residual is None:
                        break
                    output = step.apply(output, counterpart.residual)
                elif isinstance(step.apply, nn.Module):
                    with in_evaluation(step.apply):
                        # Not __call__: its hooks are not for this.
                        output = step.apply.forward(output)
                else:
                    output = step.apply(output)
            results.append(Call([output]))
    return results


def error_of_calls(old: list[Call], new: list[Call]) -> float | None:
    """The largest error over all calls; None if there is nothing to compare."""
    if len(old) != len(new):
        return float("inf")
    errors = [error_of(a.outputs, b.outputs) for a, b in zip(old, new, strict=True)]
    measured = [error for error in errors if error is not None]
    return max(measured, default=None)


def error_of(old: list[Tensor], new: list[Tensor]) -> float | None:
    """The largest ``max|new - old| / max|old|`` over the tensors; infinite if shapes differ."""
    if [t.shape for t in old] != [t.shape for t in new]:
        return float("inf")
    return max((_error(a, b) for a, b in zip(old, new, strict=True) if a.numel()), default=None)


def _error(old: Tensor, new: Tensor) -> float:
    if old.is_nested:
        old, new = old.to_padded_tensor(0.0), new.to_padded_tensor(0.0)
    wide = torch.complex128 if old.is_complex() else torch.float64
    old, new = old.to(wide), new.to(wide)
    same = (old == new) | (old.isnan() & new.isnan())
    difference = torch.where(same, 0.0, (new - old).abs()).nan_to_num(float("inf")).max().item()
    magnitude = old.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return difference / magnitude if magnitude else difference


def _arguments(example_inputs: Any) -> tuple[tuple, dict]:
    """Copies, as positional and keyword arguments."""
    if isinstance(example_inputs, dict):
        return (), _copied(example_inputs)
    if isinstance(example_inputs, tuple | list) and not isinstance(example_inputs, PackedSequence):
        return tuple(_copied(item) for item in example_inputs), {}
    return (_copied(example_inputs),), {}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, PackedSequence):
        return value
    if isinstance(value, tuple | list):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor inside, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


@contextmanager
def in_evaluation(*modules: nn.Module) -> Iterator[None]:
    """Puts the modules into evaluation mode; modes and buffers are as before afterwards."""
    flags = [(m, m.training) for module in modules for m in module.modules()]
    buffers = [(b, b.detach().clone()) for module in modules for b in module.buffers()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
