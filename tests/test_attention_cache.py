"""attention_with_kv_cache: appending and attending, contiguous and paged."""

from __future__ import annotations

import pytest
import torch

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels._attention_oracle import attend
from fmkernels.ops.attention.backends import CACHED

BACKENDS = testing.available_backends(CACHED, torch.zeros(1, 1, 1, 1))
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

CAPACITY, PAGE = 96, 16
LENGTHS = [7, 0, 60, 93]


def make(dtype, queries, layout="heads_first", heads=8, shared=2, width=32, value_width=24):
    """Queries and caches whose unused rows are NaN, and what is in them: lists by sequence."""
    batch = len(LENGTHS)
    caches = []
    for columns in (width, value_width):
        shape = (batch, shared, CAPACITY, columns)
        if layout == "positions_first":
            cache = torch.full((batch, CAPACITY, shared, columns), float("nan"), dtype=dtype)
            cache = cache.transpose(1, 2)
        else:
            cache = torch.full(shape, float("nan"), dtype=dtype)
        for b, length in enumerate(LENGTHS):
            cache[b, :, :length] = testing.normal(shared, length, columns, dtype=dtype)
        caches.append(cache)
    query = testing.normal(batch, heads, queries, width, dtype=dtype)
    return query, *caches


def paged(cache, order):
    """The same cache as a pool of pages in the given order, and its page table."""
    batch, shared, _, width = cache.shape
    pages = CAPACITY // PAGE
    pool = torch.full((batch * pages + 3, shared, PAGE, width), float("nan"), dtype=cache.dtype)
    table = order.view(batch, pages).to(torch.int32)
    for b in range(batch):
        for p in range(pages):
            pool[table[b, p]] = cache[b, :, p * PAGE : (p + 1) * PAGE]
    return pool, table


def expected(query, key_cache, value_cache, lengths, dtype, alibi_slopes=None, **options):
    """Each sequence alone, in ``dtype``."""
    outputs, queries = [], query.size(2)
    for b, length in enumerate(lengths):
        keys = key_cache[b : b + 1, :, :length].to(dtype)
        if length == 0:
            outputs.append(query.new_zeros(1, query.size(1), queries, value_cache.size(3)))
            continue
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        outputs.append(
            attend(
                query[b : b + 1].to(dtype),
                keys,
                value_cache[b : b + 1, :, :length].to(dtype),
                None,
                slopes,
                first_position=length - queries,
                **options,
            )
        )
    return torch.cat(outputs)


def assert_close(actual, query, caches, lengths, **options):
    exact = expected(query, *caches, lengths, torch.float64, **options)
    torchs = expected(query, *caches, lengths, query.dtype, **options)
    testing.assert_within_policy("output", actual, torchs, exact)


@backends
@dtypes
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("layout", ["heads_first", "positions_first"])
def test_appends_and_attends(backend, dtype, queries, layout):
    query, *caches = make(dtype, queries, layout)
    new = [testing.normal(4, 2, queries, cache.size(3), dtype=dtype) for cache in caches]
    lengths = torch.tensor(LENGTHS)
    wanted = [cache.clone() for cache in caches]
    for cache, addition in zip(wanted, new, strict=True):
        for b, length in enumerate(LENGTHS):
            cache[b, :, length : length + queries] = addition[b]
    output = FF.attention_with_kv_cache(
        query, *caches, *new, cache_seqlens=lengths, backend=backend
    )
    for cache, other in zip(caches, wanted, strict=True):
        torch.testing.assert_close(cache, other, equal_nan=True, rtol=0, atol=0)
    assert_close(output, query, caches, [n + queries for n in LENGTHS], is_causal=True)


