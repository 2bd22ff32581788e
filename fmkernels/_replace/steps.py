"""What may follow a convolution or a linear layer inside one fused layer.

Recognises the sums, activations and poolings that the kernels can apply, as modules and as
function or method calls. Anything with other parameters than the kernels implement is not
recognised, and so stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fmkernels._replace import hub
from fmkernels.functional.conv import Pool
from fmkernels.ops import _activations
from fmkernels.ops.conv.backends import FUSED_POOL_WINDOWS

NORM, RESIDUAL, ACTIVATION, POOL = "norm", "residual", "activation", "pool"

# The sums that residual steps stand for: the value of the step -> the sum of the layer's output
# and the residual.
SUMS: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "add_": operator.iadd}

# Max-pooling and these commute exactly: forward, gradient and NaN. (The other activations round
# different inputs to equal outputs, and then pooling after them picks another maximum.)
COMMUTES_WITH_MAX_POOL = ("relu", "relu6")


@dataclass(frozen=True)
class Step:
    """One member of a chain after its head.

    Attributes:
        kind: ``"norm"``, ``"residual"``, ``"activation"`` or ``"pool"``.
        value: None, a key of SUMS, the activation's name, or the pool as in
            fmkernels.functional.conv2d.
        name: class or function name, for the report.
        apply: the step as PyTorch computes it, for measuring; a residual's takes two tensors.
    """

    kind: str
    value: Any
    name: str
    apply: Callable[..., Tensor]


_ACTIVATION_MODULES: dict[type, Callable[[Any], str | None]] = {
    nn.ReLU: lambda m: "relu",
    nn.ReLU6: lambda m: "relu6",
    nn.Hardtanh: lambda m: "relu6" if (m.min_val, m.max_val) == (0, 6) else None,
    nn.LeakyReLU: lambda m: "leaky_relu" if m.negative_slope == 0.01 else None,
    nn.ELU: lambda m: "elu" if m.alpha == 1 else None,
    nn.GELU: lambda m: {"none": "gelu", "tanh": "gelu_tanh"}.get(m.approximate),
    nn.SiLU: lambda m: "silu",
    nn.Sigmoid: lambda m: "sigmoid",
    nn.Tanh: lambda m: "tanh",
    nn.Hardswish: lambda m: "hardswish",
    nn.Hardsigmoid: lambda m: "hardsigmoid",
    nn.Mish: lambda m: "mish",
}

# Names of the arguments after the input, and the activation for their values.
_ACTIVATION_CALLS: dict[str, tuple[tuple[str, ...], Callable[[dict], str | None]]] = {
    "relu": (("inplace",), lambda a: "relu"),
    "relu6": (("inplace",), lambda a: "relu6"),
    "leaky_relu": (
        ("negative_slope", "inplace"),
        lambda a: "leaky_relu" if a.get("negative_slope", 0.01) == 0.01 else None,
    ),
    "elu": (("alpha", "inplace"), lambda a: "elu" if a.get("alpha", 1.0) == 1 else None),
    "gelu": (
        ("approximate",),
        lambda a: {"none": "gelu", "tanh": "gelu_tanh"}.get(a.get("approximate", "none")),
    ),
    "silu": (("inplace",), lambda a: "silu"),
    "sigmoid": ((), lambda a: "sigmoid"),
    "tanh": ((), lambda a: "tanh"),
    "hardswish": (("inplace",), lambda a: "hardswish"),
    "hardsigmoid": (("inplace",), lambda a: "hardsigmoid"),
    "mish": (("inplace",), lambda a: "mish"),
}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, name): name for name in _ACTIVATION_CALLS},
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu_: "relu",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
}
_ACTIVATION_METHODS = {
    name + suffix: name for name in ("relu", "sigmoid", "tanh") for suffix in ("", "_")
}

_POOL_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE_ARGUMENTS = (
    "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
)  # fmt: skip


def step_of_module(module: nn.Module) -> Step | None:
    """The step that ``module`` is, or None. Subclasses are not recognised: they may do more."""
    kind = type(module)
    if kind is nn.BatchNorm2d:
        return Step(NORM, None, kind.__name__, module)
    of_torch = kind in _ACTIVATION_MODULES
    if of_torch or kind.__module__ == "transformers.activations":
        name = _ACTIVATION_MODULES[kind](module) if of_torch else hub.activation_of(module)
        return None if name is None else Step(ACTIVATION, name, kind.__name__, module)
    if kind in _POOL_MODULES:
        names, pool_of = _POOL_MODULES[kind]
        pool = pool_of({name: getattr(module, name) for name in names})
        return None if pool is None else Step(POOL, pool, kind.__name__, module)
    return None


def step_of_call(node: fx.Node) -> Step | None:
    """The step that a function or method call of a traced graph is, or None."""
    if node.op == "call_function" and node.target in _POOL_FUNCTIONS:
        function, names, pool_of = _POOL_FUNCTIONS[node.target]
        arguments = _arguments(node, names)
        pool = None if arguments is None else pool_of(arguments)
        if pool is None:
            return None
        return Step(POOL, pool, function.__name__, lambda x: function(x, *pool[1:]))
    name = None
    if node.op == "call_function":
        name = _ACTIVATION_FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        name = _ACTIVATION_METHODS.get(node.target)
    if name is None:
        return None
    names, activation_of = _ACTIVATION_CALLS[name]
    arguments = _arguments(node, names)
    activation = None if arguments is None else activation_of(arguments)
    if activation is None:
        return None
    return Step(ACTIVATION, activation, name, _activations.FORWARD[activation])


@dataclass(frozen=True)
class Sum:
    """A call that adds two values of a traced graph.

    Attributes:
        operands: the two nodes.
        in_place: whether it writes into the first operand.
    """

    operands: tuple[fx.Node, fx.Node]
    in_place: bool

    def step(self) -> Step:
        value = "add_" if self.in_place else "add"
        return Step(RESIDUAL, value, "add", SUMS[value])


def sum_of_call(node: fx.Node) -> Sum | None:
    """The sum that a call of a traced graph is, or None."""
    of_function = node.op == "call_function" and node.target in _SUM_FUNCTIONS
    if not of_function and not (node.op == "call_method" and node.target in SUMS):
        return None
    if not 1 <= len(node.args) <= 2 or not set(node.kwargs) <= {"other", "alpha"}:
        return None
    operands = (*node.args, node.kwargs.get("other"))[:2]
    if node.kwargs.get("alpha", 1) != 1 or operands[0] is operands[1]:
        return None
    if not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    return Sum(operands, node.target in (operator.iadd, "add_"))


def append(steps: list[Step], step: Step) -> list[Step] | None:
    """``steps`` with ``step``, if the kernels can apply them in one go; else None."""
    kinds = [other.kind for other in steps]
    if step.kind in kinds:
        return None
    if step.kind == NORM:
        return [step] if not steps else None
    if step.kind == RESIDUAL and set(kinds) - {NORM}:
        return None
    if step.kind == ACTIVATION and POOL in kinds:
        commutes = value_of(steps, POOL)[0] == "max" and step.value in COMMUTES_WITH_MAX_POOL
        if not commutes:
            return None
    return [*steps, step]


def value_of(steps: list[Step], kind: str) -> Any:
    """The value of the step of this kind, or None."""
    return next((step.value for step in steps if step.kind == kind), None)


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The call's arguments after its input, by name; None if one is computed or unknown."""
    positional = node.args[1:]
    if len(node.args) == 0 or len(positional) > len(names):
        return None
    arguments = {**dict(zip(names, positional, strict=False)), **node.kwargs}
    known = set(arguments) <= set(names)
    constant = all(_is_constant(value) for value in arguments.values())
    return arguments if known and constant else None


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_constant(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _max_pool(arguments: dict[str, Any]) -> Pool | None:
    """The pool that conv2d fuses for these arguments of max-pooling, or None."""
    kernel_size = _pair(arguments.get("kernel_size"))
    if kernel_size not in FUSED_POOL_WINDOWS:
        return None
    if arguments.get("ceil_mode") or arguments.get("return_indices"):
        return None
    if _pair(arguments.get("dilation", 1)) != (1, 1):
        return None
    stride = arguments.get("stride")
    stride = kernel_size if stride is None or stride == [] else _pair(stride)
    padding = _pair(arguments.get("padding", 0))
    return None if stride is None or padding is None else ("max", kernel_size, stride, padding)


def _average_pool(arguments: dict[str, Any]) -> Pool | None:
    """The same for average-pooling, whose sums the kernels divide by the window's area."""
    if arguments.get("divisor_override") is not None:
        return None
    shared = ("kernel_size", "stride", "padding", "ceil_mode")
    pool = _max_pool({name: arguments[name] for name in shared if name in arguments})
    if pool is None or (pool[3] != (0, 0) and not arguments.get("count_include_pad", True)):
        return None
    return ("avg", *pool[1:])


_POOL_MODULES: dict[type, tuple[tuple[str, ...], Callable[[dict], Pool | None]]] = {
    nn.MaxPool2d: (_POOL_ARGUMENTS, _max_pool),
    nn.AvgPool2d: (_AVERAGE_ARGUMENTS, _average_pool),
}
_SUM_FUNCTIONS = (operator.add, operator.iadd, torch.add)
POOLS: dict[str, Callable[..., Tensor]] = {"max": F.max_pool2d, "avg": F.avg_pool2d}
_POOL_FUNCTIONS: dict[Any, tuple[Callable, tuple[str, ...], Callable[[dict], Pool | None]]] = {
    F.max_pool2d: (F.max_pool2d, _POOL_ARGUMENTS, _max_pool),
    torch.max_pool2d: (F.max_pool2d, _POOL_ARGUMENTS, _max_pool),
    F.avg_pool2d: (F.avg_pool2d, _AVERAGE_ARGUMENTS, _average_pool),
}


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, tuple | list) and len(value) in (1, 2):
        pair = tuple(value) * (3 - len(value))
        return pair if all(isinstance(item, int) for item in pair) else None
    return None
