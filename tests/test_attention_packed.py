"""varlen_attention and nested tensors: each sequence as if it were alone."""

from __future__ import annotations

import pytest
import torch

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels._attention_oracle import attend
from fmkernels.ops.attention.backends import SDPA
from fmkernels.ops.attention.schema import Options

BACKENDS = testing.available_backends(SDPA, torch.zeros(1, 1, 1, 1), Options())
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

LENGTHS = {
    "ragged": [5, 1, 40, 17],
    "with_empty": [0, 7, 0, 12, 0],
    "one": [130],
    "many": [1, 2, 3] * 20,
    "none": [],
}
lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def make(lengths, key_lengths=None, dtype=torch.float32, heads=4, shared=2, width=16):
    total, keys = sum(lengths), sum(lengths if key_lengths is None else key_lengths)
    return {
        "query": testing.normal(total, heads, width, dtype=dtype),
        "key": testing.normal(keys, shared, width, dtype=dtype),
        "value": testing.normal(keys, shared, 24, dtype=dtype),
    }


def one_by_one(cu_q, cu_k, **options):
    """The oracle: a loop over the sequences."""

    def attention(query, key, value, alibi_slopes=None, sinks=None):
        outputs = []
        for n in range(len(cu_q) - 1):
            q, k = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
            slopes = alibi_slopes
            if slopes is not None and slopes.dim() == 2:
                slopes = slopes[n]
            tensors = (t.transpose(0, 1)[None] for t in (query[q], key[k], value[k]))
            if cu_k[n] == cu_k[n + 1]:
                outputs.append(query[q].sum(-1, keepdim=True) * value.new_zeros(1, 1, 24))
                continue
            out = attend(*tensors, None, slopes, sinks, **options)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs) if outputs else query.new_zeros(0, 4, 24) + query.sum()

    return attention


def check(backend, arguments, cu_q, cu_k, **options):
    def ours(**tensors):
        return FF.varlen_attention(
            **tensors,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            **options,
            enable_gqa=True,
            backend=backend,
        )

    testing.compare(ours, one_by_one(cu_q, cu_k, **options), arguments)


@backends
@lengths
@dtypes
@pytest.mark.parametrize("is_causal", [False, True])
def test_matches_a_loop(backend, lengths, dtype, is_causal):
    cu = offsets(lengths)
    check(backend, make(lengths, dtype=dtype), cu, cu, is_causal=is_causal)


@backends
@pytest.mark.parametrize("window", [None, (6, 2)])
def test_keys_of_other_lengths_than_queries(backend, window):
    queries, keys = [5, 1, 70, 17, 3], [9, 30, 40, 0, 120]
    options = {} if window is None else {"window": window}
    arguments = make(queries, keys)
    check(backend, arguments, offsets(queries, torch.int64), offsets(keys, torch.int64), **options)


@backends
@pytest.mark.parametrize("by_sequence", [False, True])
def test_every_option(backend, by_sequence):
    lengths = LENGTHS["ragged"]
    arguments = make(lengths, dtype=torch.float64)
    slopes = torch.rand((4, 4) if by_sequence else (4,), dtype=torch.float64)
    arguments |= {"alibi_slopes": slopes, "sinks": torch.randn(4, dtype=torch.float64)}
    cu = offsets(lengths)
    check(backend, arguments, cu, cu, window=(7, 3), softcap=2.0, scale=0.4)


@backends
def test_lse(backend):
    lengths = LENGTHS["ragged"]
    arguments, cu = make(lengths), offsets(lengths)
    output, lse = FF.varlen_attention(
        **arguments, cu_seqlens_q=cu, enable_gqa=True, return_lse=True, backend=backend
    )
    assert output.shape == (63, 4, 24) and lse.shape == (4, 63)
    alone = FF.scaled_dot_product_attention(
        *(t[6:46].transpose(0, 1) for t in arguments.values()), enable_gqa=True, return_lse=True
    )
    torch.testing.assert_close(output[6:46].transpose(0, 1), alone[0])
    torch.testing.assert_close(lse[:, 6:46], alone[1])