@backends
@dtypes
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_pages(backend, dtype, queries):
    query, *caches = make(dtype, queries)
    if queries == 20:
        caches = [cache.nan_to_num() for cache in caches]
    order = torch.randperm(4 * CAPACITY // PAGE)
    (key_pool, table), (value_pool, _) = (paged(cache, order) for cache in caches)
    table[1] = -7  # nothing of an empty sequence is read
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    output = FF.attention_with_kv_cache(
        query, key_pool, value_pool, cache_seqlens=lengths, page_table=table, backend=backend
    )
    assert_close(output, query, caches, LENGTHS, is_causal=True)


@backends
def test_appends_to_pages(backend):
    query, *caches = make(torch.float32, 2)
    order = torch.randperm(4 * CAPACITY // PAGE)
    (key_pool, table), (value_pool, _) = (paged(cache, order) for cache in caches)
    new = [testing.normal(4, 2, 2, cache.size(3)) for cache in caches]
    lengths = torch.tensor(LENGTHS)
    output = FF.attention_with_kv_cache(
        query,
        key_pool,
        value_pool,
        *new,
        cache_seqlens=lengths,
        page_table=table,
        backend=backend,
    )
    plain = FF.attention_with_kv_cache(
        query, *caches, *new, cache_seqlens=lengths, backend="reference"
    )
    torch.testing.assert_close(output, plain)
    for pool, cache in zip((key_pool, value_pool), caches, strict=True):
        again, _ = paged(cache, order)
        torch.testing.assert_close(pool, again, equal_nan=True)


OPTIONS = {
    "full": {"is_causal": False},
    "window": {"window": (20, 0)},
    "window_left": {"window": (20, -1), "is_causal": False},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.2},
    "alibi": {"alibi_slopes": torch.rand(8) / 4},
    "alibi_by_batch": {"alibi_slopes": torch.rand(4, 8) / 4},
    "sinks": {"sinks": torch.randn(8)},
    "all": {
        "window": (30, 2),
        "softcap": 1.5,
        "alibi_slopes": torch.rand(8) / 4,
        "sinks": torch.randn(8),
    },
}


@backends
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("queries", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_options(backend, options, queries, dtype):
    query, *caches = make(dtype, queries)
    output = FF.attention_with_kv_cache(
        query, *caches, cache_seqlens=torch.tensor(LENGTHS), **options, backend=backend
    )
    assert_close(output, query, caches, LENGTHS, **{"is_causal": True} | options)


@backends
@pytest.mark.parametrize("heads", [1, 2])
def test_one_long_sequence(backend, heads):
    """Few heads: the keys are shared out among the threads."""
    query = testing.normal(1, heads, 1, 64)
    caches = [testing.normal(1, 1, 5000, 64) for _ in range(2)]
    output, lse = FF.attention_with_kv_cache(
        query, *caches, cache_seqlens=4999, return_lse=True, backend=backend
    )
    assert_close(output, query, caches, [4999])
    scores = (query @ caches[0][:, :, :4999].transpose(-1, -2)).double() / 8
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


@backends
def test_an_int_is_every_length(backend):
    query = testing.normal(2, 4, 1, 16)
    caches = [testing.normal(2, 4, 10, 16) for _ in range(2)]
    output = FF.attention_with_kv_cache(query, *caches, cache_seqlens=6, backend=backend)
    expected = FF.scaled_dot_product_attention(query, *(c[:, :, :6] for c in caches))
    torch.testing.assert_close(output, expected)


@backends
@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "capacity"])
def test_empty(backend, empty):
    sizes = {"batch": 2, "heads": 4, "queries": 1, "capacity": 8} | {empty: 0}
    query = torch.randn(sizes["batch"], sizes["heads"], sizes["queries"], 16)
    caches = [torch.randn(sizes["batch"], 2, sizes["capacity"], 16) for _ in range(2)]
    output = FF.attention_with_kv_cache(
        query, *caches, cache_seqlens=min(3, sizes["capacity"]), backend=backend
    )
    assert output.shape == query.shape
    assert empty != "capacity" or (output == 0).all()


