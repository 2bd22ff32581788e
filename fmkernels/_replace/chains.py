"""Finds what can run as one layer: convolution or linear, and what follows it inside one forward.

A chain never crosses the border of a module: all its members are called by the same forward, so
what any other module returns does not change. Where the flow of data is read from a trace, each
value inside the chain has a single use, and each member is called once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx, nn

from fmkernels._replace import rewrite, steps
from fmkernels._replace.catalog import has_call_hooks
from fmkernels._replace.steps import Step
from fmkernels._replace.trace import Trace, TraceError, trace


@dataclass
class Chain:
    """A layer and what is fused into it.

    Attributes:
        path: of the head, a convolution or linear layer.
        steps: what follows it, in order.
        members: paths of the modules among the steps, with the module's step.
    """

    path: str
    steps: list[Step] = field(default_factory=list)
    members: dict[str, Step] = field(default_factory=dict)


@dataclass
class Fusion:
    """The plan for a whole model.

    Attributes:
        chains: by path of the head.
        forwards: path of a module -> the forward that leaves out the calls fused elsewhere.
        notes: path of a head -> why it is not fused with what follows.
    """

    chains: dict[str, Chain] = field(default_factory=dict)
    forwards: dict[str, rewrite.Forward] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def plan(model: nn.Module, heads: dict[str, nn.Module]) -> Fusion:
    """Find every chain in ``model``.

    Args:
        model: not changed.
        heads: the convolutions and linear layers that may be replaced, by path.
    """
    fusion = Fusion()
    # Places, not paths: what is inside a module that sits in two places has two paths.
    places = Counter(id(child) for m in model.modules() for child in m._modules.values())
    paths = {id(m): path for path, m in model.named_modules()}
    scopes = [
        (path, m)
        for path, m in model.named_modules()
        if any(_contains(path, head) for head in heads) and _is_scope(m)
    ]
    traces: dict[str, list[Trace]] = {}
    called_from_outside: set[str] = set()
    for path, module in scopes:
        if _is_plain_sequential(module):
            continue
        try:
            traces[path] = _traces(module)
        except TraceError as error:
            called_from_outside |= {paths[id(m)] for m in error.called if id(m) in paths}
            for head in heads:
                if _called_by(model, path, head):
                    where = path or "the model"
                    fusion.notes[head] = f"not fused: torch.fx cannot trace {where}: {error}"
            continue
        for target in _targets(traces[path]):
            if not _called_by(model, path, _join(path, target)):
                called_from_outside.add(_join(path, target))

    def usable(path: str, module: nn.Module) -> bool:
        return (
            places[id(module)] == 1
            and path not in called_from_outside
            and not has_call_hooks(module)
            and "forward" not in vars(module)
        )

    for path, module in scopes:
        if _is_plain_sequential(module):
            found = _chains_of_sequential(path, module, heads, usable)
            fusion.chains.update({chain.path: chain for chain in found})
        elif path in traces:
            _add_traced(fusion, path, module, traces[path], heads, usable)
    return fusion


Usable = Callable[[str, nn.Module], bool]


def _chains_of_sequential(
    path: str, sequential: nn.Sequential, heads: dict[str, nn.Module], usable: Usable
) -> list[Chain]:
    chains: list[Chain] = []
    current: Chain | None = None
    # Not named_children, which leaves out the second place of a module.
    for name, module in sequential._modules.items():
        child = _join(path, name)
        step = steps.step_of_module(module) if usable(child, module) else None
        extended = None if current is None or step is None else _extended(current, step, heads)
        if extended is not None:
            current.steps = extended
            current.members[child] = step
        else:
            current = Chain(child) if child in heads and usable(child, module) else None
            if current is not None:
                chains.append(current)
    return [chain for chain in chains if chain.steps]


def _add_traced(
    fusion: Fusion,
    path: str,
    module: nn.Module,
    traces: list[Trace],
    heads: dict[str, nn.Module],
    usable: Usable,
) -> None:
    """The chains of a traced forward.

    First with functional calls and modules called repeatedly, which a rewritten forward leaves
    out; where the forward cannot be rewritten, the chains that consist of modules called once.
    """
    found = [_chains_of_trace(path, module, t, heads, usable, rewriting=True) for t in traces]
    if any(item.removed for items in found for item in items):
        obstacles = [obstacle for t in traces for obstacle in t.obstacles]
        if not _agree(found):
            obstacles.append("its forward differs between training and evaluation")
        obstacle = rewrite.obstacle_of(module) or next(iter(obstacles), None)
        if obstacle is None:
            removed = [{node for item in items for node in item.removed} for items in found]
            fusion.forwards[path] = rewrite.Forward.of(traces, removed)
        else:
            for item in found[0]:
                if item.removed:
                    where = path or "the model"
                    fusion.notes[item.chain.path] = (
                        f"not fused with {item.first_removed} in {where}: {obstacle}"
                    )
            found = [
                _chains_of_trace(path, module, t, heads, usable, rewriting=False) for t in traces
            ]
    if _agree(found):
        fusion.chains.update({item.chain.path: item.chain for item in found[0]})


@dataclass
class _Found:
    """A chain in one trace, and the calls of it that only a rewritten forward can leave out."""

    chain: Chain
    removed: list[fx.Node] = field(default_factory=list)
    first_removed: str = ""


def _agree(found: list[list[_Found]]) -> bool:
    """Whether every trace has the same chains."""
    described = [
        sorted(
            (
                item.chain.path,
                [(step.kind, str(step.value)) for step in item.chain.steps],
                list(item.chain.members),
            )
            for item in items
        )
        for items in found
    ]
    return all(other == described[0] for other in described)


def _chains_of_trace(
    path: str,
    module: nn.Module,
    traced: Trace,
    heads: dict[str, nn.Module],
    usable: Usable,
    rewriting: bool,
) -> list[_Found]:
    """The chains that one trace shows; ``rewriting``: calls may be removed from the forward."""
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    modules = dict(module.named_modules(remove_duplicate=False))

    def called_once(node: fx.Node) -> bool:
        if node.op != "call_module" or calls[node.target] > 1:
            return False
        return usable(_join(path, node.target), modules[node.target])

    def step_of(node: fx.Node) -> Step | None:
        if node.op != "call_module":
            return steps.step_of_call(node)
        member = modules[node.target]
        if (
            has_call_hooks(member)
            or "forward" in vars(member)
            or len(node.args) > 1
            or node.kwargs
        ):
            return None
        return steps.step_of_module(member)

    found = []
    for head in traced.graph.nodes:
        if not called_once(head) or _join(path, head.target) not in heads:
            continue
        item = _Found(Chain(_join(path, head.target)))
        last = head
        while (following := _only_use(last)) is not None:
            step = step_of(following)
            extended = None if step is None else _extended(item.chain, step, heads)
            if extended is None:
                break
            if called_once(following):
                item.chain.members[_join(path, following.target)] = step
            elif (
                rewriting
                and step.kind != steps.NORM
                # Only the forward itself is rewritten, not the methods it calls.
                and {head, following} <= traced.in_forward
            ):
                item.first_removed = item.first_removed or step.name
                item.removed.append(following)
            else:
                break
            item.chain.steps = extended
            last = following
        if item.chain.steps:
            found.append(item)
    return found


def _only_use(node: fx.Node) -> fx.Node | None:
    """The call that alone uses ``node``'s value, as its first argument and only tensor."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.args[:1] == (node,) and user.all_input_nodes == [node] else None


