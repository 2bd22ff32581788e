"""Frozen convolutions that read one another's outputs, run as one call of the native library.

That call finds out which of them to compute together without the images in between, and needs no
Python from one to the next (csrc/torch/conv_chain.cpp). What belongs to it is recorded by the
first forward and, whenever anything that this depends on has changed, by the next one: members may
be exchanged, unfrozen, trained or given hooks at any time.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from fmkernels import nn as fnn
from fmkernels._replace.fused import FusedAway, FusedBatchNorm2d, FusedConv2d, summand
from fmkernels.nn.conv import CONV_ATTRIBUTES, LAYER_ATTRIBUTES
from fmkernels.ops.conv import quick

# Not by class: a subclass may do more.
_CONV_FORWARDS = (fnn.Conv2d.forward, fnn.ConvBlock2d.forward, FusedConv2d.forward)
_IDENTITIES = (FusedAway, FusedBatchNorm2d, nn.Identity)

# Where a module holds what was recorded of it; copies and pickles do without.
RECORDED = "_fmkernels_recorded"

R = TypeVar("R")

_version, _training = operator.attrgetter("_version"), operator.attrgetter("training")

# The number that the next hook to be registered gets.
_registrations = functools.partial(getattr, RemovableHandle, "next_id", None)

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


def forward_function(module: nn.Module) -> Any:
    """What its class has for a forward; None for TorchScript's classes, which raise instead."""
    return getattr(type(module), "forward", None)


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
        or torch.jit.is_tracing()
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )


def record(
    module: nn.Module, input: int, residual: int, program: list[Call], watch: Watch
) -> int | None:
    """Add what a call of ``module`` comes to; returns the value of its result.

    None if it comes to more than convolutions; the program may have grown all the same. ``watch``
    gets to know all that this depends on.
    """
    kind = type(module)
    function = forward_function(module)
    is_conv = function in _CONV_FORWARDS and module._dims == 2
    if is_conv:
        watch.add_layer(module)
    else:
        watch.add(module)
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    if is_conv:
        program.append(Call(module, input, residual))
        return len(program)
    if kind in _IDENTITIES:
        return input if residual == NOTHING else None
    forward = getattr(kind, "_fmkernels_forward", None)
    if forward is not None:
        return forward.record(module, input, residual, program, watch)
    if function is nn.Sequential.forward and residual == NOTHING:
        return record_members(module, None, input, NOTHING, program, watch)
    return None


def record_members(
    sequential: nn.Sequential,
    member: str | None,
    input: int,
    residual: int,
    program: list[Call],
    watch: Watch,
) -> int | None:
    """The same of a Sequential that hands the residual on to ``member``."""
    for name, layer in sequential._modules.items():
        input = record(layer, input, residual if name == member else NOTHING, program, watch)
        if input is None:
            return None
    return input


def record_calls(
    module: nn.Module,
    calls: Sequence[Call],
    input: int,
    residual: int,
    program: list[Call],
    watch: Watch,
) -> int | None:
    """The same of a forward that consists of ``calls``."""
    values, given = [input], residual
    for name, source, added in calls:
        layer = module._modules.get(name) if "." not in name else module.get_submodule(name)
        if layer is None:
            return None
        other = given if added == GIVEN else added if added == NOTHING else values[added]
        value = record(layer, values[source], other, program, watch)
        if value is None:
            return None
        values.append(value)
    return values[-1]


class Program:
    """Calls that were recorded, with the first value at hand."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._chain = self._frozen_chain() if len(calls) > 1 else None

    def __call__(self, input: Any, residual: Any) -> Any:
        """The last call's result; ``residual`` is the tensor that stands for GIVEN."""
        if self._chain is not None and isinstance(input, Tensor):
            output = self._chain(input, residual)
            if output is not None:
                return output
        left = Counter(value for call in self._calls for value in call[1:])
        values = {0: input, GIVEN: residual}
        for layer, source, added in self._calls:
            read = (values[source],) if added == NOTHING else (values[source], values[added])
            values[len(values) - 1] = layer(*read)
            for value in {source, added}:
                left[value] -= 1
                if left[value] == 0 and value >= 0:
                    values[value] = None  # not kept until the end
        return values[len(self._calls)]

    @property
    def is_one_call(self) -> bool:
        return self._chain is not None

    def _frozen_chain(self) -> quick.Chain | None:
        # Besides values, the op takes a residual for the last call alone.
        if any([call.residual == GIVEN for call in self._calls[:-1]]):
            return None
        layers = []
        for layer, _, added in self._calls:
            frozen = layer.frozen_layer(added != NOTHING)
            if frozen is None:
                return None
            layers.append(frozen)
        reads = [(source, max(added, NOTHING)) for _, source, added in self._calls]
        return quick.Chain(layers, tuple(reads))


class _Entries:
    """Entries of dictionaries, and what they held."""

    def __init__(self) -> None:
        self._tables: list[dict] = []
        self._names: list[str] = []
        self.values: list[Any] = []

    def add(self, table: dict, name: str, value: Any) -> None:
        self._tables.append(table)
        self._names.append(name)
        self.values.append(value)

    def now(self) -> Iterator[Any]:
        """What they hold; None for those that are gone."""
        return map(dict.get, self._tables, self._names)