@backends
def test_compiled(backend):
    query, *caches = make(torch.float32, 1)
    new = [testing.normal(4, 2, 1, cache.size(3)) for cache in caches]
    lengths = torch.tensor(LENGTHS)

    def attention(query, key_cache, value_cache, key, value):
        return FF.attention_with_kv_cache(
            query, key_cache, value_cache, key, value, cache_seqlens=lengths, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    copies = [cache.clone() for cache in caches]
    expected = attention(query, *caches, *new)
    torch.testing.assert_close(compiled(query, *copies, *new), expected)
    for cache, copy in zip(caches, copies, strict=True):
        torch.testing.assert_close(cache, copy, equal_nan=True)


BAD = {
    "too_long": ({"cache_seqlens": torch.tensor([3, 9])}, "cache_seqlens"),
    "no_room": ({"cache_seqlens": 8, "key": torch.zeros(2, 2, 1, 16)}, "cache_seqlens"),
    "negative": ({"cache_seqlens": torch.tensor([3, -1])}, "cache_seqlens"),
    "negative_int": ({"cache_seqlens": -1}, "cache_seqlens"),
    "float_lengths": ({"cache_seqlens": torch.tensor([3.0, 2.0])}, "cache_seqlens"),
    "count": ({"cache_seqlens": torch.tensor([3])}, "cache_seqlens"),
    "batch": ({"key_cache": torch.zeros(3, 2, 8, 16)}, "key_cache"),
    "heads": ({"key_cache": torch.zeros(2, 3, 8, 16)}, "key_cache"),
    "features": ({"key_cache": torch.zeros(2, 2, 8, 15)}, "key_cache"),
    "capacity": ({"value_cache": torch.zeros(2, 2, 7, 16)}, "value_cache"),
    "key_alone": ({"key": torch.zeros(2, 2, 1, 16), "value": None}, "key and value"),
    "key_shape": ({"key": torch.zeros(2, 3, 1, 16)}, "key"),
    "page_dtype": ({"page_table": torch.zeros(2, 1)}, "page_table"),
    "page_rank": ({"page_table": torch.zeros(2, dtype=torch.int32)}, "page_table"),
    "gradient": ({"query": torch.zeros(2, 4, 1, 16, requires_grad=True)}, "gradient"),
}


@backends
@pytest.mark.parametrize(("change", "name"), BAD.values(), ids=BAD.keys())
def test_refuses(backend, change, name):
    arguments = {
        "query": torch.zeros(2, 4, 1, 16),
        "key_cache": torch.zeros(2, 2, 8, 16),
        "value_cache": torch.zeros(2, 2, 8, 16),
        "cache_seqlens": 5,
        "backend": backend,
    }
    FF.attention_with_kv_cache(**arguments)
    if "key" in change:
        arguments["value"] = torch.zeros(2, 2, 1, 16)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=name):
        FF.attention_with_kv_cache(**arguments | change)


@pytest.mark.parametrize("pages", [None, 2])
def test_a_length_given_as_an_int_is_checked_on_every_device(pages):
    """No device has to be waited for: meta tensors, which have no values, stand for a GPU's."""
    table = None if pages is None else torch.zeros(2, pages, dtype=torch.int32, device="meta")
    query = torch.zeros(2, 4, 1, 16, device="meta")
    cache = torch.zeros(2, 2, 8, 16, device="meta")
    capacity = 8 * (pages or 1)
    new = torch.zeros(2, 2, 3, 16, device="meta")
    for added in ((), (new, new)):
        most = capacity - (3 if added else 0)
        arguments = (query, cache, cache, *added)
        FF.attention_with_kv_cache(*arguments, cache_seqlens=most, page_table=table)
        with pytest.raises(ValueError, match=f"cache_seqlens.* capacity of {capacity}"):
            FF.attention_with_kv_cache(*arguments, cache_seqlens=most + 1, page_table=table)