def _extended(chain: Chain, step: Step, heads: dict[str, nn.Module]) -> list[Step] | None:
    head = heads[chain.path]
    if not isinstance(head, nn.Conv2d):
        return [step] if step.kind == steps.ACTIVATION and not chain.steps else None
    if step.kind == steps.NORM:
        norm = step.apply
        tensors = [*norm.parameters(), *norm.buffers()]
        same_dtype = all(
            t.dtype == head.weight.dtype and t.device == head.weight.device
            for t in tensors
            if t.is_floating_point()
        )
        if norm.num_features != head.out_channels or not same_dtype:
            return None
    return steps.append(chain.steps, step)


def _traces(module: nn.Module) -> list[Trace]:
    """In training and in evaluation, and without the optional arguments too if there are any."""
    traces = [trace(module, training) for training in (True, False)]
    if any(t.has_defaults for t in traces):
        traces += [trace(module, training, defaults=True) for training in (True, False)]
    return traces


def _contains(scope: str, path: str) -> bool:
    return path.startswith(f"{scope}.") if scope else path != ""


def _targets(traces: list[Trace]) -> set[str]:
    return {n.target for t in traces for n in t.graph.nodes if n.op == "call_module"}


def _called_by(model: nn.Module, scope: str, path: str) -> bool:
    """Whether the module at ``path`` belongs to ``scope`` itself: only containers lie between."""
    if not _contains(scope, path):
        return False
    owner = _owner(path)
    while owner != scope:
        if _has_forward(model.get_submodule(owner)):
            return False
        owner = _owner(owner)
    return True


def _is_scope(module: nn.Module) -> bool:
    """Whether chains are looked for in ``module``'s forward; torch's own layers keep theirs."""
    own = type(module).__module__.startswith("torch.nn.")
    return _is_plain_sequential(module) or (_has_forward(module) and not own)


def _has_forward(module: nn.Module) -> bool:
    """Whether ``module`` is called, as opposed to merely holding others."""
    return type(module).forward is not nn.Module.forward


def _is_plain_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def _owner(path: str) -> str:
    return path.rpartition(".")[0]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
