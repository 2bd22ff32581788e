"""Which attention weights dropout keeps: a pure function of the seed and of the weight's place.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that no
mask is stored and every kernel, forward or backward and on any device, drops the same weights:

* key: the low and the high 32 bits of the int64 seed;
* counter: ``(r mod 2**32, r >> 32, j >> 2, 0)``, where ``r`` is the query's index in the
  contiguous ``lse`` (``(b * Hq + h) * Sq + i``; for packed sequences ``h * total_q + t``) and
  ``j`` the key's position in its sequence;
* the weight is dropped if word ``j mod 4`` of the result is below ``threshold(p)``; a kept one is
  multiplied by ``keep_factor(p)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """Words below it are dropped: ``p`` of all 32-bit words, to the nearest representable."""
    return min(round(dropout_p * 2**32), _LOW)


def keep_factor(dropout_p: float) -> float:
    """``1 / (1 - p)``; 0 for ``p = 1``, where the threshold leaves one word in ``2**32``."""
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def draw_seed(device: torch.device) -> Tensor:
    """An int64 seed ``(1,)`` from the device's default generator (``torch.manual_seed``)."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def _products(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of ``factor * x``, 32-bit numbers held in int64 (which may wrap)."""
    product = x * factor
    return (product >> 32) & _LOW, product & _LOW


def words(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four words of Philox4x32-10 for 32-bit counters held in int64, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _products(_MULTIPLIERS[0], c0)
        high1, low1 = _products(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def kept(seed: Tensor, dropout_p: float, rows: Tensor, positions: Tensor) -> Tensor:
    """Whether each weight is kept, bool of the broadcast shape of ``rows`` and ``positions``.

    Args:
        seed: int64 ``(1,)``.
        rows: int64, the queries' indices ``r``.
        positions: int64, the keys' positions ``j``; -1 is allowed, its answer being arbitrary.
    """
    rows, positions = torch.broadcast_tensors(rows, positions)
    zero = torch.zeros_like(rows)
    drawn = words(seed, (rows & _LOW, (rows >> 32) & _LOW, (positions >> 2) & _LOW, zero))
    word = torch.stack(drawn, dim=-1).gather(-1, (positions & 3).unsqueeze(-1)).squeeze(-1)
    return word >= threshold(dropout_p)
