"""A forward without the calls that a fused layer now makes, for one module.

Where a sum is fused into the layer, the layer's call moves to the sum's place and takes the other
operand; the modules around the layer, as far as there are any in between, hand it on.

The module keeps its children, parameters and flags, and is still an instance of its class; only
``forward`` is another function, made from two traces (training and evaluation). Whatever those
froze is compared on every call, so that a change raises instead of being ignored.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import fx, nn

from fmkernels._replace import programs
from fmkernels._replace.fused import summand
from fmkernels._replace.programs import RECORDED, Call, Program, Watch
from fmkernels._replace.sequential import SequentialForward
from fmkernels._replace.trace import Trace

_MISSING = object()


@dataclass
class Edit:
    """What is to change in one trace.

    Attributes:
        removed: calls that a fused layer makes now -> the nodes that stand for their results, in
            the order of the calls.
        sums: those among them that became part of a layer's call.
        given: the call that is to take the residual that the module itself is given, or None.
    """

    removed: dict[fx.Node, fx.Node] = field(default_factory=dict)
    sums: list[FusedSum] = field(default_factory=list)
    given: fx.Node | None = None

    def apply(self, graph: fx.Graph) -> None:
        for fused in self.sums:
            for node in fused.moved:
                fused.node.prepend(node)
            with graph.inserting_before(fused.moved[0]):
                residual = graph.call_function(summand, (fused.residual,))
            fused.moved[0].insert_arg(1, residual)
        # From the last to the first, as the results of one may be what another one reads.
        for node, result in reversed(self.removed.items()):
            node.replace_all_uses_with(result)
            graph.erase_node(node)
        if self.given is not None:
            parameters = [node for node in graph.nodes if node.op == "placeholder"]
            name = "residual"
            while any(node.target == name for node in parameters):
                name += "_"
            with graph.inserting_after(parameters[-1]):
                self.given.insert_arg(1, graph.placeholder(name, default_value=None))


@dataclass
class FusedSum:
    """A sum that a layer makes now.

    Attributes:
        node: the sum.
        residual: what it added.
        moved: the layer's call, or that of a module around it, and the calls from there to the
            sum; they take place where the sum was.
    """

    node: fx.Node
    residual: fx.Node
    moved: list[fx.Node]


# ((path, attribute), value) of plain attributes that a trace read.
Reads = tuple[tuple[tuple[str, str], Any], ...]


@dataclass(frozen=True)
class OwnForward:
    """Of a module whose forward stays its own: what calls it consists of in evaluation.

    Attributes:
        program: the calls.
        reads: what that relies on.
    """

    program: tuple[Call, ...]
    reads: Reads

    @classmethod
    def of(cls, traces: list[Trace]) -> OwnForward | None:
        """From the traces in training and in evaluation; None if it does more than calls."""
        program = _program_of(traces)
        if program is None or any(traced.obstacles for traced in traces):
            return None
        reads = [read for read in traces[1].reads.items() if read[0] != ("", "training")]
        return cls(program, tuple(reads))

    def record(
        self, module: nn.Module, input: int, residual: int, program: list[Call], watch: Watch
    ) -> int | None:
        """See :func:`programs.record`."""
        if module.training or residual != programs.NOTHING or changed(module, self.reads):
            return None
        watch.add_reads(module, self.reads)
        return programs.record_calls(module, self.program, input, residual, program, watch)


class Forward:
    """The forwards of a module in training and in evaluation, and what they take for granted.

    Args:
        sources: Python source of both, as torch.fx writes it.
        names: the global names that the sources use.
        reads: what they rely on.
        program: the calls that the forward in evaluation consists of, if it does nothing else.
    """

    def __init__(
        self,
        sources: tuple[str, str],
        names: dict[str, Any],
        reads: Reads,
        program: tuple[Call, ...] | None,
    ) -> None:
        self.sources = sources
        self.names = names
        self.reads = reads
        self.program = program
        # With what the forward may be called to be run as a program.
        takes = any([call.residual == programs.GIVEN for call in program or ()])
        self._arities = (1, 2) if takes else (1,)
        self._functions = tuple(_compile(source, names) for source in sources)

    @classmethod
    def of(cls, traces: list[Trace], edits: list[Edit]) -> Forward:
        """From the traces in training and in evaluation, and what is to change in each."""
        sources, names, reads = [], {}, {}
        for traced, edit in zip(traces, edits, strict=True):
            edit.apply(traced.graph)
            code = traced.graph.python_code("self")
            sources.append(code.src)
            names.update(code.globals)
            reads.update(traced.reads)
        # The flag of the module itself chooses between the two forwards.
        reads.pop(("", "training"), None)
        return cls(tuple(sources), names, tuple(reads.items()), _program_of(traces))

    def record(
        self, module: nn.Module, input: int, residual: int, program: list[Call], watch: Watch
    ) -> int | None:
        """See :func:`programs.record`."""
        if self.program is None or module.training or changed(module, self.reads):
            return None
        if residual != programs.NOTHING and 2 not in self._arities:
            return None
        watch.add_reads(module, self.reads)
        return programs.record_calls(module, self.program, input, residual, program, watch)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.program is not None and not kwargs and len(args) in self._arities:
            program = self._recorded(module, len(args) == 2 and args[1] is not None)
            if program is not None:
                return program(*args, *(None,) * (2 - len(args)))
        read = changed(module, self.reads)
        if read is not None:
            (path, name), value = read
            where = f"{path}.{name}" if path else name
            raise RuntimeError(
                f"{type(module).__name__}.{where} was {value!r} when fmkernels.replace fused "
                "this module's layers, and has changed since: undo the replacement, and "
                "replace again with the new value"
            )
        return self._functions[0 if module.training else 1](module, *args, **kwargs)

    def _recorded(self, module: nn.Module, given: bool) -> Program | None:
        """The forward as one call; None if it is more than that."""
        if module.training or not programs.may_record():
            return None

        def record_now(watch: Watch) -> Program | None:
            calls: list[Call] = []
            residual = programs.GIVEN if given else programs.NOTHING
            value = self.record(module, 0, residual, calls, watch)
            if len(calls) < 2 or value != len(calls):
                return None
            program = Program(calls)
            return program if program.is_one_call else None

        return programs.kept(module, given, record_now)

    def __deepcopy__(self, memo: dict) -> Forward:
        return self

    def __reduce__(self) -> tuple:
        names = {
            name: _Imported(value.__name__) if isinstance(value, ModuleType) else value
            for name, value in self.names.items()
        }
        return _load, (self.sources, names, self.reads, self.program)


AnyForward = Forward | OwnForward | SequentialForward


def changed(module: nn.Module, reads: Reads) -> tuple[tuple[str, str], Any] | None:
    """The first of the attributes that no longer has its value."""
    for read in reads:
        (path, name), value = read
        current = vars(module.get_submodule(path)).get(name, _MISSING)
        if current is not value and current != value:
            return read
    return None


def _program_of(traces: list[Trace]) -> tuple[Call, ...] | None:
    # With more traces there are optional arguments, of which a program knows nothing.
    return programs.of_graph(traces[1].graph) if len(traces) == 2 else None


def install(module: nn.Module, forward: AnyForward) -> None:
    """Give ``module`` this forward; :func:`uninstall` gives the original back."""
    module.__class__ = _class_with(type(module), forward)


def uninstall(module: nn.Module) -> None:
    """Undo :func:`install`."""
    module.__class__ = type(module)._fmkernels_original
    vars(module).pop(RECORDED, None)


def obstacle_of(module: nn.Module) -> str | None:
    """Why this module's class cannot be given another forward, or None."""
    if isinstance(module, fx.GraphModule):
        return "it is a torch.fx.GraphModule, whose class is its own"
    return None


