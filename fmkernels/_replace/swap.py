"""replace() and patched(): exchange the layers of a model, and give them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fmkernels._dispatch import UnsupportedError
from fmkernels._replace import backends, catalog, chains, hub, measure, rewrite, steps
from fmkernels._replace.fused import FusedAway, FusedBatchNorm2d, FusedConv2d, FusedLinear
from fmkernels._replace.report import FUSED, KEPT, REPLACED, Report, Row
from fmkernels.freeze import freeze as freeze_layers

ALREADY_OURS = "already an fmkernels layer"

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def replace(
    model: nn.Module,
    *,
    families: Sequence[str] = catalog.FAMILIES,
    fuse: bool = True,
    freeze: bool = False,
    example_inputs: Any = None,
    strict: bool = False,
) -> Report:
    """Replace the layers of ``model`` by this package's, in place.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    >>> report = fmkernels.replace(model, example_inputs=torch.randn(1, 3, 32, 32))
    >>> print(report)                  # a table: what became of each layer, and why
    >>> report.undo()                  # the original modules are back

    Parameters are shared with the original layers, so an optimizer made before goes on working,
    and the state_dict has the same keys before and after. Hooks move along with their layers.
    ``train``, ``eval``, ``to``, ``deepcopy``, ``load_state_dict`` work as before; so does pickling
    the model.

    With ``fuse``, a convolution and the batch norm, sum, activation and pooling that follow it
    become one layer, and so do a linear layer, a sum and its activation: in a ``Sequential`` by
    position, and in any module whose forward torch.fx can trace by the flow of data. The fused
    layer sits at the convolution's place. The other modules stay where they are, keep their
    parameters and buffers, and hand their input on; their own output is no longer what it was, so
    layers with hooks, layers in two places and layers called from outside their container are not
    fused. Calls such as ``F.relu`` are fused too, by giving the module that makes them another
    forward; where that could change its meaning, the row's reason says why it was not done. Fusing
    relies on the model's forward passing through the chain each time. Use ``fuse=False`` if layers
    of a ``Sequential`` are called one by one from code that torch.fx cannot trace, and under
    ``nn.DataParallel`` and FSDP, which handle modules apart from one another.

    A sum, such as that of a residual block (``out += identity``, ``x + self.body(x)``,
    ``torch.add``), is fused if one operand comes straight from a convolution and its batch norm,
    or from a linear layer, or from a module that ends in one; that layer, and the modules around
    it, then take the other operand as a second argument. Of an in-place sum it is the operand that
    is written into; of two convolutions the one with the larger kernel, or the first. Operands
    that turn out to differ in shape, dtype or device are added as torch adds them. The layer then
    runs where the sum was, so the sum stays if that could be noticed: if something in between
    writes in place, draws random numbers or is unknown.

    Frozen convolutions that read one another's outputs run as one call where no gradient is
    wanted: those of a ``Sequential``, and of the modules in it whose forwards consist of calls of
    such layers and sums. Modules with hooks, in training, or changed since are called as before.

    Of Hugging Face's transformers, ``Conv1D``, RMS norms and gated feed-forward blocks are
    exchanged if they compute what their names say. Layers that look their attention up in its
    ``AttentionInterface`` stay, and the configuration selects the implementation ``"fmkernels"``,
    which is registered in this process: a model pickled like that needs a ``replace`` of any model
    with such layers before it runs in another one.

    Args:
        model: any module. If it is itself a layer of a family it cannot be exchanged in place: use
            ``report.model``.
        families: which layers: any of ``"conv"``, ``"rnn"``, ``"attention"``, ``"linear"``.
        fuse: whether to fuse what follows a layer into it.
        freeze: also :func:`fmkernels.freeze` the new layers, for inference.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. The model
            then runs twice, before and after, in evaluation mode without gradients on copies of
            them, and the report states the error of every replaced layer and of the whole model.
            Buffers, modes and random number generators are as before afterwards.
        strict: raise if any layer has to be kept.

    Returns:
        :class:`Report`, with a row for every layer of the families.

    Raises:
        TypeError: ``model`` is not a module, or ``families`` is not a sequence of names.
        ValueError: an unknown family.
        UnsupportedError: ``strict``, and some layers have to be kept; it lists them with the
            reasons, and nothing has been replaced. Layers that are this package's already do not
            count.
        Exception: what the model itself raises on ``example_inputs``; nothing has been replaced.
    """
    families = _check(model, families)
    plan = _Plan(model, families, fuse)
    if strict:
        _refuse_kept(model, plan.rows)
    measured = [row.path for row in plan.rows if row.path in plan.layers]
    if example_inputs is not None:
        old_output, old_calls = measure.run(model, example_inputs, measured)
    exchange = _Exchange(model, plan)
    report = Report(plan.rows, exchange.model, _undo=exchange.undo)
    try:
        if freeze and plan.layers:
            freeze_layers(exchange.model)
        if example_inputs is not None:
            new_output, new_calls = measure.run(exchange.model, example_inputs, measured)
            report.error = measure.error_of(old_output, new_output)
            for row in report.rows:
                if row.path in old_calls:
                    chain = plan.fusion.chains.get(row.path)
                    expected = old_calls[row.path]
                    actual = new_calls.get(row.path, [])
                    if chain is not None:
                        expected = measure.apply_steps(expected, actual, chain.steps)
                    row.error = measure.error_of_calls(expected, actual)
    except BaseException:
        report.undo()
        raise
    return report


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[Report]:
    """:func:`replace` for the length of a ``with`` statement; undone at its end, come what may.

    >>> with fmkernels.patched(model) as report:
    ...     report.model(x)

    Args:
        model, options: as for :func:`replace`.
    """
    report = replace(model, **options)
    try:
        yield report
    finally:
        if not report.undone:
            report.undo()


class _Plan:
    """What is to become of each layer; makes the new layers and changes nothing.

    Attributes:
        rows: of the report, in the model's order.
        layers: path of an original layer -> the new one.
        others: path of a module fused into a layer -> what stands there instead.
        fusion: the chains.
        attention: layers whose attention is selected by name; they stay.
    """

    def __init__(self, model: nn.Module, families: Sequence[str], fuse: bool) -> None:
        self.rows: list[Row] = []
        self.layers: dict[str, nn.Module] = {}
        self.others: dict[str, nn.Module] = {}
        self.attention: list[nn.Module] = []
        self._families = families
        self._candidates: dict[str, nn.Module] = {}
        self._first_paths: dict[nn.Module, str] = {}
        found: list[tuple[str, nn.Module]] = []
        self._collect("", model, found)
        heads = {
            path: module
            for path, module in self._candidates.items()
            if isinstance(module, nn.Conv2d | nn.Linear) or hub.is_linear(module)
        }
        self.fusion = chains.plan(model, heads) if fuse and heads else chains.Fusion()
        for path, module in found:
            self._add(model, path, module)

    def _collect(self, path: str, module: nn.Module, found: list[tuple[str, nn.Module]]) -> None:
        """List the layers of the families, and of these the ones to replace."""
        if catalog.family_of(module) in self._families:
            found.append((path, module))
            if module in self._first_paths:
                return
            self._first_paths[module] = path
            by_name = hub.uses_interface(module)
            if not by_name and not catalog.is_ours(module) and not catalog.why_kept(module):
                self._candidates[path] = module
                return
        if catalog.is_ours(module):
            return
        # Not named_children, which leaves out the second place of a module.
        for name, child in module._modules.items():
            if child is not None:
                self._collect(f"{path}.{name}" if path else name, child, found)

    def _add(self, model: nn.Module, path: str, module: nn.Module) -> None:
        kind = type(module).__name__
        first = self._first_paths[module]
        if first != path:
            original = next(row for row in self.rows if row.path == first)
            self.rows.append(
                Row(path, original.status, original.old, original.new, original.backend,
                    f"same module as {first or 'the model'}")
            )  # fmt: skip
        elif catalog.is_ours(module):
            self.rows.append(Row(path, KEPT, kind, kind, reason=ALREADY_OURS))
        elif hub.uses_interface(module):
            self._add_attention(path, module)
        elif path not in self._candidates:
            self.rows.append(Row(path, KEPT, kind, kind, reason=catalog.why_kept(module)))
        elif path in self.fusion.chains:
            self._add_fused(model, self.fusion.chains[path], module)
        else:
            self._add_replaced(path, module)

    def _add_replaced(self, path: str, module: nn.Module) -> None:
        kind = type(module).__name__
        new = catalog.make(module)
        decisions = backends.decisions_of(new)
        left = [decision for decision in decisions if decision.chosen == "torch"]
        if left:
            # The layer would only hand its input to torch's.
            self.rows.append(Row(path, KEPT, kind, kind, reason=left[0].refused[0][1]))
            return
        self.layers[path] = new
        reason = self.fusion.notes.get(path, "")
        self.rows.append(Row(path, REPLACED, kind, type(new).__name__, _names(decisions), reason))
        for name, part in module.named_modules():
            if name and catalog.family_of(part) in self._families:
                now = new.get_submodule(name)
                ours = catalog.is_ours(now)
                reason = f"part of {path or 'the model'}" if ours else catalog.why_kept(part)
                self.rows.append(
                    Row(
                        f"{path}.{name}" if path else name,
                        REPLACED if ours else KEPT,
                        type(part).__name__,
                        type(now).__name__,
                        _names(decisions) if ours else "",
                        reason,
                    )
                )

    def _add_attention(self, path: str, module: nn.Module) -> None:
        kind = type(module).__name__
        if reason := hub.why_attention_kept(module):
            self.rows.append(Row(path, KEPT, kind, kind, reason=reason))
            return
        self.attention.append(module)
        backend = _names(backends.attention_decisions_of(module))
        new = f"{kind} ({hub.IMPLEMENTATION} attention)"
        self.rows.append(Row(path, REPLACED, kind, new, backend))

    def _add_fused(self, model: nn.Module, chain: chains.Chain, module: nn.Module) -> None:
        norm = None
        for path, step in chain.members.items():
            member = model.get_submodule(path)
            if step.kind == steps.NORM:
                self.others[path] = norm = FusedBatchNorm2d.from_torch(member, chain.path)
            else:
                self.others[path] = FusedAway(member, chain.path)
        added = steps.value_of(chain.steps, steps.RESIDUAL)
        options = {"activation": steps.value_of(chain.steps, steps.ACTIVATION)}
        if isinstance(module, nn.Conv2d):
            options["pool"] = steps.value_of(chain.steps, steps.POOL)
        if isinstance(module, nn.Conv2d) and (norm is not None or added is not None):
            new = FusedConv2d.from_chain(module, norm, residual_sum=added, **options)
        elif added is not None:
            new = FusedLinear.from_chain(module, residual_sum=added, **options)
        else:
            new = catalog.make(module, **options)
        self.layers[chain.path] = new
        old = " + ".join([type(module).__name__, *(step.name for step in chain.steps)])
        backend = _names(backends.decisions_of(new))
        reason = self.fusion.notes.get(chain.path, "")
        self.rows.append(Row(chain.path, FUSED, old, type(new).__name__, backend, reason))


class _Exchange:
    """Carries a plan out, and undoes it.

    Attributes:
        model: the model afterwards.
    """

    def __init__(self, model: nn.Module, plan: _Plan) -> None:
        self._original = model
        self._places: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._rewritten = [
            (model.get_submodule(path), forward) for path, forward in plan.fusion.forwards.items()
        ]
        exchanged = {**plan.layers, **plan.others}
        self._pairs = [(model.get_submodule(path), new) for path, new in exchanged.items()]
        new_of = dict(self._pairs)
        self.model = new_of.get(model, model)
        # First all the places, then the changes: the walk must see the original model.
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is not None and child in new_of:
                    self._places.append((parent, name, child, new_of[child]))
        for old, new in self._pairs:
            _move_in(old, new)
        for parent, name, _, new in self._places:
            parent._modules[name] = new
        for module, forward in self._rewritten:
            rewrite.install(module, forward)
        self._selection = hub.Selection(self.model, plan.attention)

    def undo(self) -> nn.Module:
        self._selection.undo()
        for module, _ in reversed(self._rewritten):
            rewrite.uninstall(module)
        for old, new in self._pairs:
            _move_out(old, new)
        for parent, name, old, new in reversed(self._places):
            if parent._modules.get(name) is new:
                parent._modules[name] = old
        return self._original


def _move_in(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hooks of ``old``, and the attributes that somebody has set on it."""
    for path, before in old.named_modules():
        after = new.get_submodule(path)
        if after is before:
            continue
        for table in _HOOK_TABLES:
            # The very tables: a handle made for the one removes its hook from the other.
            vars(after)[table] = vars(before)[table]
        after._is_full_backward_hook = before._is_full_backward_hook
        if not isinstance(after, FusedAway):
            for name, value in vars(before).items():
                vars(after).setdefault(name, value)


