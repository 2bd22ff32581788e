"""Which backend serves a call, and why the others did not.

A backend is a set of plain functions with the signatures of the family's ops. Each family lists
its backends for an op, best first, in ``ops/<family>/backends.py``; :func:`select` walks that
list.

* An explicit backend (``backend="cpu"`` or :class:`use_backend`) never falls back: if it cannot
  serve the call, :class:`UnsupportedError` names every backend and its reason.
* ``"auto"`` takes the first backend that supports the call and records a :class:`Decision`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import torch

BACKEND_NAMES = ("auto", "cpu", "triton", "cuda", "reference")
PRECISIONS = ("fast", "exact")


class UnsupportedError(RuntimeError):
    """No requested backend can serve this call; the message lists each backend and its reason."""


@dataclass(frozen=True)
class Support:
    """Whether a backend can serve a call. A "no" always carries a reason."""

    ok: bool
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.ok and not self.reason:
            raise ValueError("a Support that is not ok needs a reason")


SUPPORTED = Support(True)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        supports: called with the problem given to :func:`select`; returns a :class:`Support`.
        forward: same signature as the op's ``*_forward`` schema.
        backward: same signature as the op's ``*_backward`` schema.
        pack: same signature as the op's ``*_pack_weight`` schema; None if there is nothing to
            pack.
        yields_to: called with the same problem under ``"auto"`` only; returns ``(name, reason)``
            of a backend that is faster for it although it stands later in the list, or None. If
            that one cannot serve the call, this one does.
        statistics: of a convolution, same signature as ``conv_statistics``; None if there is no
            such kernel.
    """

    supports: Callable[..., Support]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    pack: Callable[..., Any] | None = None
    yields_to: Callable[..., tuple[str, str] | None] | None = None
    statistics: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Decision:
    """One choice made under ``"auto"``.

    Attributes:
        op: name of the op, e.g. ``"conv2d"``.
        chosen: the backend that served the call.
        refused: ``(backend, reason)`` of every better backend that could not.
    """

    op: str
    chosen: str
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused)
        return f"{self.op} -> {self.chosen}" + (f" ({reasons})" if reasons else "")


# Bounded, so that a long training run cannot grow it. Appending to a deque is thread-safe.
_decisions: deque[Decision] = deque(maxlen=64)


class _Settings(threading.local):
    """Per-thread settings. A thread-local rather than a ContextVar: torch.compile can trace it."""

    def __init__(self) -> None:
        self.backend = "auto"
        self.precision = "fast"


_settings = _Settings()


def check_backend_name(name: str, argument: str = "backend") -> str:
    if name not in BACKEND_NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(BACKEND_NAMES)}, got {name!r}")
    return name


class use_backend:  # noqa: N801 - reads as a verb in a with statement
    """Context manager: the backend of every call in this thread that does not name one itself.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"reference"``.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str) -> None:
        self.name = check_backend_name(name, "name")
        self._previous: list[str] = []

    def __enter__(self) -> None:
        self._previous.append(_settings.backend)
        _settings.backend = self.name

    def __exit__(self, *exc_info: object) -> None:
        _settings.backend = self._previous.pop()


class precision:  # noqa: N801 - reads as a noun in a with statement
    """Context manager: ``"exact"`` forbids kernels that trade accuracy for speed in this thread.

    ``"fast"`` (the default) permits algorithms with a stated, larger error floor, such as Winograd
    convolution; ``"exact"`` keeps to direct algorithms and accurate activations. Kernels that have
    only a direct algorithm give the same result under both.

    Raises:
        ValueError: unknown mode.
    """

    def __init__(self, mode: str) -> None:
        if mode not in PRECISIONS:
            raise ValueError(f"mode must be one of {', '.join(PRECISIONS)}, got {mode!r}")
        self.mode = mode
        self._previous: list[str] = []

    def __enter__(self) -> None:
        self._previous.append(_settings.precision)
        _settings.precision = self.mode

    def __exit__(self, *exc_info: object) -> None:
        _settings.precision = self._previous.pop()


def current_backend() -> str:
    """The backend that :class:`use_backend` set for this thread, ``"auto"`` outside of one."""
    return _settings.backend


def current_precision() -> str:
    """``"fast"`` or ``"exact"``, as set by :class:`precision` for this thread."""
    return _settings.precision


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for this kind of device; False where there is no autocast (meta)."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def last_decisions() -> tuple[Decision, ...]:
    """The most recent choices made under ``"auto"``, oldest first (at most 64)."""
    return tuple(_decisions)


def decisions_since(before: int) -> list[Decision]:
    """Those made after :func:`decision_count` was ``before``, as far as the log reaches."""
    made = _made - before
    return list(_decisions)[-made:] if made > 0 else []


def decision_count() -> int:
    """How many choices have been logged so far."""
    return _made


def clear_decisions() -> None:
    """Empty the log that :func:`last_decisions` reads."""
    _decisions.clear()


# The same few over and over: making one takes longer than looking it up.
_decision = lru_cache(maxsize=256)(Decision)
_counter, _made = count(1), 0


def record_decision(op: str, chosen: str, refused: tuple[tuple[str, str], ...] = ()) -> None:
    """Log a choice under ``"auto"``; does nothing while torch.compile traces."""
    if not torch.compiler.is_compiling():
        log_decision(op, chosen, refused)


def log_decision(op: str, chosen: str, refused: tuple[tuple[str, str], ...] = ()) -> None:
    """:func:`record_decision` of a call that is not being traced."""
    global _made
    _decisions.append(_decision(op, chosen, refused))
    _made = next(_counter)


def select(
    op: str, backends: dict[str, Backend], requested: str | None, *problem: Any
) -> tuple[str, Backend]:
    """Choose the backend for one call.

    Args:
        op: name of the op, for messages and the log.
        backends: the family's ordered list, best first.
        requested: a backend name, or None for the surrounding :class:`use_backend`.
        problem: handed to each backend's ``supports``.

    Returns:
        ``(name, backend)``.

    Raises:
        ValueError: ``requested`` is not a backend name.
        UnsupportedError: the explicit backend cannot serve the call, or none can.
    """
    name = _settings.backend if requested is None else check_backend_name(requested)
    if name != "auto":
        backend = backends.get(name)
        if backend is not None and backend.supports(*problem).ok:
            return name, backend
        raise UnsupportedError(_refusal(op, name, backends, problem))
    refused: tuple[tuple[str, str], ...] = ()
    for candidate, backend in backends.items():
        support = backend.supports(*problem)
        if support.ok and backend.yields_to is not None:
            better = backend.yields_to(*problem)
            if better and better[0] in backends and backends[better[0]].supports(*problem).ok:
                support = Support(False, f"leaves this to {better[0]}: {better[1]}")
        if support.ok:
            record_decision(op, candidate, refused)
            return candidate, backend
        refused += ((candidate, support.reason),)
    raise UnsupportedError(_refusal(op, name, backends, problem))


def _refusal(op: str, name: str, backends: dict[str, Backend], problem: tuple) -> str:
    lines = [f"{op}: backend {name!r} cannot serve this call"]
    for candidate in BACKEND_NAMES[1:]:
        if candidate not in backends:
            lines.append(f"  {candidate}: has no {op}")
            continue
        support = backends[candidate].supports(*problem)
        lines.append(f"  {candidate}: {'supported' if support.ok else support.reason}")
    return "\n".join(lines)
