"""The package flash-attn under the name and options of scaled-dot-product attention.

Dao et al. 2022, 2023. It runs on a GPU alone, which this project has not had: what is here was
tested with a stand-in for the package.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fmkernels.bench.workloads import Attention, Windowed


class Refused(ValueError):
    """flash-attn has no word for this problem, or means something else by it."""


class FlashAttention(torch.nn.Module):
    """An attention workload on flash-attn.

    Args:
        flash: the package ``flash_attn``.
        module: the workload's module, :class:`Attention` or :class:`Windowed`.
        mask: its ``attn_mask`` input, a mask of padded keys: read here once, for lengths that the
            host knows are what the package takes. Calls get the same mask.

    Raises:
        Refused: another module, another mask.
    """

    def __init__(self, flash: ModuleType, module: torch.nn.Module, mask: Tensor | None) -> None:
        super().__init__()
        if not isinstance(module, Attention):
            raise Refused("one call of attention, not a layer that makes one")
        self.flash = flash
        self.options = dict(module.options)
        if isinstance(module, Windowed):
            self.options |= {"is_causal": True, "window": (module.width - 1, 0)}
        self.lengths = None if mask is None else _lengths(mask)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None):
        """``(B, H, Sq, D)``, ``(B, Hkv, Sk, D)`` and ``(B, Hkv, Sk, D)``; what torch gives."""
        return attend(self.flash, query, key, value, lengths=self.lengths, **self.options)


def attend(
    flash: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: list[int] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """``fmkernels.functional.scaled_dot_product_attention`` by flash-attn.

    Args:
        lengths: how many keys each sequence of the batch has; the others are padding.

    Raises:
        Refused: float32 and float64; positions that matter where there are as many queries as keys
            not, for flash-attn aligns them at the last key, torch at the first.
    """
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise Refused(f"float16 and bfloat16 only, got {query.dtype}")
    if key.size(1) != query.size(1) and not enable_gqa:
        raise Refused("fewer heads of keys than of queries without enable_gqa")
    positions = is_causal or window is not None or alibi_slopes is not None
    if positions and (lengths is not None or query.size(2) != key.size(2)):
        raise Refused("positions count from the last key, not from the first")
    options: dict[str, Any] = {
        "dropout_p": dropout_p,
        "softmax_scale": scale,
        "causal": is_causal,
        "window_size": (-1, -1) if window is None else tuple(window),
    }
    # Left out where they say nothing: releases before 2.4 and 2.6 do not know them.
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes.float()
    if softcap is not None:
        options["softcap"] = softcap
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if lengths is None:
        output = flash.flash_attn_func(query, key, value, **options)
    else:
        output = _packed(flash, query, key, value, lengths, options)
    return output.transpose(1, 2)


def _packed(
    flash: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    options: dict[str, Any],
) -> Tensor:
    """``(B, S, H, D)``: keys of different lengths, one after the other, without the padding."""
    batch, queries = query.shape[:2]
    key, value = (
        torch.cat([tensor[i, :length] for i, length in enumerate(lengths)])
        for tensor in (key, value)
    )
    output = flash.flash_attn_varlen_func(
        query.reshape(batch * queries, *query.shape[2:]),
        key,
        value,
        cu_seqlens_q=_offsets((queries,) * batch, query.device),
        cu_seqlens_k=_offsets(tuple(lengths), query.device),
        max_seqlen_q=queries,
        max_seqlen_k=max(lengths),
        **options,
    )
    return output.unflatten(0, (batch, queries))


@functools.lru_cache(maxsize=8)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence starts. Kept: a CUDA graph may not copy from the host."""
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def _lengths(mask: Tensor) -> list[int]:
    """The lengths behind a boolean ``(B, 1, 1, Sk)`` mask of the keys that count."""
    if mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        raise Refused("no mask but a boolean one of padded keys, (batch, 1, 1, keys)")
    kept = mask[:, 0, 0]
    lengths = kept.sum(-1)
    if not torch.equal(kept, torch.arange(kept.size(1), device=kept.device) < lengths[:, None]):
        raise Refused("no mask that leaves out keys before the last one")
    return lengths.tolist()
