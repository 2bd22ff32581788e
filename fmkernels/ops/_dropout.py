"""Dropout whose mask is computed from a seed and the element's place, never stored.

Element ``(row, column)`` of a matrix is dropped when word ``column % 4`` of Philox 4x32-10 (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is below ``p * 2**32``; the counter
is ``(row % 2**32, row // 2**32, column // 4, 0)`` and the key the two halves of the seed. Forward,
backward and every backend thus agree on the mask, bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """A seed, int64 of shape (1,), drawn from torch's generator of ``device``."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Words below this are dropped: 0 for p = 0, 2**32 (all of them) for p = 1."""
    return min(round(p * 2**32), 2**32)


def factor(p: float) -> float:
    """What a kept element is multiplied by, so that the expectation stays; 0 for p = 1."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def factors(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """What each element of a (rows, columns) matrix is multiplied by: 0 or :func:`factor`."""
    device = seed.device
    counter = torch.arange((columns + 3) // 4, device=device)
    row = torch.arange(rows, device=device).unsqueeze(1)
    c0, c1 = ((half & _LOW).expand(-1, counter.numel()) for half in (row, row >> 32))
    c2, c3 = (counter & _LOW).expand(rows, -1), torch.zeros_like(c0)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap; their 64 bits are those of the unsigned product.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((second >> 32) & _LOW) ^ c1 ^ key0, second & _LOW
        c2, c3 = ((first >> 32) & _LOW) ^ c3 ^ key1, first & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :columns]
    return (words >= threshold(p)).to(dtype) * factor(p)
