"""Decode attention on a CUDA C++ kernel: see csrc/cuda/attention_decode.h.

``sdpa_decode``
    One query per sequence, ``(B, Hq, 1, D)``, at the end of a cache: ``sdpa_cached`` of schema.py
    for that case, D equal for keys and values, a multiple of 8 and at most 256. Rows of features
    and their strides are multiples of 16 bytes. Inference only: there is no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Support
from fmkernels.ops._cuda_support import cuda_support, problem_of
from fmkernels.ops.attention.schema import Options

_VECTOR_BYTES = 16

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define(
    "sdpa_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seqlens, "
    "Tensor? page_table, Tensor? alibi_slopes, Tensor? sinks, int window_left, float scale, "
    "float softcap) -> (Tensor output, Tensor lse)"
)
_library.define(
    "sdpa_decode_problem(int device, str dtype, int batch, int query_heads, int kv_heads, "
    "int features, int capacity) -> str"
)


@torch.library.register_fake("fmkernels::sdpa_decode", lib=_library)
def _decode_fake(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return query.new_empty(query.shape), lse


# Decoding is bound by reading the cache: here all query heads of a key head share one read,
# asynchronous copies of 16 bytes keep two tiles in flight, and small grids are split over keys.
# From counts of bytes, not measured.
def decode_supports(
    query: Tensor,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    paged: bool = False,
    options: Options | None = None,
) -> Support:
    """Whether the kernel serves a call of attention with a cache."""
    support = cuda_support(query)
    if not support.ok or key_cache is None or value_cache is None:
        return support
    features = query.size(-1)
    if query.size(2) != 1:
        return Support(False, f"takes one query per sequence, got {query.size(2)}")
    if value_cache.size(-1) != features:
        return Support(False, "takes as many features of a value as of a key")
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        if not _vectors_aligned(tensor):
            return Support(False, f"reads vectors of 16 bytes, which {name} does not align")
    # Of pages the table, which only the kernel sees, says how many keys a sequence may have.
    capacity = 0 if paged else key_cache.size(2)
    heads = query.size(1), key_cache.size(1)
    problem = problem_of(
        "sdpa_decode_problem", query.device.index, query.dtype, query.size(0), *heads, features,
        capacity,
    )  # fmt: skip
    return Support(False, problem) if problem else SUPPORTED


def _vectors_aligned(tensor: Tensor) -> bool:
    strides = [tensor.stride(d) for d in range(tensor.dim() - 1) if tensor.size(d) > 1]
    bytes_apart = [stride * tensor.element_size() for stride in strides]
    # Tracers have no addresses; the kernel checks.
    fake = torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)
    start = 0 if fake else tensor.data_ptr()
    return all(n % _VECTOR_BYTES == 0 for n in (start, *bytes_apart))


def sdpa_cached(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens: Tensor,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The op ``sdpa_cached`` for one query per sequence, which no key lies right of."""
    if not _vectors_aligned(query):
        query = query.clone(memory_format=torch.contiguous_format)
    return torch.ops.fmkernels.sdpa_decode(
        query, key_cache, value_cache, seqlens, page_table, alibi_slopes, sinks, window_left,
        scale, softcap,
    )  # fmt: skip
