"""Finds what can run as one layer: convolution or linear, and what follows it inside one forward.

A chain never crosses the border of a module: all its members are called by the same forward, so
what any other module returns does not change. Where the flow of data is read from a trace, each
value inside the chain has a single use, and each member is called once.

A sum with a residual, and what follows it, may be another module's than the layer: that module's
forward gives the residual to the one that holds the layer, which hands it on. Called without a
residual, that one still returns what it returned.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.utils import parametrize

from fmkernels._replace import rewrite, scopes, sequential, steps
from fmkernels._replace.catalog import has_call_hooks
from fmkernels._replace.effects import Effects
from fmkernels._replace.sequential import SequentialForward
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
    forwards: dict[str, rewrite.AnyForward] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def plan(model: nn.Module, heads: dict[str, nn.Module]) -> Fusion:
    """Find every chain in ``model``.

    Args:
        model: not changed.
        heads: the convolutions and linear layers that may be replaced, by path.
    """
    return _Planner(model, heads).plan()


@dataclass
class _Tail:
    """A module that returns a chain's value.

    Attributes:
        chain: which a sum may be the next step of.
        through: the paths of the modules to hand a residual through, from the outermost.
    """

    chain: Chain
    through: tuple[str, ...]


@dataclass
class _Found:
    """A chain in one trace.

    Attributes:
        source: the call of the layer, or of a module around it.
        last: the call that gives the chain's value.
        kept: the calls from the source to ``last`` that stay; those after it hand on its value.
        edit: what only a rewritten forward can leave out.
        first_removed: name of the first step among that.
    """

    chain: Chain
    through: tuple[str, ...]
    source: fx.Node
    last: fx.Node
    kept: list[fx.Node] = field(default_factory=list)
    edit: rewrite.Edit = field(default_factory=rewrite.Edit)
    first_removed: str = ""


class _Planner:
    """See :func:`plan`."""

    def __init__(self, model: nn.Module, heads: dict[str, nn.Module]) -> None:
        self._model = model
        self._heads = heads
        self._fusion = Fusion()
        # Places, not paths: what is inside a module that sits in two places has two paths.
        self._places = Counter(id(child) for m in model.modules() for child in m._modules.values())
        self._called_from_outside: set[str] = set()
        self._traces: dict[str, list[Trace]] = {}
        self._edits: dict[str, list[rewrite.Edit]] = {}
        self._tails: dict[str, _Tail] = {}
        # Of a module with a tail: the calls in its traces, or the name of a Sequential's member.
        self._tail_calls: dict[str, list[fx.Node]] = {}
        self._tail_members: dict[str, str] = {}

    def plan(self) -> Fusion:
        found = [
            (path, m)
            for path, m in self._model.named_modules()
            if scopes.is_scope(m) and any(scopes.contains(path, head) for head in self._heads)
        ]
        self._trace(found)
        by_module = {self._model.get_submodule(path): t for path, t in self._traces.items()}
        self._effects = Effects(by_module)
        # The inner ones first: a sum may be fused into a layer inside of a module that it calls.
        for path, module in reversed(found):
            if sequential.is_plain(module):
                self._add_sequential(path, module)
            elif path in self._traces:
                self._add_traced(path, module)
        for path, edits in self._edits.items():
            self._fusion.forwards[path] = rewrite.Forward.of(self._traces[path], edits)
        self._add_programs(found)
        return self._fusion

    def _add_programs(self, found: list[tuple[str, nn.Module]]) -> None:
        """Forwards with which convolutions that read one another's outputs run as one call."""
        forwards = self._fusion.forwards
        for path, module in found:
            # Nobody records the model itself, which is called from outside.
            if not path or path not in self._traces or path in forwards:
                continue
            own = rewrite.OwnForward.of(self._traces[path])
            if own is not None and rewrite.obstacle_of(module) is None:
                forwards[path] = own
        fused = {member for chain in self._fusion.chains.values() for member in chain.members}

        def leaves(path: str, module: nn.Module) -> Iterator[str]:
            """Paths of what a call of the module comes to, but for what is fused away."""
            names = list(module._modules) if sequential.is_plain(module) else None
            program = getattr(forwards.get(path), "program", None)
            if program is not None:
                names = [call.layer for call in program]
            if names is None:
                yield path
                return
            for name in names:
                member = scopes.join(path, name)
                if member not in fused:
                    yield from leaves(member, module.get_submodule(name))

        for path, module in found:
            if not sequential.is_plain(module) or path in forwards:
                continue
            convs = [isinstance(self._heads.get(p), nn.Conv2d) for p in leaves(path, module)]
            if any(pair == (True, True) for pair in itertools.pairwise(convs)):
                forwards[path] = SequentialForward(None, tuple(module._modules))

    def _trace(self, found: list[tuple[str, nn.Module]]) -> None:
        paths = {id(m): path for path, m in self._model.named_modules()}
        for path, module in found:
            if sequential.is_plain(module):
                continue
            try:
                self._traces[path] = _traces(module)
            except TraceError as error:
                self._called_from_outside |= {paths[id(m)] for m in error.called if id(m) in paths}
                for head in self._heads:
                    if scopes.called_by(self._model, path, head):
                        where = path or "the model"
                        note = f"not fused: torch.fx cannot trace {where}: {error}"
                        self._fusion.notes[head] = note
                continue
            for target in scopes.targets(self._traces[path]):
                if not scopes.called_by(self._model, path, scopes.join(path, target)):
                    self._called_from_outside.add(scopes.join(path, target))

    def _usable(self, path: str, module: nn.Module) -> bool:
        return (
            self._places[id(module)] == 1
            and path not in self._called_from_outside
            and not has_call_hooks(module)
            and "forward" not in vars(module)
        )

    def _add_sequential(self, path: str, sequential: nn.Sequential) -> None:
        current: Chain | None = None
        # Not named_children, which leaves out the second place of a module.
        children = list(sequential._modules.items())
        while children and scopes.is_identity(children[-1][1]):
            children.pop()
        for name, module in children:
            child = scopes.join(path, name)
            usable = self._usable(child, module)
            step = steps.step_of_module(module) if usable else None
            extended = None if current is None or step is None else self._extended(current, step)
            if extended is not None:
                current.steps = extended
                current.members[child] = step
                self._fusion.chains[current.path] = current
            else:
                current = Chain(child) if child in self._heads and usable else None
                tail = self._tails.get(child) if usable else None
        if not children:
            return
        if current is not None:
            tail, member = _Tail(current, ()), current.path.rpartition(".")[2]
        else:
            member = children[-1][0]
        if tail is not None:
            self._tails[path] = _Tail(tail.chain, (path, *tail.through))
            self._tail_members[path] = member

    def _add_traced(self, path: str, module: nn.Module) -> None:
        """The chains of a traced forward.

        First with functional calls and modules called repeatedly, which a rewritten forward leaves
        out; where the forward cannot be rewritten, the chains that consist of modules called once.
        """
        traces = self._traces[path]
        found = [self._chains_of_trace(path, module, t, rewriting=True) for t in traces]
        obstacle = rewrite.obstacle_of(module) or next(
            (obstacle for t in traces for obstacle in t.obstacles), None
        )
        if obstacle is None and not _agree(found):
            obstacle = "its forward differs between training and evaluation"
        if any(item.edit.removed for items in found for item in items):
            if obstacle is None:
                self._edits[path] = [_merged(item.edit for item in items) for items in found]
            else:
                for item in found[0]:
                    if item.edit.removed:
                        where = path or "the model"
                        self._fusion.notes[item.chain.path] = (
                            f"not fused with {item.first_removed} in {where}: {obstacle}"
                        )
                found = [self._chains_of_trace(path, module, t, rewriting=False) for t in traces]
        if not _agree(found):
            return
        for item in found[0]:
            if item.chain.steps:
                self._fusion.chains[item.chain.path] = item.chain
            if item.edit.sums:
                self._hand_on(item.through)
        if obstacle is None:
            self._add_tail(path, found)

    def _add_tail(self, path: str, found: list[list[_Found]]) -> None:
        """Notes it if the module at ``path`` returns a chain's value."""
        returned = [next((item for item in items if _is_returned(item)), None) for items in found]
        parameters = [
            [node for node in t.graph.nodes if node.op == "placeholder"]
            for t in self._traces[path]
        ]
        if (
            all(len(nodes) == 1 and nodes[0].target[0] != "*" for nodes in parameters)
            and None not in returned
            and len({item.chain.path for item in returned}) == 1
        ):
            self._tails[path] = _Tail(returned[0].chain, (path, *returned[0].through))
            self._tail_calls[path] = [item.source for item in returned]

    def _hand_on(self, through: tuple[str, ...]) -> None:
        """Have the modules at these paths take a residual."""
        for path in through:
            if path in self._tail_members:
                names = tuple(self._model.get_submodule(path)._modules)
                forward = SequentialForward(self._tail_members[path], names)
                self._fusion.forwards[path] = forward
            else:
                calls = self._tail_calls[path]
                edits = self._edits.setdefault(path, [rewrite.Edit() for _ in calls])
                for edit, call in zip(edits, calls, strict=True):
                    edit.given = call

    def _chains_of_trace(
        self, path: str, module: nn.Module, traced: Trace, rewriting: bool
    ) -> list[_Found]:
        """What one trace shows; ``rewriting``: calls may be removed from the forward."""
        calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
        modules = dict(module.named_modules(remove_duplicate=False))

        def called_once(node: fx.Node) -> bool:
            if node.op != "call_module" or calls[node.target] > 1:
                return False
            return self._usable(scopes.join(path, node.target), modules[node.target])

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

        def extend(item: _Found) -> None:
            while (following := _only_use(item.last)) is not None:
                step = step_of(following)
                extended = None if step is None else self._extended(item.chain, step)
                if extended is None:
                    return
                if called_once(following):
                    item.chain.members[scopes.join(path, following.target)] = step
                    item.kept.append(following)
                elif (
                    rewriting
                    and step.kind != steps.NORM
                    # Only the forward itself is rewritten, not the methods it calls.
                    and {item.source, following} <= traced.in_forward
                ):
                    item.first_removed = item.first_removed or step.name
                    item.edit.removed[following] = item.last
                else:
                    return
                item.chain.steps = extended
                item.last = following

        found: list[_Found] = []
        for node in traced.graph.nodes:
            if not called_once(node):
                continue
            target = scopes.join(path, node.target)
            if target in self._heads:
                found.append(_Found(Chain(target), (), node, node, [node]))
                extend(found[-1])
            elif rewriting and target in self._tails:
                tail = self._tails[target]
                chain = Chain(tail.chain.path, tail.chain.steps, dict(tail.chain.members))
                found.append(_Found(chain, tail.through, node, node, [node]))
        for item in found:
            while (following := _only_use(item.last)) is not None and (
                following.op == "call_module" and scopes.is_identity(modules[following.target])
            ):
                item.kept.append(following)
                item.last = following
        if rewriting:
            self._add_sums(found, traced, modules)
            for item in found:
                if item.edit.sums:
                    extend(item)
        return found

    def _add_sums(self, found: list[_Found], traced: Trace, modules: dict[str, nn.Module]) -> None:
        """Each sum goes into one of the layers that give its operands."""
        by_last = {item.last: item for item in found}
        order = {node: i for i, node in enumerate(traced.graph.nodes)}
        for node in traced.graph.nodes:
            added = steps.sum_of_call(node)
            if added is None:
                continue
            # What is written into has to be the layer's own, which nobody else sees.
            operands = added.operands[:1] if added.in_place else added.operands
            candidates = []
            for operand in operands:
                item = by_last.get(operand)
                if (
                    item is not None
                    and list(operand.users) == [node]
                    and {item.source, node} <= traced.in_forward
                    and self._extended(item.chain, added.step()) is not None
                    and _takes_one_argument(item.source)
                    and self._may_move(item, node, order, modules)
                ):
                    candidates.append(item)
            if not candidates:
                continue
            # Of two branches the main one: the larger kernel, else what is named first.
            item = max(candidates, key=lambda item: _kernel_area(self._heads[item.chain.path]))
            (residual,) = (operand for operand in added.operands if operand is not item.last)
            item.chain.steps = self._extended(item.chain, added.step())
            item.first_removed = item.first_removed or added.step().name
            item.edit.sums.append(rewrite.FusedSum(node, residual, list(item.kept)))
            item.edit.removed[node] = item.last
            item.last = node

    def _may_move(
        self,
        item: _Found,
        node: fx.Node,
        order: dict[fx.Node, int],
        modules: dict[str, nn.Module],
    ) -> bool:
        """Whether the layer's call may take place where ``node`` is."""
        passed = [
            other
            for other, position in order.items()
            if order[item.source] < position < order[node] and other not in item.kept
        ]
        if not passed:
            return True
        alone = not item.through or self._effects.reads_afresh(modules[item.source.target])
        return alone and all(self._effects.harmless(other, modules) for other in passed)

    def _extended(self, chain: Chain, step: Step) -> list[Step] | None:
        head = self._heads[chain.path]
        is_conv = isinstance(head, nn.Conv2d)
        if step.kind in (steps.NORM, steps.RESIDUAL) and parametrize.is_parametrized(head):
            return None
        if not is_conv:
            allowed = [steps.ACTIVATION]
            if isinstance(head, nn.Linear):
                allowed.append(steps.RESIDUAL)
            return steps.append(chain.steps, step) if step.kind in allowed else None
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


