"""The attention family's Triton kernels in Triton's interpreter.

Beside what the family's own tests run on every backend: tiles smaller than the problem, caches,
launches.
"""

from __future__ import annotations

import pytest
import torch

from fmkernels import testing
from fmkernels._dispatch import UnsupportedError
from fmkernels.ops._triton.support import INTERPRETING
from fmkernels.ops.attention import reference
from fmkernels.ops.attention.schema import Options

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1"),
]
if INTERPRETING:
    from fmkernels.ops._triton.launch import config, observed_launches
    from fmkernels.ops.attention import triton as kernels
    from fmkernels.ops.attention import triton_cache
    from fmkernels.ops.attention import triton_configs as configs
    from fmkernels.ops.attention import triton_statistics as statistics_kernels

SEED = torch.tensor([0x123456789ABCDEF])
# batch, query heads, key heads, queries, keys, D, Dv
SHAPE = (2, 2, 1, 37, 50, 20, 33)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks of queries and of keys, neither dividing the problem."""
    for table in (configs.FORWARD, configs.KEYS_VALUES, configs.QUERIES, configs.MASK):
        tiles = {case: config(4, 1, BLOCK_M=32, BLOCK_N=32) for case in table["interpret"]}
        monkeypatch.setitem(table, "interpret", tiles)
    tiles = {case: config(4, 1, BLOCK_M=16, BLOCK_N=16) for case in configs.DECODE["interpret"]}
    monkeypatch.setitem(configs.DECODE, "interpret", tiles)


@pytest.fixture
def chunks(monkeypatch, small_tiles):
    """The backward as for the widest heads: the last chunk of SHAPE's features is not whole."""
    for table in (configs.KEYS_VALUES, configs.QUERIES, configs.MASK):
        tiles = config(4, 1, BLOCK_M=32, BLOCK_N=32, CHUNK=16)
        monkeypatch.setitem(table, "interpret", dict.fromkeys(table["interpret"], tiles))


def packed():
    """Sequences of which one has no queries, one no keys, and none ends where a block does."""
    return {
        "cu_seqlens_q": torch.tensor([0, 5, 5, 70, 90], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 7, 20, 20, 100], dtype=torch.int32),
    }


def mask_with_empty_row(*shape):
    mask = torch.randn(shape)
    mask[0, 0, 3] = float("-inf")
    return mask


CASES = {
    "plain": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 7, "window_right": 3},
    "behind": {"window_left": 40, "window_right": 0},
    "softcap": {"softcap": 2.0, "window_right": 0},
    "alibi": {"alibi_slopes": torch.tensor([[0.5, 0.1]]), "window_right": 0},
    "sinks": {"sinks": torch.tensor([0.5, float("-inf")])},
    "bool_mask": {"attn_mask": torch.arange(37 * 50).view(1, 1, 37, 50) % 3 > 0},
    "whole_mask": {"attn_mask": lambda: mask_with_empty_row(2, 2, 37, 50)},
    "mask_per_head": {"attn_mask": lambda: mask_with_empty_row(1, 2, 37, 50)},
    "mask_of_keys": {"attn_mask": lambda: torch.randn(2, 1, 1, 50)},
    "mask_of_queries": {"attn_mask": lambda: torch.randn(1, 2, 37, 1)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": SEED},
    "dropout_everything": {"dropout_p": 1.0, "dropout_seed": SEED},
    "everything": {
        "attn_mask": lambda: mask_with_empty_row(1, 2, 37, 50),
        "alibi_slopes": torch.tensor([[0.5, 0.1]]),
        "sinks": torch.tensor([0.5, -2.0]),
        "dropout_p": 0.2,
        "dropout_seed": SEED,
        "window_left": 30,
        "window_right": 4,
        "softcap": 3.0,
    },
    "packed": packed(),
    "packed_everything": {
        **packed(),
        "alibi_slopes": torch.rand(4, 2),
        "sinks": torch.tensor([0.5, -2.0]),
        "dropout_p": 0.2,
        "dropout_seed": SEED,
        "window_right": 0,
    },
    # Most queries are far from every key: what all distances have in common must not cancel.
    "few_keys": {
        "cu_seqlens_q": torch.tensor([0, 80, 90], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 3, 100], dtype=torch.int32),
        "alibi_slopes": torch.tensor([[0.5, 0.1]]),
        "sinks": torch.tensor([-40.0, -2.0]),
    },
}


def problem(case, dtype):
    """query, key, value, options"""
    batch, heads, shared, queries, keys, width, value_width = SHAPE
    given = {name: value() if callable(value) else value for name, value in CASES[case].items()}
    if "cu_seqlens_q" in given:
        batch, queries, keys = 1, 90, 100
    mask = given.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        given["attn_mask"] = mask.to(dtype)
    return (
        testing.normal(batch, heads, queries, width, dtype=dtype),
        testing.normal(batch, shared, keys, width, dtype=dtype),
        testing.normal(batch, shared, keys, value_width, dtype=dtype),
        Options(scale=width**-0.5, **given),
    )