class _Imported:
    """Stands for a Python module inside a pickle."""

    def __init__(self, name: str) -> None:
        self.name = name


def _load(
    sources: tuple[str, str],
    names: dict[str, Any],
    reads: Reads,
    program: tuple[Call, ...] | None,
) -> Forward:
    names = {
        name: importlib.import_module(value.name) if isinstance(value, _Imported) else value
        for name, value in names.items()
    }
    return Forward(sources, names, reads, program)


def _compile(source: str, names: dict[str, Any]) -> Callable:
    file_name = f"<fmkernels fused forward {len(linecache.cache)}>"
    # So that tracebacks and torch.compile's messages can quote the line.
    linecache.cache[file_name] = (len(source), None, source.splitlines(keepends=True), file_name)
    scope = dict(names)
    exec(compile(source, file_name, "exec"), scope)
    return scope["forward"]


def _class_with(original: type, forward: AnyForward) -> type:
    """A subclass of ``original`` with its name and ``forward``; can be copied and pickled."""

    @functools.wraps(original.forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple | str:
        reduced = original.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:
            state = reduced[2]
            if isinstance(state, dict):
                state = {name: value for name, value in state.items() if name != RECORDED}
            return _new, (original, forward), state, *reduced[3:]
        return reduced

    members = {
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_fmkernels_original": original,
        "_fmkernels_forward": forward,
    }
    if not isinstance(forward, OwnForward):
        members["forward"] = call
    return type(original)(original.__name__, (original,), members)


def _new(original: type, forward: AnyForward) -> nn.Module:
    kind = _class_with(original, forward)
    return kind.__new__(kind)
