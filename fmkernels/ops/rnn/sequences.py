"""What the backends share: order of steps, sequences that end early, weight gradients.

Letters in shape comments: T steps, B batch, I input features, H hidden features, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def per_direction(weights: Sequence[Tensor], directions: int) -> list[list[Tensor]]:
    """The flat list of weights, cut into one list per direction."""
    count = len(weights) // directions
    return [list(weights[d * count : (d + 1) * count]) for d in range(directions)]


def time_order(steps: int, direction: int) -> range:
    """The steps of a direction, first to last."""
    return range(steps) if direction == 0 else range(steps - 1, -1, -1)


def active_steps(steps: int, lengths: Tensor | None) -> Tensor | None:
    """(T, B, 1): whether a sequence takes part in a step; None if all always do."""
    if lengths is None:
        return None
    return (torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths).unsqueeze(-1)


def where_active(active: Tensor | None, new: Tensor, otherwise: Tensor | float) -> Tensor:
    """``new`` where active, else ``otherwise``."""
    if active is None:
        return new
    if isinstance(otherwise, Tensor):
        otherwise = otherwise.to(new.dtype)
    return torch.where(active, new, otherwise)


def previous_states(
    states: Tensor, first: Tensor, direction: int, active: Tensor | None
) -> Tensor:
    """(T, B, features): the state that each step started from, given those after each step."""
    first = first.unsqueeze(0)
    if direction == 0:
        return torch.cat([first, states[:-1]])
    previous = torch.cat([states[1:], first])
    if active is not None:
        # A sequence enters the second direction at its own last step.
        goes_on = torch.cat([active[1:], torch.zeros_like(active[:1])])
        previous = torch.where(goes_on, previous, first)
    return previous


def rows_product(rows: Tensor, columns: Tensor) -> Tensor:
    """``sum_tb rows[t, b, :] columns[t, b, :]^T``: a weight's gradient."""
    return rows.flatten(0, 1).t() @ columns.flatten(0, 1)


def as_weights(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in their weights' dtypes, no two sharing memory: outputs may not alias."""
    return [
        gradient.to(weight.dtype, copy=True).contiguous()
        for gradient, weight in zip(gradients, weights, strict=True)
    ]
