"""The everyday call of a feed-forward block; see fmkernels/ops/_quick.py."""

from __future__ import annotations

from torch import Tensor

from fmkernels.ops._autograd import needs_graph
from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.feed_forward.autograd import run
from fmkernels.ops.feed_forward.backends import FEED_FORWARD, INFERENCE


def feed_forward(
    tensors: tuple[Tensor | None, ...],
    packed_weights: tuple[Tensor | None, Tensor | None],
    activation: str | None,
    backend: str | None,
) -> Tensor | None:
    """As :func:`fmkernels.ops.feed_forward.autograd.feed_forward`, without dropout.

    Args:
        tensors: from ``input`` to ``residual``.
    """
    try:
        if not is_ordinary("feed_forward", FEED_FORWARD, backend, *tensors, *packed_weights):
            return None
        if needs_graph(*tensors):
            return run("cpu", tensors, packed_weights, activation, 0.0)
        tensors = [None if t is None else t.contiguous() for t in tensors]
        return INFERENCE(*tensors, *packed_weights, activation)
    except CLOSER_LOOK:
        return None
