"""A forward without the calls that a fused layer now makes, for one module.

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
from types import ModuleType
from typing import Any

from torch import fx, nn

from fmkernels._replace.trace import Trace

_MISSING = object()


class Forward:
    """The forwards of a module in training and in evaluation, and what they take for granted.

    Args:
        sources: Python source of both, as torch.fx writes it.
        names: the global names that the sources use.
        reads: ``((path, attribute), value)`` of the plain attributes the traces read.
    """

    def __init__(
        self,
        sources: tuple[str, str],
        names: dict[str, Any],
        reads: tuple[tuple[tuple[str, str], Any], ...],
    ) -> None:
        self.sources = sources
        self.names = names
        self.reads = reads
        self._functions = tuple(_compile(source, names) for source in sources)

    @classmethod
    def of(cls, traces: list[Trace], removed: list[set[fx.Node]]) -> Forward:
        """From the traces in training and in evaluation, less the nodes to remove from each."""
        sources, names, reads = [], {}, {}
        for traced, nodes in zip(traces, removed, strict=True):
            for node in nodes:
                node.replace_all_uses_with(node.args[0])
                traced.graph.erase_node(node)
            code = traced.graph.python_code("self")
            sources.append(code.src)
            names.update(code.globals)
            reads.update(traced.reads)
        # The flag of the module itself chooses between the two forwards.
        reads.pop(("", "training"), None)
        return cls(tuple(sources), names, tuple(reads.items()))

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for (path, name), value in self.reads:
            owner = module.get_submodule(path)
            current = vars(owner).get(name, _MISSING)
            if current is not value and current != value:
                where = f"{path}.{name}" if path else name
                raise RuntimeError(
                    f"{type(module).__name__}.{where} was {value!r} when fmkernels.replace fused "
                    "this module's layers, and has changed since: undo the replacement, and "
                    "replace again with the new value"
                )
        return self._functions[0 if module.training else 1](module, *args, **kwargs)

    def install(self, module: nn.Module) -> None:
        """Give ``module`` this forward; :func:`uninstall` gives the original back."""
        module.__class__ = _class_with(type(module), self)

    def __deepcopy__(self, memo: dict) -> Forward:
        return self

    def __reduce__(self) -> tuple:
        names = {
            name: _Imported(value.__name__) if isinstance(value, ModuleType) else value
            for name, value in self.names.items()
        }
        return _load, (self.sources, names, self.reads)


def uninstall(module: nn.Module) -> None:
    """Undo :meth:`Forward.install`."""
    module.__class__ = type(module)._fmkernels_original


def obstacle_of(module: nn.Module) -> str | None:
    """Why this module's class cannot be given another forward, or None."""
    if isinstance(module, fx.GraphModule):
        return "it is a torch.fx.GraphModule, whose class is its own"
    return None


class _Imported:
    """Stands for a Python module inside a pickle."""

    def __init__(self, name: str) -> None:
        self.name = name


def _load(sources: tuple[str, str], names: dict[str, Any], reads: tuple) -> Forward:
    names = {
        name: importlib.import_module(value.name) if isinstance(value, _Imported) else value
        for name, value in names.items()
    }
    return Forward(sources, names, reads)


def _compile(source: str, names: dict[str, Any]) -> Callable:
    file_name = f"<fmkernels fused forward {len(linecache.cache)}>"
    # So that tracebacks and torch.compile's messages can quote the line.
    linecache.cache[file_name] = (len(source), None, source.splitlines(keepends=True), file_name)
    scope = dict(names)
    exec(compile(source, file_name, "exec"), scope)
    return scope["forward"]


def _class_with(original: type, forward: Forward) -> type:
    """A subclass of ``original`` with its name and ``forward``; can be copied and pickled."""

    @functools.wraps(original.forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple | str:
        reduced = original.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:
            return _new, (original, forward), *reduced[2:]
        return reduced

    return type(original)(
        original.__name__,
        (original,),
        {
            "forward": call,
            "__reduce_ex__": reduce,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_fmkernels_original": original,
        },
    )


def _new(original: type, forward: Forward) -> nn.Module:
    kind = _class_with(original, forward)
    return kind.__new__(kind)