@backends
def test_dropout(backend):
    """Same seed, same output; the gradient of the values tells the weights that were used."""
    lengths = [20, 11]
    arguments, cu = make(lengths, dtype=torch.float64), offsets(lengths)
    arguments["value"] = torch.zeros(31, 2, 31, dtype=torch.float64)
    arguments["value"][:, :, :] = torch.eye(31)[:, None]
    arguments["value"].requires_grad_()

    def attention():
        torch.manual_seed(3)
        return FF.varlen_attention(
            **arguments, cu_seqlens_q=cu, dropout_p=0.4, enable_gqa=True, backend=backend
        )

    weights = attention()
    assert torch.equal(weights, attention())
    dropped = (weights[:20, :, :20] == 0).double().mean().item()
    assert abs(dropped - 0.4) < 0.1
    (grad,) = torch.autograd.grad(weights.sum(), arguments["value"])
    by_key = weights.detach().sum(0).unflatten(0, (2, 2)).sum(1)
    torch.testing.assert_close(grad[:, :, 0].t(), by_key)
    torch.manual_seed(3)
    reference = FF.varlen_attention(
        **arguments, cu_seqlens_q=cu, dropout_p=0.4, enable_gqa=True, backend="reference"
    )
    torch.testing.assert_close(weights, reference)


@backends
@pytest.mark.parametrize("heads_first", [False, True])
def test_nested_tensors(backend, heads_first):
    parts = [torch.randn(n, 3, 8, dtype=torch.float64) for n in (4, 9, 1)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    if heads_first:
        query = nested.transpose(1, 2)
        output = FF.scaled_dot_product_attention(
            query, query, query, is_causal=True, backend=backend
        )
        assert output.shape == query.shape
        output = output.transpose(1, 2)
    else:
        output = FF.varlen_attention(nested, nested, nested, is_causal=True, backend=backend)
    assert output.shape == nested.shape
    for part, out in zip(parts, output.unbind(), strict=True):
        own = part.transpose(0, 1)
        alone = FF.scaled_dot_product_attention(own, own, own, is_causal=True)
        torch.testing.assert_close(out, alone.transpose(0, 1))
    output.values().sum().backward()
    assert nested.grad.shape == nested.shape


@backends
def test_compiled(backend):
    arguments, cu = make(LENGTHS["ragged"]), offsets(LENGTHS["ragged"])

    def attention(query, key, value):
        return FF.varlen_attention(
            query, key, value, cu, cu, is_causal=True, enable_gqa=True, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager, traced = testing.run(attention, arguments), testing.run(compiled, arguments)
    for name in eager:
        torch.testing.assert_close(traced[name], eager[name])


BAD = {
    "query_rank": ({"query": torch.zeros(1, 6, 4, 16)}, "query"),
    "heads": ({"enable_gqa": False}, "key"),
    "start": ({"cu_seqlens_q": torch.tensor([1, 6])}, "cu_seqlens_q"),
    "end": ({"cu_seqlens_q": torch.tensor([0, 5])}, "cu_seqlens_q"),
    "order": ({"cu_seqlens_q": torch.tensor([0, 4, 2, 6])}, "cu_seqlens_q"),
    "dtype": ({"cu_seqlens_q": torch.tensor([0.0, 6.0])}, "cu_seqlens_q"),
    "none": ({"cu_seqlens_q": None}, "cu_seqlens_q"),
    "list": ({"cu_seqlens_q": [0, 6]}, "cu_seqlens_q"),
    "empty": ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q"),
    "counts": ({"cu_seqlens_k": torch.tensor([0, 3, 6])}, "cu_seqlens_k"),
    "keys": ({"cu_seqlens_k": torch.tensor([0, 7])}, "cu_seqlens_k"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes"),
    "sinks": ({"sinks": torch.zeros(2)}, "sinks"),
    "window": ({"window": (1,)}, "window"),
}


@pytest.mark.parametrize(("change", "name"), BAD.values(), ids=BAD.keys())
def test_refuses(change, name):
    arguments = make([6]) | {"cu_seqlens_q": torch.tensor([0, 6]), "enable_gqa": True}
    FF.varlen_attention(**arguments)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=name):
        FF.varlen_attention(**arguments | change)
