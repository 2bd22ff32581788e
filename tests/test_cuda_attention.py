"""The CUDA decode kernel, executed on the CPU, against attention in float64."""

from __future__ import annotations

import pytest
import torch

from fmkernels import testing
from fmkernels.ops.attention import cuda  # noqa: F401 - defines the op

pytestmark = [pytest.mark.emu, pytest.mark.usefixtures("emulated_cuda")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.dtype_name)


def decode(query, key, value, lengths, table=None, slopes=None, sinks=None, *, window=-1,
           scale=0.25, softcap=0.0):  # fmt: skip
    return torch.ops.fmkernels.sdpa_decode(
        query, key, value, lengths, table, slopes, sinks, window, scale, softcap
    )


def in_torch(query, key, value, lengths, slopes=None, sinks=None, *, window=-1, scale=0.25,
             softcap=0.0):  # fmt: skip
    """Contiguous caches. Scores and softmax in float32 at least, as torch's kernel has them."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    shared = query.size(1) // key.size(1)
    key = key.repeat_interleave(shared, dim=1).to(dtype)
    value = value.repeat_interleave(shared, dim=1)
    scores = scale * (query.to(dtype) @ key.transpose(-1, -2))
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    distance = (lengths.view(-1, 1, 1, 1) - 1) - torch.arange(key.size(2))
    if slopes is not None:
        scores = scores - slopes.to(dtype).view(slopes.size(0), -1, 1, 1) * distance
    hidden = distance < 0
    if window >= 0:
        hidden = hidden | (distance > window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(1, -1, 1, 1).expand(
            scores.size(0), -1, 1, 1)], dim=-1)  # fmt: skip
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1)).exp()
    weights = weights[..., : value.size(2)].to(query.dtype)
    # What lies past a sequence's end may be anything.
    value = value.masked_fill((distance < 0).transpose(-1, -2), 0.0)
    return weights @ value, lse


def caches(dtype, batch, heads, capacity, features, lengths):
    """NaN past each sequence's end: reading there shows."""
    key = testing.normal(batch, heads, capacity, features, dtype=dtype)
    value = testing.normal(batch, heads, capacity, features, dtype=dtype)
    for b, length in enumerate(lengths.tolist()):
        key[b, :, length:] = value[b, :, length:] = float("nan")
    return key, value


def check(
    dtype,
    lengths,
    *,
    query_heads=4,
    kv_heads=2,
    features=64,
    capacity=None,
    page_size=None,
    slopes=None,
    sinks=None,
    **options,
):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    batch = lengths.numel()
    capacity = capacity or max(int(lengths.max()), 1)
    query = testing.normal(batch, query_heads, 1, features, dtype=dtype)
    key, value = caches(dtype, batch, kv_heads, capacity, features, lengths)
    plain_key = key.masked_fill(key.isnan(), 0.0)
    exact = in_torch(
        query.double(), plain_key.double(), value.double(), lengths, slopes, sinks, **options
    )
    from_torch = in_torch(query, plain_key, value, lengths, slopes, sinks, **options)
    table = None
    if page_size is not None:
        key, value, table = paged(key, value, page_size)
    output, lse = decode(query, key, value, lengths, table, slopes, sinks, **options)
    testing.assert_within_policy("output", output, from_torch[0], exact[0])
    testing.assert_within_policy("lse", lse, from_torch[1], exact[1])


def paged(key, value, page_size):
    """The caches in pages of a pool, in no order; the pool's other pages hold NaN."""
    batch, heads, capacity, features = key.shape
    per_sequence = -(-capacity // page_size)
    table = torch.randperm(batch * per_sequence + 3)[: batch * per_sequence]
    table = table.view(batch, per_sequence).to(torch.int32)
    pools = []
    for cache in (key, value):
        pool = cache.new_full((batch * per_sequence + 3, heads, page_size, features), float("nan"))
        for b in range(batch):
            for page in range(per_sequence):
                rows = cache[b, :, page * page_size : (page + 1) * page_size]
                pool[int(table[b, page]), :, : rows.size(1)] = rows
        pools.append(pool)
    return *pools, table


@dtypes
@pytest.mark.parametrize("features", [8, 64, 72, 128, 256])
def test_features(dtype, features):
    check(dtype, [5, 70], features=features)


@dtypes
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(1, 1), (6, 2), (8, 1), (20, 1), (32, 1)])
def test_heads(dtype, query_heads, kv_heads):
    check(dtype, [33], query_heads=query_heads, kv_heads=kv_heads)


@dtypes
@pytest.mark.parametrize("length", [1, 15, 16, 31, 63, 64, 65, 129, 300])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_lengths_around_tiles(dtype, length, multiprocessors, monkeypatch):
    """One block that goes from tile to tile, and a block for each."""
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", str(multiprocessors))
    check(dtype, [length], query_heads=2, capacity=310)


@dtypes
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_splits(dtype, multiprocessors, monkeypatch):
    """Some of the splits get no key at all."""
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", str(multiprocessors))
    check(dtype, [700, 40], query_heads=2, kv_heads=1, capacity=720)


@dtypes
@pytest.mark.parametrize("page_size", [1, 16, 48, 128])
def test_pages(dtype, page_size):
    check(dtype, [130, 7], page_size=page_size)


