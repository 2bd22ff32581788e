"""Which modules' forwards are looked at, and which layers those call."""

from __future__ import annotations

from torch import nn

from fmkernels._replace import programs, sequential
from fmkernels._replace.catalog import has_call_hooks
from fmkernels._replace.trace import Trace


def contains(scope: str, path: str) -> bool:
    return path.startswith(f"{scope}.") if scope else path != ""


def targets(traces: list[Trace]) -> set[str]:
    return {n.target for t in traces for n in t.graph.nodes if n.op == "call_module"}


def called_by(model: nn.Module, scope: str, path: str) -> bool:
    """Whether the module at ``path`` belongs to ``scope`` itself: only containers lie between."""
    if not contains(scope, path):
        return False
    owner = _owner(path)
    while owner != scope:
        if _has_forward(model.get_submodule(owner)):
            return False
        owner = _owner(owner)
    return True


def is_scope(module: nn.Module) -> bool:
    """Whether chains are looked for in ``module``'s forward; torch's own layers keep theirs."""
    own = type(module).__module__.startswith("torch.nn.")
    return sequential.is_plain(module) or (_has_forward(module) and not own)


def _has_forward(module: nn.Module) -> bool:
    """Whether ``module`` is called, as opposed to merely holding others."""
    return programs.forward_function(module) is not nn.Module.forward


def _owner(path: str) -> str:
    return path.rpartition(".")[0]


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def is_identity(module: nn.Module | None) -> bool:
    plain = type(module) is nn.Identity and "forward" not in vars(module)
    return plain and not has_call_hooks(module)
