"""Frozen convolutions that read one another's outputs, run as one call of the native library.

That call finds out which of them to compute together without the images in between, and needs no
Python from one to the next (csrc/torch/conv_chain.h). What belongs to it is looked up every time,
so members may be exchanged, unfrozen or given hooks whenever anybody likes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from fmkernels import nn as fnn
from fmkernels._replace.fused import FusedAway, FusedBatchNorm2d, summand
from fmkernels.ops.conv import quick

_CONVS = (fnn.Conv2d, fnn.ConvBlock2d)
_IDENTITIES = (FusedAway, FusedBatchNorm2d, nn.Identity)

NOTHING = -1  # in place of a value: no residual
GIVEN = -2  # the residual that the module itself is given


class Call(NamedTuple):
    """A call in a program.

    Attributes:
        layer: the module, or its name.
        input: the value it is called with: 0 is what the program is given, i the result of its
            i-th call.
        residual: the value given besides, NOTHING or GIVEN.
    """

    layer: Any
    input: int
    residual: int


def of_graph(graph: fx.Graph) -> tuple[Call, ...] | None:
    """The calls that a forward consists of, by name, or None if it does anything else.

    The last call gives the result. GIVEN is a second parameter.
    """
    values: dict[fx.Node, int] = {}
    calls: list[Call] = []
    for node in graph.nodes:
        read = [values.get(arg) if isinstance(arg, fx.Node) else None for arg in node.args]
        if node.op == "placeholder":
            if len(values) > 1 or node.target[0] == "*" or (values and node.args != (None,)):
                return None
            values[node] = GIVEN if values else 0
        elif node.kwargs or None in read:
            return None
        elif node.op == "call_module" and len(read) in (1, 2) and read[0] != GIVEN:
            calls.append(Call(node.target, read[0], read[1] if len(read) > 1 else NOTHING))
            values[node] = len(calls)
        elif node.op == "call_function" and node.target is summand:
            values[node] = read[0]
        elif node.op != "output" or not calls or read != [len(calls)]:
            return None
    return tuple(calls)


def may_record() -> bool:
    """Whether calls of modules may be left out."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )


def record(module: nn.Module, input: int, residual: int, program: list[Call]) -> int | None:
    """Add what a call of ``module`` comes to; returns the value of its result.

    None if it comes to more than convolutions; the program may have grown all the same.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    if isinstance(module, _CONVS):
        program.append(Call(module, input, residual))
        return len(program)
    kind = type(module)
    if kind in _IDENTITIES:
        return input if residual == NOTHING else None
    forward = getattr(kind, "_fmkernels_forward", None)
    if forward is not None:
        return forward.record(module, input, residual, program)
    if kind.forward is nn.Sequential.forward and residual == NOTHING:
        return record_members(module, None, input, NOTHING, program)
    return None


def record_members(
    sequential: nn.Sequential,
    member: str | None,
    input: int,
    residual: int,
    program: list[Call],
) -> int | None:
    """The same of a Sequential that hands the residual on to ``member``."""
    for name, layer in sequential._modules.items():
        input = record(layer, input, residual if name == member else NOTHING, program)
        if input is None:
            return None
    return input


def record_calls(
    module: nn.Module,
    calls: Sequence[Call],
    input: int,
    residual: int,
    program: list[Call],
) -> int | None:
    """The same of a forward that consists of ``calls``."""
    values, given = [input], residual
    for name, source, added in calls:
        layer = module._modules.get(name) if "." not in name else module.get_submodule(name)
        if layer is None:
            return None
        other = given if added == GIVEN else added if added == NOTHING else values[added]
        value = record(layer, values[source], other, program)
        if value is None:
            return None
        values.append(value)
    return values[-1]


def run(program: Sequence[Call], input: Any, residual: Any) -> Any:
    """The last call's result; ``residual`` is the tensor that stands for GIVEN there."""
    if len(program) > 1 and isinstance(input, Tensor):
        layers = []
        for layer, _, added in program:
            frozen = layer.frozen_layer(added != NOTHING)
            if frozen is None:
                break
            layers.append(frozen)
        else:
            # Besides values, the op takes a residual for the last call alone.
            if all([call.residual != GIVEN for call in program[:-1]]):
                reads = tuple([(source, max(added, NOTHING)) for _, source, added in program])
                output = quick.chain(input, layers, reads, residual)
                if output is not None:
                    return output
    left = Counter(value for call in program for value in call[1:])
    values = {0: input, GIVEN: residual}
    for layer, source, added in program:
        read = (values[source],) if added == NOTHING else (values[source], values[added])
        values[len(values) - 1] = layer(*read)
        for value in {source, added}:
            left[value] -= 1
            if left[value] == 0 and value >= 0:
                values[value] = None  # not kept until the end
    return values[len(program)]
