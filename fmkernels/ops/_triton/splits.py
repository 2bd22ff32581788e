"""The second phase of a reduction that was split over programs: sums the parts in fixed order.

Two launches instead of floating-point atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fmkernels.ops._triton.launch import accumulator_dtype, architecture, config, launch
from fmkernels.ops._triton.primitives import as_dtype

SUM_CONFIGS = {
    # Streams: four 16-byte loads of float32 per thread keep a chip's memory busy.
    arch: {"sum": config(4, 1, BLOCK=1024)}
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "interpret")
}


@triton.jit
def split_sum_kernel(
    first_ptr,
    first_out_ptr,
    first_size,
    second_ptr,
    second_out_ptr,
    second_size,
    splits,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[i] = sum_s parts[s, i]`` for two tensors; the second may be None, of size 0."""
    pid = tl.program_id(0)
    first_programs = tl.cdiv(first_size, BLOCK)
    if pid < first_programs:
        _sum_block(first_ptr, first_out_ptr, first_size, splits, pid, ACC, BLOCK)
    elif second_ptr is not None:
        block = pid - first_programs
        _sum_block(second_ptr, second_out_ptr, second_size, splits, block, ACC, BLOCK)


@triton.jit
def _sum_block(parts_ptr, out_ptr, size, splits, block, ACC: tl.constexpr, BLOCK: tl.constexpr):
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = tl.zeros((BLOCK,), ACC)
    for split in range(splits):
        part = parts_ptr + as_dtype(split, tl.int64) * size
        total += tl.load(part + offsets, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_splits(
    parts: Tensor, output: Tensor, second_parts: Tensor | None, second_output: Tensor | None
) -> None:
    """``output = parts.sum(0)``, and the same for the second pair, in one launch.

    Args:
        parts: (splits, ...) float32 or float64, contiguous.
        output: contiguous, of any floating dtype.
    """
    setting = SUM_CONFIGS[architecture()]["sum"]
    block = setting["BLOCK"]
    first = output.numel()
    second = 0 if second_output is None else second_output.numel()
    launch(
        split_sum_kernel,
        (triton.cdiv(first, block) + triton.cdiv(second, block),),
        setting,
        parts,
        output,
        first,
        second_parts,
        second_output,
        second,
        parts.shape[0],
        ACC=accumulator_dtype(parts),
    )
