"""Runs a model before and after replacement on the same inputs, and compares layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fmkernels._replace.steps import Step
from fmkernels._replace.trace import random_states_restored

Outputs = dict[str, list[list[Tensor]]]


def run(model: nn.Module, example_inputs: Any, paths: list[str]) -> tuple[list[Tensor], Outputs]:
    """What ``model`` and its modules at ``paths`` return in evaluation, without gradients.

    Leaves the model's mode, its buffers and the random number generators as they were.

    Returns:
        The model's output tensors, and for each path that was called the tensors of every call.
    """
    args, kwargs = _arguments(example_inputs)
    captured: Outputs = {}

    def capture(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Copies: what follows may work in place.
            captured.setdefault(path, []).append([t.detach().clone() for t in _tensors(output)])

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


def apply_steps(calls: list[list[Tensor]], steps: list[Step]) -> list[list[Tensor]]:
    """What the original modules make of each output of a chain's head."""
    results = []
    with torch.no_grad():
        for (output,) in calls:
            for step in steps:
                if isinstance(step.apply, nn.Module):
                    with in_evaluation(step.apply):
                        # Not __call__: its hooks are not for this.
                        output = step.apply.forward(output)
                else:
                    output = step.apply(output)
            results.append([output])
    return results


def error_of_calls(old: list[list[Tensor]], new: list[list[Tensor]]) -> float | None:
    """The largest error over all calls; None if there is nothing to compare."""
    if len(old) != len(new):
        return float("inf")
    errors = [error_of(a, b) for a, b in zip(old, new, strict=True)]
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