def _move_out(old: nn.Module, new: nn.Module) -> None:
    """Give ``old`` the mode, parameters and buffers that ``new`` has come to hold."""
    for path, before in old.named_modules():
        after = new.get_submodule(path)
        if after is before:
            continue
        before.training = after.training
        before._is_full_backward_hook = after._is_full_backward_hook
        own = getattr(after, "_frozen_names", ())
        for name, value in {**after._parameters, **after._buffers}.items():
            if name in own:
                continue
            if name in before._parameters or name in before._buffers:
                setattr(before, name, value)
            elif name in after._parameters:
                before.register_parameter(name, value)
            else:
                before.register_buffer(name, value, name not in after._non_persistent_buffers_set)


def _names(decisions: list) -> str:
    return ", ".join(dict.fromkeys(decision.chosen for decision in decisions))


def _refuse_kept(model: nn.Module, rows: list[Row]) -> None:
    kept = [row for row in rows if row.status == KEPT and row.reason != ALREADY_OURS]
    if kept:
        lines = [f"  {row.path or 'the model'} ({row.old}): {row.reason}" for row in kept]
        count = f"{len(kept)} layer{'s' * (len(kept) > 1)}"
        raise UnsupportedError(
            "\n".join([f"strict: {count} of {type(model).__name__} cannot be replaced", *lines])
        )


def _check(model: Any, families: Any) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(families, str) or not all(isinstance(family, str) for family in families):
        raise TypeError(f"families must be a sequence of names, got {families!r}")
    for family in families:
        if family not in catalog.FAMILIES:
            allowed = ", ".join(catalog.FAMILIES)
            raise ValueError(f"families must be among {allowed}, got {family!r}")
    return tuple(families)