class Watch:
    """Whether all that a recording relies on is as it was: modules, hooks, weights, options.

    A network's recording relies on hundreds of entries of its modules' dictionaries, and every
    call asks for all of them: side by side in lists, so that the interpreter's own functions pass
    over them. They lie all over memory, and each that is left out counts.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._known: set[int] = set()
        self._kinds: list[type] = []
        self._training: list[bool] = []
        self._members: list[tuple[dict, list[str]]] = []
        self._scripted: list[tuple[nn.Module, list]] = []
        self._hooks: list[dict] = []
        self._hook_tables = _Entries()
        self._registrations = _registrations()
        self._tables: list[dict] = []
        self._sizes: list[int] = []
        self._contents: list[Any] = []  # of the tables, one after the other: the very objects
        self._same = _Entries()  # the very objects
        self._equal = _Entries()
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._pointers: list[int] = []
        self._usable = True

    def __bool__(self) -> bool:
        """Whether nothing has changed."""
        return (
            self._usable
            and self._has_no_hooks()
            and all(map(operator.is_, map(type, self._modules), self._kinds))
            and list(map(_training, self._modules)) == self._training
            and all(map(operator.is_, self._same.now(), self._same.values))
            and list(map(len, self._tables)) == self._sizes
            and all(map(operator.is_, self._contents_now(), self._contents))
            and all([list(table) == names for table, names in self._members])
            and all([list(m._modules.items()) == members for m, members in self._scripted])
            and list(self._equal.now()) == self._equal.values
            and list(map(_version, self._tensors)) == self._versions
            and list(map(Tensor.data_ptr, self._tensors)) == self._pointers
        )

    def _has_no_hooks(self) -> bool:
        # Looked up anew only when a hook has been registered, whichever module's.
        registrations = _registrations()
        if registrations != self._registrations or registrations is None:
            if any(self._hooks) or not all(
                map(operator.is_, self._hook_tables.now(), self._hook_tables.values)
            ):
                return False
            self._registrations = registrations
        return True

    def _contents_now(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self._tables))

    def _add_table(self, table: dict) -> None:
        self._tables.append(table)
        self._sizes.append(len(table))
        self._contents += table.values()

    def add(self, module: nn.Module) -> None:
        """A module that was looked into."""
        if id(module) in self._known:
            return
        self._known.add(id(module))
        self._modules.append(module)
        self._kinds.append(type(module))
        self._training.append(module.training)
        table, members = vars(module), module._modules
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            self._hook_tables.add(table, name, table.get(name))
        self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        self._usable &= not any(self._hooks[-2:])
        self._same.add(table, "forward", None)
        if not isinstance(members, dict):
            self._scripted.append((module, list(members.items())))
        elif members:
            self._same.add(table, "_modules", members)
            self._members.append((members, list(members)))
            self._add_table(members)

    def add_reads(self, module: nn.Module, reads: Sequence[tuple[tuple[str, str], Any]]) -> None:
        """Attributes that a forward read."""
        for (path, name), value in reads:
            self._equal.add(vars(module.get_submodule(path)), name, value)

    def add_layer(self, layer: nn.Module) -> None:
        """A convolution, its norm, and what was packed."""
        block = isinstance(layer, fnn.ConvBlock2d)
        conv, norm = (layer.conv, layer.norm) if block else (layer, None)
        self.add(layer)
        for module in (conv, norm):
            if module is not None and module is not layer:
                self.add(module)
        for holder, names in (
            (layer, (*LAYER_ATTRIBUTES, "_frozen_sources")),
            (conv, CONV_ATTRIBUTES),
        ):
            for name in names:
                self._equal.add(vars(holder), name, vars(holder)[name])
        tables = [conv._parameters, layer._buffers]
        tables += [] if norm is None else [norm._parameters, norm._buffers]
        self._usable &= not layer._checks_each_call and "weight" in conv._parameters
        for table in tables:
            self._add_table(table)
            # Inference tensors have no version.
            self._usable &= not any([t is not None and t.is_inference() for t in table.values()])
        if self._usable:
            # The others are read by the call, whatever they hold by then.
            sources = layer._packing_sources()
            self._tensors += sources
            self._versions += map(_version, sources)
            self._pointers += map(Tensor.data_ptr, sources)


def kept(module: nn.Module, given: bool, record_now: Callable[[Watch], R]) -> R:
    """What ``record_now`` found of ``module``, for as long as what it watches stays as it is.

    Args:
        given: whether the module is given a residual; the two are recorded apart.
    """
    found = module.__dict__.get(RECORDED, {}).get(given)
    if found is not None and found[1]:
        return found[0]
    watch = Watch()
    watch.add(module)
    result = record_now(watch)
    if watch:
        module.__dict__.setdefault(RECORDED, {})[given] = result, watch
    return result
