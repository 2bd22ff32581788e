"""Schemas and fake kernels of the normalisation ops.

norm_forward: ``output = normalise(s) * weight + bias`` with ``s = dropout(input) + residual``,
over the last dimension. ``input``, ``residual``, ``output`` and ``sum`` are (..., F) contiguous,
``weight`` and ``bias`` (F), all of one dtype. Layer norm (Ba et al. 2016):
``normalise(s) = (s - mean(s)) * rstd``, ``rstd = 1 / sqrt(var(s) + eps)``; with ``rms`` (Zhang and
Sennrich 2019): ``s * rstd``, ``rstd = 1 / sqrt(mean(s**2) + eps)``. Statistics are those of ``s``
rounded to its dtype. ``sum`` is ``s`` if there is a residual and (``save_for_backward`` or
``return_sum``), else empty. ``mean`` and ``rstd`` have the shape of input without its last
dimension, in float32 (float64 for float64), and are empty unless ``save_for_backward``; ``mean``
is empty for rms. ``dropout_p`` is 0 without a residual; ``seed``, int64 of shape (1,), is given if
it is not 0 (fmkernels/ops/_dropout.py).

norm_inference: that output alone, without dropout, which small calls get in less time.

norm_backward: ``sum`` is the op's ``sum`` or, without a residual, its input. ``grad_sum`` is the
gradient of ``sum`` where that was a result. The gradient of the residual is that of ``s``, and so
is that of the input unless dropout acts. An empty tensor of shape (0,) stands for every gradient
that is not asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define(
    "norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, bool rms, "
    "float eps, float dropout_p, Tensor? seed, bool save_for_backward, bool return_sum) "
    "-> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)"
)
_library.define(
    "norm_inference(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, bool rms, "
    "float eps) -> Tensor"
)
_library.define(
    "norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor mean, "
    "Tensor rstd, bool rms, float dropout_p, Tensor? seed, bool need_input, bool need_residual, "
    "bool need_weight, bool need_bias) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
)


@torch.library.register_fake("fmkernels::norm_forward", lib=_library)
def _norm_forward_fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    save_for_backward: bool,
    return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep_sum = residual is not None and (save_for_backward or return_sum)
    rows, dtype = input.shape[:-1], opmath_dtype(input.dtype)
    return (
        input.new_empty(input.shape),
        input.new_empty(input.shape if keep_sum else (0,)),
        input.new_empty(rows if save_for_backward and not rms else (0,), dtype=dtype),
        input.new_empty(rows if save_for_backward else (0,), dtype=dtype),
    )


@torch.library.register_fake("fmkernels::norm_inference", lib=_library)
def _norm_inference_fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> Tensor:
    return input.new_empty(input.shape)


@torch.library.register_fake("fmkernels::norm_backward", lib=_library)
def _norm_backward_fake(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = (sum.shape[-1],)
    return (
        sum.new_empty(sum.shape if need_input else (0,)),
        sum.new_empty(sum.shape if need_residual else (0,)),
        sum.new_empty(features if need_weight else (0,)),
        sum.new_empty(features if need_bias else (0,)),
    )
