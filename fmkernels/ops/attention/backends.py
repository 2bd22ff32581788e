"""The backends of scaled-dot-product attention, best first."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops.attention import reference, schema  # noqa: F401 - schema defines the ops

_NATIVE = native_ops_support("sdpa_forward", "sdpa_backward")


def needs_weights_in_memory(attn_mask: Tensor | None, dropout_p: float) -> str | None:
    """Why the call needs the whole matrix of weights, which the ops never hold, or None."""
    if dropout_p > 0.0:
        return "has no dropout on the attention weights"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "has no gradient for attn_mask"
    return None


def _cpu_supports(query: Tensor, attn_mask: Tensor | None, dropout_p: float) -> Support:
    support = native_cpu_support(query, _NATIVE)
    if not support.ok:
        return support
    reason = needs_weights_in_memory(attn_mask, dropout_p)
    if reason is not None:
        return Support(False, reason)
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        return Support(
            False, f"adds masks of the query's dtype only ({query.dtype}), got {attn_mask.dtype}"
        )
    return SUPPORTED


def _reference_supports(query: Tensor, attn_mask: Tensor | None, dropout_p: float) -> Support:
    return SUPPORTED


SDPA = {
    "cpu": Backend(
        supports=_cpu_supports,
        forward=torch.ops.fmkernels.sdpa_forward.default,
        backward=torch.ops.fmkernels.sdpa_backward.default,
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.sdpa_forward,
        backward=reference.sdpa_backward,
    ),
}