def results(forward, backward, query, key, value, options, grads):
    """Outputs and every gradient by name."""
    mask = options.attn_mask
    needs = (
        True, True, True, mask is not None and mask.is_floating_point(),
        options.alibi_slopes is not None, options.sinks is not None,
    )  # fmt: skip
    output, lse = forward(query, key, value, *options)
    found = backward(*grads, query, key, value, output, lse, *options, *needs)
    names = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")
    named = {"output": output, "lse": lse}
    return named | {f"grad_{n}": g for n, g, need in zip(names, found, needs, strict=True) if need}


def doubled(tensor):
    floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    return tensor.double() if floating else tensor


HALF = (
    "plain", "softcap", "alibi", "sinks", "mask_of_keys", "everything", "packed_everything",
    "few_keys",
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(case, torch.float16) for case in HALF],
    ids=str,
)
def test_options_over_several_blocks(case, dtype, small_tiles):
    check(case, dtype)


@pytest.mark.parametrize("case", ["plain", "whole_mask", "everything", "packed_everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_backward_that_reads_features_in_chunks(case, dtype, chunks):
    check(case, dtype)


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "causal",
        "window",
        "behind",
        "softcap",
        "alibi",
        "sinks",
        "bool_mask",
        "whole_mask",
    ],
)
def test_statistics_over_several_blocks(case, small_tiles):
    query, key, _, options = problem(case, torch.float32)
    ours = statistics_kernels.sdpa_statistics(query, key, *options)
    plain = reference.sdpa_statistics(query, key, *options)
    exact = reference.sdpa_statistics(query.double(), key.double(), *map(doubled, options))
    for name, index in (("entropy", 0), ("top weight", 2), ("lse", 3)):
        testing.assert_within_policy(name, ours[index], plain[index], exact[index])
    assert torch.equal(ours[1], exact[1])


def check(case, dtype):
    """Outputs and every gradient, against float64."""
    query, key, value, options = problem(case, dtype)
    grads = (
        testing.normal(*query.shape[:3], value.size(3), dtype=dtype),
        testing.normal(*query.shape[:3]),
    )
    arguments = (query, key, value, options, grads)
    ours = results(kernels.sdpa_forward, kernels.sdpa_backward, *arguments)
    plain = results(reference.sdpa_forward, reference.sdpa_backward, *arguments)
    exact = results(
        reference.sdpa_forward,
        reference.sdpa_backward,
        *(tensor.double() for tensor in (query, key, value)),
        Options(*map(doubled, options)),
        tuple(grad.double() for grad in grads),
    )
    for name, wanted in exact.items():
        testing.assert_within_policy(name, ours[name], plain[name], wanted)


@pytest.mark.parametrize("page", [0, 8])
def test_cache(page, small_tiles):
    """Appending and attending; what lies past a sequence's end is never looked at."""
    batch, heads, shared, queries, capacity, width = 2, 4, 2, 3, 64, 20
    lengths = torch.tensor([capacity - queries, 5], dtype=torch.int32)
    table = None
    shape = (batch, shared, capacity, width)
    if page:
        pages = batch * capacity // page
        table = torch.randperm(pages).view(batch, -1).int()
        table[1, 1:] = 10**9
        shape = (pages, shared, page, width)
    caches = [testing.normal(*shape) for _ in range(2)]
    copies = [cache.clone() for cache in caches]
    new = [testing.normal(batch, shared, queries, width) for _ in range(2)]
    triton_cache.kv_cache_append(*caches, *new, lengths, table)
    reference.kv_cache_append(*copies, *new, lengths, table)
    for cache, copy in zip(caches, copies, strict=True):
        assert torch.equal(cache, copy)
        if not page:
            cache[1, :, 8:] = float("nan")
    arguments = (lengths + queries, table, None, torch.randn(heads), -1, 0, width**-0.5, 0.0)
    query = testing.normal(batch, heads, queries, width)
    output, lse = triton_cache.sdpa_cached(query, *caches, *arguments)
    wanted = reference.sdpa_cached(query, *copies, *arguments)
    assert torch.allclose(output, wanted[0], atol=2e-6)
    assert torch.allclose(lse, wanted[1], atol=2e-6)


def test_launches():
    """Forward one; backward three, one more for the gradient of a broadcast mask."""
    for case, backward in (("plain", 3), ("everything", 4), ("whole_mask", 3)):
        query, key, value, options = problem(case, torch.float32)
        grads = (testing.normal(*query.shape[:3], value.size(3)), None)
        with observed_launches() as seen:
            results(kernels.sdpa_forward, kernels.sdpa_backward, query, key, value, options, grads)
        assert len(seen) == 1 + backward, [launch.kernel for launch in seen]


def test_what_the_kernels_do_not_take():
    query = torch.zeros(1, 1, 4, 8)
    wide = torch.zeros(1, 1, 4, 1024)
    with pytest.raises(UnsupportedError, match="512"):
        kernels.sdpa_forward(query, query, wide, *Options())
