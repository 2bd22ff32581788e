"""What :func:`fmkernels.replace` did to each layer, readable by people and by programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

REPLACED, FUSED, KEPT = "replaced", "fused", "kept"


@dataclass
class Row:
    """What happened to one layer.

    Attributes:
        path: where the layer sits, as in ``model.get_submodule(path)``; ``""`` is the model
            itself.
        status: ``"replaced"`` (one layer for one), ``"fused"`` (replaced together with the layers
            or calls that followed it) or ``"kept"`` (not touched).
        old: class of the original layer; for a fused row everything that went into it, joined
            by ``" + "``.
        new: class of the layer that now sits there; the original class for a kept row.
        backend: what ``"auto"`` chooses for it on its device and in its dtype, e.g. ``"cpu"``; two
            names where the layer runs several ops on different backends; empty for a kept row.
        reason: why the layer was kept, or why it was not fused with what follows it; may be empty.
        error: ``max|new output - old output| / max|old output|`` on the example inputs; None when
            not measured.
    """

    path: str
    status: str
    old: str
    new: str
    backend: str = ""
    reason: str = ""
    error: float | None = None


@dataclass
class Report:
    """The result of :func:`fmkernels.replace`. ``print`` it, or take :meth:`to_dict` for JSON.

    Attributes:
        rows: one :class:`Row` per layer of the requested families, in the model's order.
        model: the model with its layers replaced. It is the object that was given, unless that
            object is itself a layer: then it is the layer that takes its place.
        error: as :attr:`Row.error`, for the whole model's output; None without example inputs.
    """

    rows: list[Row]
    model: nn.Module
    error: float | None = None
    _undo: Callable[[], nn.Module] | None = field(default=None, repr=False)

    def of(self, status: str) -> list[Row]:
        """The rows with this status."""
        return [row for row in self.rows if row.status == status]

    @property
    def undone(self) -> bool:
        """Whether :meth:`undo` has run."""
        return self._undo is None

    def undo(self) -> nn.Module:
        """Put the original modules back, and return the original model.

        The original module objects return to their places. Parameters are shared all along, so
        training done in between is kept; so are parameters and buffers registered, rebound or
        loaded on a replacement, its training flag and its hooks. A place that somebody else has
        assigned since then is left as it is.

        Raises:
            RuntimeError: called a second time.
        """
        if self._undo is None:
            raise RuntimeError("this report has been undone already")
        undo, self._undo = self._undo, None
        self.model = undo()
        return self.model

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, lists, strings, numbers and None: what ``json.dumps`` accepts."""
        return {
            "rows": [{**asdict(row), "error": _json_number(row.error)} for row in self.rows],
            "error": _json_number(self.error),
            "summary": {status: len(self.of(status)) for status in (REPLACED, FUSED, KEPT)},
        }

    def __str__(self) -> str:
        header = ("path", "status", "old", "new", "backend", "error", "reason")
        table = [header]
        for row in self.rows:
            path = row.path or "(model)"
            error = _number(row.error)
            table.append((path, row.status, row.old, row.new, row.backend, error, row.reason))
        # A column that is empty throughout is only noise.
        used = [i for i in range(len(header)) if any(line[i] for line in table[1:])]
        widths = [max(len(line[i]) for line in table) for i in used]
        lines = [
            "  ".join(line[i].ljust(width) for i, width in zip(used, widths, strict=True)).rstrip()
            for line in table
        ]
        if self.rows:
            lines.insert(1, "  ".join("-" * width for width in widths))
        else:
            lines = []
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        counts = [f"{len(self.of(status))} {status}" for status in (REPLACED, FUSED, KEPT)]
        summary = f"{type(self.model).__name__}: " + ", ".join(counts)
        if self.error is not None:
            summary += f"; error of the whole model {_number(self.error)}"
        return summary + ("; undone" if self.undone else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _json_number(value: float | None) -> float | str | None:
    """JSON has no infinity and no NaN."""
    return str(value) if value is not None and not math.isfinite(value) else value