def _merged(edits: Iterable[rewrite.Edit]) -> rewrite.Edit:
    merged = rewrite.Edit()
    for edit in edits:
        merged.removed.update(edit.removed)
        merged.sums += edit.sums
    return merged


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
            if item.chain.steps
        )
        for items in found
    ]
    return all(other == described[0] for other in described)


def _only_use(node: fx.Node) -> fx.Node | None:
    """The call that alone uses ``node``'s value, as its first argument and only tensor."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.args[:1] == (node,) and user.all_input_nodes == [node] else None


def _is_returned(item: _Found) -> bool:
    users = list(item.last.users)
    alone = len(users) == 1 and users[0].op == "output" and users[0].args == (item.last,)
    return alone and _takes_one_argument(item.source)


def _takes_one_argument(call: fx.Node) -> bool:
    return len(call.args) == 1 and not call.kwargs


def _kernel_area(head: nn.Module) -> int:
    return math.prod(getattr(head, "kernel_size", ()))


def _traces(module: nn.Module) -> list[Trace]:
    """In training and in evaluation, and without the optional arguments too if there are any."""
    traces = [trace(module, training) for training in (True, False)]
    if any(t.has_defaults for t in traces):
        traces += [trace(module, training, defaults=True) for training in (True, False)]
    return traces
