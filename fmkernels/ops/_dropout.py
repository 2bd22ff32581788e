"""Dropout whose mask is computed from a seed and the element's place, never stored.

Element ``(row, column)`` of a matrix is dropped when word ``column % 4`` of Philox 4x32-10 (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is below ``p * 2**32``; the counter
is ``(row % 2**32, row // 2**32, column // 4, 0)`` and the key the two halves of the seed. Forward,
backward and every backend thus agree on the mask, bit by bit.

Of attention's weights the row is the query's index in the contiguous ``lse``, that is
``(b * Hq + h) * Sq + i``, for packed sequences ``h * total_q + t``; the column is the key's
position in its sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def new_seed(device: torch.device) -> Tensor:
    """A seed, int64 of shape (1,), drawn from torch's generator of ``device``."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Words below this are dropped: 0 for p = 0, 2**32 (all of them) for p = 1."""
    return min(round(p * 2**32), 2**32)


def factor(p: float) -> float:
    """What a kept element is multiplied by, so that the expectation stays; 0 for p = 1."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def words(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four words of Philox 4x32-10 for 32-bit counters held in int64, broadcast."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # int64 products wrap; their 64 bits are those of the unsigned product.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _LOW) ^ c1 ^ key0, second & _LOW
        c2, c3 = ((first >> 32) & _LOW) ^ c3 ^ key1, first & _LOW
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def kept(seed: Tensor, p: float, rows: Tensor, columns: Tensor) -> Tensor:
    """Whether each element is kept, bool of the broadcast shape of ``rows`` and ``columns``.

    Args:
        seed: int64 ``(1,)``.
        rows, columns: int64; a column of -1 is allowed, its answer being arbitrary.
    """
    rows, columns = torch.broadcast_tensors(rows, columns)
    zero = torch.zeros_like(rows)
    drawn = words(seed, (rows & _LOW, (rows >> 32) & _LOW, (columns >> 2) & _LOW, zero))
    word = torch.stack(drawn, dim=-1).gather(-1, (columns & 3).unsqueeze(-1)).squeeze(-1)
    return word >= threshold(p)


def factors(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """What each element of a (rows, columns) matrix is multiplied by: 0 or :func:`factor`."""
    device = seed.device
    row = torch.arange(rows, device=device).unsqueeze(1)
    mask = kept(seed, p, row, torch.arange(columns, device=device))
    return mask.to(dtype) * factor(p)