@dtypes
@pytest.mark.parametrize("window", [0, 10, 100, 500])
def test_window(dtype, window):
    check(dtype, [400, 12], window=window, query_heads=2)


@dtypes
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_softcap_slopes_and_sinks(dtype, multiprocessors, monkeypatch):
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", str(multiprocessors))
    for rows in (1, 2):
        check(
            dtype,
            [400, 12],
            softcap=5.0,
            slopes=testing.normal(rows, 4).abs() * 0.1,
            sinks=testing.normal(4, 1).flatten(),
        )


@dtypes
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_sequences_without_keys(dtype, multiprocessors, monkeypatch):
    """Zeros; the denominator is that of the sink, if there is one."""
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", str(multiprocessors))
    for sinks in (None, testing.normal(4, 1).flatten()):
        check(dtype, [0, 3], sinks=sinks, capacity=400)


@dtypes
def test_strided_operands(dtype):
    """Caches and query as a model keeps them: positions before heads."""
    lengths = torch.tensor([40], dtype=torch.int32)
    query = testing.normal(1, 1, 4, 64, dtype=dtype).transpose(1, 2)
    key, value = (testing.normal(1, 40, 2, 64, dtype=dtype).transpose(1, 2) for _ in range(2))
    output, lse = decode(query, key, value, lengths)
    expected = decode(query.contiguous(), key.contiguous(), value.contiguous(), lengths)
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])


@dtypes
def test_lengths_and_pages_that_do_not_exist(dtype):
    """Read as the cache's end, and as zeros: on a device they cannot be checked beforehand."""
    query = testing.normal(2, 2, 1, 64, dtype=dtype)
    key, value = (testing.normal(2, 1, 20, 64, dtype=dtype) for _ in range(2))
    beyond, fitting = (torch.tensor(n, dtype=torch.int32) for n in ([100, -3], [20, 0]))
    for ours, expected in zip(
        decode(query, key, value, beyond), decode(query, key, value, fitting), strict=True
    ):
        assert torch.equal(ours, expected)
    table = torch.tensor([[0, 7], [-1, 1]], dtype=torch.int32)
    lengths = torch.tensor([40, 40], dtype=torch.int32)
    output, lse = decode(query, key, value, lengths, table)
    assert output.isfinite().all() and lse.isfinite().all()


@dtypes
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_nan_and_infinity_are_seen(dtype, multiprocessors, monkeypatch):
    """In a part of a split sequence, in all of a sequence, and where nothing else is affected."""
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", str(multiprocessors))
    lengths = torch.tensor([300, 300, 2, 300], dtype=torch.int32)
    query = testing.normal(4, 2, 1, 16, dtype=dtype)
    key, value = (testing.normal(4, 1, 320, 16, dtype=dtype) for _ in range(2))
    key[0, :, 200, 3] = float("nan")
    value[1, :, 100, 5] = float("inf")
    query[2] = float("nan")
    output, lse = decode(query, key, value, lengths)
    expected, expected_lse = in_torch(query, key, value, lengths)
    assert expected[0].isnan().all() and expected[2].isnan().all()
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf()) and output.isinf().sum() == 2
    assert torch.equal(lse.isnan(), expected_lse.isnan())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 32, 8, 128, 4096), ""),
        ((65535, 32, 8, 128, 2**31 - 65), ""),
        ((70000, 32, 8, 128, 4096), "65535 sequences"),
        ((60000, 60000, 60000, 128, 4096), "65535 sequences and blocks of heads"),
        ((1, 32, 8, 128, 2**31 - 1), "caches of up to"),
        ((1, 32, 8, 100, 4096), "multiples of 8 features up to 256, got 100"),
    ],
)
def test_limits_of_a_grid(sizes, message):
    problem = torch.ops.fmkernels.sdpa_decode_problem(0, "bfloat16", *sizes)
    assert message in problem and bool(problem) == bool(message)


def test_every_width_fits_an_a100(monkeypatch):
    monkeypatch.setenv("FMK_EMU_SHARED", "166912")
    for name in ("float32", "bfloat16", "float16"):
        assert torch.ops.fmkernels.sdpa_decode_problem(0, name, 1, 32, 8, 256, 4096) == ""


def test_large_scores_do_not_overflow():
    check(torch.float32, [100], scale=1000.0)
    check(torch.float16, [100], scale=30.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 4, 2, 64)}, "query: expected one query"),
        ({"query": torch.zeros(1, 3, 1, 64)}, "key_cache: expected a divisor of 3 heads"),
        ({"key": torch.zeros(1, 2, 10, 32)}, "key_cache: expected shape"),
        ({"value": torch.zeros(1, 2, 9, 64)}, "value_cache: expected shape"),
        ({"key": torch.zeros(1, 2, 10, 64).half()}, "key_cache: expected the query's dtype"),
        ({"lengths": torch.zeros(1, dtype=torch.int64)}, "seqlens: expected another dtype"),
        ({"sinks": torch.zeros(3)}, "sinks: expected shape"),
    ],
)
def test_bad_operands_are_named(change, message):
    operands = {
        "query": torch.zeros(1, 4, 1, 64),
        "key": torch.zeros(1, 2, 10, 64),
        "value": torch.zeros(1, 2, 10, 64),
        "lengths": torch.ones(1, dtype=torch.int32),
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        decode(**operands)
