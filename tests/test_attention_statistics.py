"""attention_statistics against the weights themselves."""

from __future__ import annotations

import pytest
import torch

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels._attention_oracle import attend
from fmkernels.ops.attention import reference
from fmkernels.ops.attention.backends import STATISTICS
from fmkernels.ops.attention.schema import Options

BACKENDS = testing.available_backends(STATISTICS, torch.zeros(1, 1, 1, 1), Options())
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)


def expected(query, key, attn_mask=None, alibi_slopes=None, sinks=None, **options):
    """From the matrix of weights, in float64: values of a unit matrix give the weights."""
    query, key = query.double(), key.double()
    values = torch.eye(key.size(2), dtype=torch.float64).expand(*key.shape[:2], -1, -1)
    weights, lse = attend(
        query, key, values, attn_mask, alibi_slopes, sinks, **options, return_lse=True
    )
    entropy = -torch.xlogy(weights, weights).sum(-1)
    if sinks is not None:
        share = (sinks.double()[:, None] - lse).exp()
        entropy = entropy - torch.xlogy(share, share)
    top_weight, top_key = weights.max(-1)
    return entropy, top_key, top_weight, lse


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.randn(2, 1, 40, 70)},
    "bool": {"attn_mask": torch.rand(40, 70) > 0.4},
    "window": {"window": (9, 4)},
    "softcap": {"softcap": 1.0},
    "alibi": {"alibi_slopes": torch.rand(4)},
    "sinks": {"sinks": torch.randn(4) + 2},
    "scale": {"scale": -0.5},
}


@backends
@dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_statistics(backend, dtype, options):
    query = testing.normal(2, 4, 40, 16, dtype=dtype)
    key = testing.normal(2, 2, 70, 16, dtype=dtype)
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options = options | {"attn_mask": options["attn_mask"].to(dtype)}
    actual = FF.attention_statistics(query, key, enable_gqa=True, **options, backend=backend)
    entropy, top_key, top_weight, lse = expected(query, key, **options)
    bound = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 1e-4)
    tolerance = {"rtol": bound, "atol": bound}
    for one, other in zip(
        (actual.entropy, actual.top_weight, actual.lse), (entropy, top_weight, lse), strict=True
    ):
        torch.testing.assert_close(one.double(), other, **tolerance)
    assert actual.top_key.dtype == torch.int64
    # Of two nearly equal weights either may be the larger.
    differs = actual.top_key != top_key
    assert differs.double().mean() < 0.02
    assert actual.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@backends
@pytest.mark.parametrize("shape", [(40, 16), (3, 40, 16), (2, 1, 3, 40, 16)], ids=str)
def test_other_ranks(backend, shape):
    query = testing.normal(*shape)
    actual = FF.attention_statistics(query, query, backend=backend)
    flat = query.reshape(1, -1, 40, 16)
    wanted = expected(flat, flat)
    for one, other in zip(actual, wanted, strict=True):
        assert one.shape == shape[:-1]
        torch.testing.assert_close(
            one.reshape(other.shape).to(other.dtype), other, rtol=1e-5, atol=1e-5
        )


@backends
def test_rows_without_keys(backend):
    query, mask = testing.normal(1, 1, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    actual = FF.attention_statistics(query, query, mask, backend=backend)
    assert actual.top_key[0, 0, 2] == -1
    assert actual.entropy[0, 0, 2] == 0 and actual.top_weight[0, 0, 2] == 0
    assert actual.lse[0, 0, 2] == float("-inf")
    assert (actual.top_key[0, 0, [0, 1, 3, 4]] >= 0).all()


@backends
def test_the_first_of_equal_keys(backend):
    query, key = testing.normal(1, 1, 6, 8), testing.normal(1, 1, 1, 8).expand(1, 1, 50, 8)
    actual = FF.attention_statistics(query, key, backend=backend)
    assert (actual.top_key == 0).all()
    torch.testing.assert_close(actual.entropy, torch.full((1, 1, 6), 50.0).log())


@backends
@pytest.mark.parametrize("empty", ["queries", "keys"])
def test_empty(backend, empty):
    query = torch.randn(1, 2, 0 if empty == "queries" else 3, 4)
    key = torch.randn(1, 2, 0 if empty == "keys" else 3, 4)
    actual = FF.attention_statistics(query, key, backend=backend)
    assert actual.entropy.shape == query.shape[:-1]
    assert (actual.entropy == 0).all() and (actual.top_key == -1).all()


def test_the_reference_holds_few_rows_at_a_time(monkeypatch):
    query = testing.normal(1, 2, 40, 16)
    whole = FF.attention_statistics(query, query, is_causal=True, backend="reference")
    monkeypatch.setattr(reference, "_STATISTICS_BLOCK", 500)
    parts = FF.attention_statistics(query, query, is_causal=True, backend="reference")
    torch.testing.assert_close(parts, whole)
