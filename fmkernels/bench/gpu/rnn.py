"""The rnn family's kernels and the production shapes that they are compiled at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmkernels.bench.gpu.registry import Case, Kernel
from fmkernels.ops.rnn import triton as kernels
from fmkernels.ops.rnn import triton_configs as configs
from fmkernels.ops.rnn.schema import PLAIN_LSTM, LSTMOptions

KERNELS = tuple(
    Kernel(f"{kind}_{part}_kernel", table, matrix=True, m_block="BLOCK_B")
    for kind in ("lstm", "gru", "rnn")
    for part, table in (
        ("sequence_fwd", configs.SEQUENCE[kind]),
        ("sequence_bwd", configs.SEQUENCE[kind]),
        ("step_fwd", configs.STEP_FORWARD),
        ("step_bwd", configs.STEP_BACKWARD),
    )
)


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lstm(
    steps: int,
    batch: int,
    hidden: int,
    *,
    options: LSTMOptions = PLAIN_LSTM,
    projected: int = 0,
    masks: bool = False,
) -> Callable[[torch.dtype], None]:
    """Forward and backward of one unidirectional layer with every gradient."""
    width = projected or hidden

    def call(dtype: torch.dtype) -> None:
        input = _meta(dtype, steps, batch, hidden)
        h0, c0 = _meta(dtype, 1, batch, width), _meta(dtype, 1, batch, hidden)
        weights = [_meta(dtype, 4 * hidden, hidden), _meta(dtype, 4 * hidden, width)]
        weights += [_meta(dtype, 4 * hidden)] * 2
        if projected:
            weights.append(_meta(dtype, width, hidden))
        if options.peephole:
            weights.append(_meta(dtype, 3, hidden))
        if options.layer_norm:
            weights += [_meta(dtype, 4 * hidden)] * 2 + [_meta(dtype, hidden)] * 2
        extras: list[Tensor | None] = [None] * 4
        if masks:
            extras = [
                _meta(torch.int64, batch),
                _meta(dtype, 1, batch, width),
                _meta(torch.bool, 1, steps, batch, width),
                _meta(torch.bool, 1, steps, batch, hidden),
            ]
        shared = (*extras, *options, False)
        output, h_n, c_n, _, saved = kernels.lstm_forward(
            input, h0, c0, weights, None, *shared, False, True
        )
        kernels.lstm_backward(
            output, h_n, c_n, None, input, h0, c0, weights, output, saved, *shared,
            True, True, True,
        )  # fmt: skip

    return call


def _gru(steps: int, batch: int, hidden: int) -> Callable[[torch.dtype], None]:
    def call(dtype: torch.dtype) -> None:
        input, h0 = _meta(dtype, steps, batch, hidden), _meta(dtype, 1, batch, hidden)
        weights = [_meta(dtype, 3 * hidden, hidden)] * 2 + [_meta(dtype, 3 * hidden)] * 2
        output, h_n, gates = kernels.gru_forward(input, h0, weights, None, None, True, False, True)
        kernels.gru_backward(
            output, h_n, input, h0, weights, output, gates, None, True, False, True, True, True
        )

    return call


def _rnn(steps: int, batch: int, hidden: int) -> Callable[[torch.dtype], None]:
    def call(dtype: torch.dtype) -> None:
        input, h0 = _meta(dtype, steps, batch, hidden), _meta(dtype, 1, batch, hidden)
        weights = [_meta(dtype, hidden, hidden)] * 2 + [_meta(dtype, hidden)] * 2
        output, h_n = kernels.rnn_forward(input, h0, weights, None, None, "tanh", True, False)
        kernels.rnn_backward(
            output, h_n, input, h0, weights, output, None, "tanh", True, False, True, True, True
        )

    return call


def _several(calls: Sequence[Callable[[torch.dtype], None]]) -> Callable[[torch.dtype], None]:
    def call(dtype: torch.dtype) -> None:
        for one in calls:
            one(dtype)

    return call


_VARIANTS = PLAIN_LSTM._replace(peephole=True, zoneout=0.1)
_NORMED = _VARIANTS._replace(layer_norm=True)
_NVIDIA = ("sm_80", "sm_90", "sm_100")


def _all(steps: int, batch: int, hidden: int) -> Callable[[torch.dtype], None]:
    """All three kinds."""
    return _several([kind(steps, batch, hidden) for kind in (_lstm, _gru, _rnn)])


CASES = (
    # Whole sequences: 100 steps of 64 sequences.
    Case("h16", _all(100, 64, 16), dtypes=("bf16",)),
    Case("h32", _all(100, 64, 32), dtypes=("bf16", "fp32")),
    Case("h64", _all(100, 64, 64), dtypes=("bf16",)),
    Case("gru_h64", _gru(100, 64, 64), dtypes=("fp16",)),
    Case("h64_wide", _all(100, 64, 64), dtypes=("fp32", "tf32"), archs=_NVIDIA),
    Case("h128", _all(100, 64, 128), dtypes=("bf16",), archs=_NVIDIA),
    Case("rnn_h64", _rnn(100, 64, 64), dtypes=("fp32",), archs=("gfx942",)),
    Case("rnn_h128", _rnn(100, 64, 128), dtypes=("bf16",), archs=("gfx942",)),
    Case("rnn_h256", _rnn(100, 64, 256), dtypes=("bf16",), archs=_NVIDIA),
    Case("variants_h64", _lstm(100, 64, 64, options=_VARIANTS, masks=True), dtypes=("bf16",)),
    Case("norm_h16", _lstm(100, 64, 16, options=_NORMED, masks=True), dtypes=("bf16",)),
    Case("norm_h32", _lstm(100, 64, 32, options=_NORMED, masks=True), dtypes=("bf16", "fp32")),
    Case("norm_h64", _lstm(100, 64, 64, options=_NORMED, projected=32, masks=True),
         dtypes=("bf16",)),
    Case("norm_h64_wide", _lstm(100, 64, 64, options=_NORMED, projected=32, masks=True),
         dtypes=("fp32",), archs=_NVIDIA),
    Case("norm_h128", _lstm(100, 64, 128, options=_NORMED, projected=64, masks=True),
         dtypes=("bf16",), archs=_NVIDIA),
    # A launch per step; a cell, which projects its input itself.
    Case("steps_h1024", _all(3, 128, 1024), dtypes=("bf16", "fp32")),
    Case("steps_few_h1024", _all(3, 8, 1024), dtypes=("bf16", "fp32")),
    Case("cell_h1024", _all(1, 128, 1024), dtypes=("bf16",)),
    # Rows of 100 and of 2002 bytes.
    Case("unaligned_h50", _all(100, 64, 50), dtypes=("bf16",), aligned=False),
    Case("unaligned_h1001", _all(3, 128, 1001), dtypes=("bf16",), aligned=False),
)  # fmt: skip
