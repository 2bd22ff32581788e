"""Traces one module's own forward, children as single calls, and notes what a trace hides.

torch.fx runs the forward once with stand-ins for tensors. Anything the forward decides in plain
Python is thereby frozen into the graph: attributes it reads, random numbers it draws, the training
flag. :class:`Trace` lists the reasons for which the graph may not stand in for the forward; the
flow of data between child modules can be read from it all the same.
"""

from __future__ import annotations

import inspect
import operator
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import fx, nn

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}


@dataclass
class Trace:
    """The graph of one forward.

    Attributes:
        graph: its ``call_module`` targets are paths relative to the traced module.
        in_forward: nodes made by the forward function itself rather than by a method it calls.
        reads: ``(path, attribute, value)`` of the plain attributes that the forward read.
        has_defaults: whether the forward has optional arguments.
        obstacles: why the graph may not replace the forward; empty if it may.
    """

    graph: fx.Graph
    in_forward: set[fx.Node] = field(default_factory=set)
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    has_defaults: bool = False
    obstacles: list[str] = field(default_factory=list)


class TraceError(Exception):
    """The forward cannot be traced; the message says why.

    Attributes:
        called: the modules that it may have called from outside their container.
    """

    def __init__(self, message: str, called: tuple[nn.Module, ...] = ()) -> None:
        super().__init__(message)
        self.called = called


def trace(module: nn.Module, training: bool, defaults: bool = False) -> Trace:
    """Trace ``module.forward`` with ``module.training`` as given; leaves no mark on the module.

    With ``defaults``, optional arguments have their default values; else they too are stand-ins.

    Raises:
        TraceError: data-dependent control flow, or something else that torch.fx cannot follow.
    """
    if "forward" in vars(module):
        raise TraceError("forward is overridden on the instance")
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        raise TraceError("it contains TorchScript")
    optional = {
        p.name: p.default
        for p in inspect.signature(type(module).forward).parameters.values()
        if p.default is not p.empty
    }
    tracer = _Tracer(module)
    with (
        random_states_restored() as moved,
        _restored(module) as written,
        _recorded_reads(module) as reads,
    ):
        module.training = training
        reads.clear()
        try:
            graph = tracer.trace(module, optional if defaults else None)
        except Exception as error:
            # Anything at all: the user's forward runs on stand-ins.
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TraceError(message, tuple(tracer.outside)) from error
    result = Trace(graph, tracer.in_forward, reads, bool(optional))
    result.obstacles += tracer.obstacles
    result.obstacles += [f"its forward draws from {name}'s random numbers" for name in moved]
    result.obstacles += [f"its forward assigns {name}" for name in written]
    for (path, name), value in reads.items():
        if name == "training" and path:
            result.obstacles.append(f"its forward reads {path}.training")
        elif not _can_guard(value):
            where = f"{path}.{name}" if path else name
            result.obstacles.append(
                f"its forward reads {where} ({type(value).__name__}), which a trace would freeze"
            )
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in parameters | buffers:
            result.obstacles.append("its forward makes a constant tensor")
            break
    if optional:
        result.obstacles.append("its forward has optional arguments")
    return result


class _Proxy(fx.Proxy):
    """Keeps in-place operators in place; fx.Proxy would turn ``x += y`` into ``x = x + y``."""


def _in_place(name: str) -> Any:
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.in_forward: set[fx.Node] = set()
        self.obstacles: list[str] = []
        self.outside: list[nn.Module] = []
        self._members = set(module.modules())
        self._forward_code = _code(type(module).forward)
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m not in self._members:
            # Such as a slice of a Sequential: its layers are called apart from their container.
            self.outside += m.modules()
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if self._made_by_forward():
            self.in_forward.add(node)
        if _modes() != self._modes and not self.obstacles:
            self.obstacles.append("its forward switches gradients or autocast on or off")
        return node

    def _made_by_forward(self) -> bool:
        """Whether the innermost frame that works on the traced module is its forward."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code is self._forward_code:
                return True
            if frame.f_locals.get("self") is self.root:
                return False
            frame = frame.f_back
        return False


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)


def _modes() -> tuple:
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices),
    )


@contextmanager
def random_states_restored() -> Iterator[list[str]]:
    """Puts Python's, NumPy's and torch's generators back; yields whose moved, filled on exit."""
    python, torch_state = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    moved: list[str] = []
    try:
        yield moved
    finally:
        if random.getstate() != python:
            random.setstate(python)
            moved.append("Python")
        if not torch.equal(torch.get_rng_state(), torch_state):
            torch.set_rng_state(torch_state)
            moved.append("torch")
        if numpy is not None and not _same_numpy_state(numpy.random.get_state(), numpy_state):
            numpy.random.set_state(numpy_state)
            moved.append("NumPy")


def _same_numpy_state(a: tuple, b: tuple) -> bool:
    return a[0] == b[0] and (a[1] == b[1]).all() and a[2:] == b[2:]


def _can_guard(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_can_guard(item) for item in value)
    return isinstance(value, (*_PLAIN, FunctionType, BuiltinFunctionType))


@contextmanager
def _restored(module: nn.Module) -> Iterator[list[str]]:
    """Undoes every assignment to attributes in the body; yields the names, filled on exit."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [
        (path, m, dict(vars(m)), {table: dict(vars(m)[table]) for table in tables})
        for path, m in module.named_modules()
    ]
    written: list[str] = []
    try:
        yield written
    finally:
        for path, m, attributes, contents in before:
            prefix = f"{path}." if path else ""
            for name in _changed(attributes, vars(m)):
                # The first is the caller's doing, the second the tracer's.
                if name != "training" and not name.startswith("_tensor_constant"):
                    written.append(prefix + name)
            vars(m).clear()
            vars(m).update(attributes)
            for table, content in contents.items():
                current = vars(m)[table]
                written += [prefix + name for name in _changed(content, current)]
                current.clear()
                current.update(content)


def _changed(before: dict, after: dict) -> list[str]:
    missing = object()
    names = [*before, *(name for name in after if name not in before)]
    return [n for n in names if before.get(n, missing) is not after.get(n, missing)]


@contextmanager
def _recorded_reads(module: nn.Module) -> Iterator[dict[tuple[str, str], Any]]:
    """Notes which plain instance attributes of ``module`` and its children are read in the body.

    Like torch.fx itself, which patches nn.Module while it traces, this is not for use while other
    threads run modules.
    """
    reads: dict[tuple[str, str], Any] = {}
    paths = {m: path for path, m in module.named_modules()}

    def recording(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name not in _MACHINERY and not name.startswith("__"):
            path = paths.get(self)
            if path is not None and name in object.__getattribute__(self, "__dict__"):
                reads[path, name] = value
        return value

    previous = vars(nn.Module).get("__getattribute__")
    nn.Module.__getattribute__ = recording
    try:
        yield reads
    finally:
        if previous is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = previous
