"""attention_with_weights: the output, the weights or their mean over heads, gradients of both."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fmkernels
import fmkernels.functional as FF
from fmkernels import testing
from fmkernels._attention_oracle import attend, dropout_factors
from fmkernels.ops import _dropout
from fmkernels.ops.attention.backends import WEIGHTS
from fmkernels.ops.attention.schema import Options

BACKENDS = testing.available_backends(WEIGHTS, torch.zeros(1, 1, 1, 1), Options())
backends = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native library")
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
averages = pytest.mark.parametrize("average", [False, True], ids=["each", "mean"])

# batch, query heads, key heads, queries, keys, D, Dv
SHAPES = {
    "plain": (2, 3, 3, 16, 16, 64, 64),
    "odd": (2, 3, 3, 5, 7, 5, 3),
    "gqa": (2, 6, 2, 13, 15, 16, 16),
    "one_query": (2, 4, 2, 1, 40, 32, 32),
    "one_key": (1, 2, 2, 6, 1, 8, 8),
    "tall": (1, 4, 4, 150, 40, 20, 16),
    "blocks_of_keys": (1, 2, 2, 20, 601, 16, 16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make(shape, dtype=torch.float32, layout="contiguous"):
    batch, heads, shared, queries, keys, width, value_width = shape
    return {
        "query": testing.normal(batch, heads, queries, width, dtype=dtype, layout=layout),
        "key": testing.normal(batch, shared, keys, width, dtype=dtype, layout=layout),
        "value": testing.normal(batch, shared, keys, value_width, dtype=dtype, layout=layout),
    }


def ours(backend, average, mask=None, **options):
    def function(**tensors):
        tensors = masked(tensors, mask)
        return FF.attention_with_weights(
            **tensors, **options, enable_gqa=True, average=average, backend=backend
        )

    return function


def exact(average, mask=None, **options):
    def function(**tensors):
        output, weights = attend(**masked(tensors, mask), **options, return_weights=True)
        return output, weights.mean(dim=1) if average else weights

    return function


def masked(tensors, mask):
    """With a mask that is no leaf; masks that are come among the tensors."""
    if mask is None:
        return tensors
    dtype = mask.dtype if mask.dtype == torch.bool else tensors["query"].dtype
    return {**tensors, "attn_mask": mask.to(dtype)}


def check(backend, average, arguments, grad_layout="contiguous", **options):
    testing.compare(
        ours(backend, average, **options),
        exact(average, **options),
        arguments,
        grad_layout=grad_layout,
    )


@backends
@dtypes
@shapes
@averages
def test_shapes(backend, dtype, shape, average):
    # A weight of exactly 1 has a gradient of rounding errors.
    gradients = None if shape[4] == 1 else "contiguous"
    check(backend, average, make(shape, dtype), gradients)


@backends
@averages
@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "offset"])
def test_layouts(backend, average, layout):
    check(backend, average, make((2, 3, 3, 37, 41, 16, 16), layout=layout))


@backends
@averages
@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_strides_of_gradients(backend, average, grad_layout, dtype):
    check(backend, average, make((2, 3, 3, 37, 41, 16, 16), dtype), grad_layout)


MASKS = {
    "bool": torch.rand(2, 4, 33, 45) > 0.3,
    "rows_without_keys": (torch.rand(1, 4, 33, 45) > 0.3) & (torch.arange(33) % 3 > 0)[:, None],
    "padding": (torch.arange(45) < torch.tensor([[20], [45]]))[:, None, None],
    "blocks_without_keys": (torch.arange(45) < 0).expand(1, 1, 1, 45),
    "one_for_all": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    "float": torch.randn(2, 1, 33, 45),
    "float_padding": torch.zeros(2, 1, 1, 45).masked_fill(torch.arange(45) > 30, float("-inf")),
    "by_query": torch.rand(33, 1) > 0.5,
}


@backends
@dtypes
@averages
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(backend, dtype, average, mask):
    check(backend, average, make((2, 4, 2, 33, 45, 24, 16), dtype), mask=mask)


@backends
@averages
@pytest.mark.parametrize("shape", [(1, 3, 33, 45), (2, 1, 1, 45), (1, 1, 33, 45)], ids=str)
def test_gradient_of_a_mask(backend, average, shape):
    arguments = make((2, 3, 3, 33, 45, 24, 16))
    check(backend, average, {**arguments, "attn_mask": torch.randn(shape)})


OPTIONS = {
    "causal": {"is_causal": True},
    "window": {"window": (9, 4)},
    "far_window": {"window": (4, 0)},
    "softcap": {"softcap": 1.0},
    "scale": {"scale": -0.5},
}


@backends
@dtypes
@averages
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 60, 16, 16), (1, 2, 2, 150, 400, 8, 8)], ids=str)
def test_options(backend, dtype, average, options, shape):
    check(backend, average, make(shape, dtype), **options)


@backends
@dtypes
@averages
def test_slopes_and_sinks(backend, dtype, average):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = make((2, 4, 2, 33, 45, 24, 16), dtype)
    arguments |= {"alibi_slopes": torch.rand(4, dtype=wide), "sinks": torch.randn(4, dtype=wide)}
    check(backend, average, arguments)


@backends
@averages
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout(backend, average, dropout_p, monkeypatch):
    seed = torch.tensor([12345])
    monkeypatch.setattr(_dropout, "new_seed", lambda device: seed)
    factors = dropout_factors(seed, dropout_p, (2, 4, 33, 45))
    testing.compare(
        ours(backend, average, dropout_p=dropout_p),
        exact(average, factors=factors),
        make((2, 4, 2, 33, 45, 24, 16)),
    )


@backends
@averages
def test_gradient_through_one_result(backend, average):
    arguments = make((2, 3, 3, 20, 30, 16, 16))
    for index in (0, 1):
        testing.compare(
            lambda index=index, **t: ours(backend, average)(**t)[index],
            lambda index=index, **t: exact(average)(**t)[index],
            arguments,
        )


@backends
@averages
def test_only_the_asked_gradients(backend, average):
    arguments = make((2, 3, 3, 20, 30, 16, 16))
    arguments["query"].requires_grad_()
    output, weights = ours(backend, average)(**arguments)
    (output.sum() + weights.square().sum()).backward()
    assert arguments["query"].grad is not None
    assert arguments["key"].grad is None and arguments["value"].grad is None


@backends
def test_the_output_is_that_of_attention(backend):
    arguments = make((2, 3, 3, 70, 300, 32, 32))
    output, weights = ours(backend, True)(**arguments)
    torch.testing.assert_close(
        output, FF.scaled_dot_product_attention(**arguments, backend=backend)
    )
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 70))


@backends
@averages
@pytest.mark.parametrize("leading", [(3,), (2, 1, 3)], ids=str)
def test_other_ranks(backend, average, leading):
    arguments = {name: testing.normal(*leading, 20, 8) for name in ("query", "key", "value")}
    output, weights = FF.attention_with_weights(**arguments, average=average, backend=backend)
    scores = arguments["query"] @ arguments["key"].transpose(-1, -2) * 8**-0.5
    wanted = scores.softmax(-1)
    torch.testing.assert_close(output, wanted @ arguments["value"])
    torch.testing.assert_close(weights, wanted.mean(-3) if average else wanted)


@backends
def test_one_head_without_dimension(backend):
    x = testing.normal(20, 8)
    _, weights = FF.attention_with_weights(x, x, x, backend=backend)
    torch.testing.assert_close(weights, (x @ x.T * 8**-0.5).softmax(-1))


@backends
@averages
@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "width", "value_width"])
def test_empty(backend, average, empty):
    names = ("batch", "heads", "shared", "queries", "keys", "width", "value_width")
    sizes = dict(zip(names, (2, 3, 3, 4, 5, 8, 8), strict=True))
    sizes[empty] = 0
    check(backend, average, make(tuple(sizes.values())), scale=0.5)


@backends
def test_no_heads(backend):
    x = torch.randn(2, 0, 4, 8)
    _, weights = FF.attention_with_weights(x, x, x, backend=backend)
    assert weights.shape == (2, 0, 4, 4)


@native
@averages
def test_threads_share_the_heads(average):
    """One block of queries: its heads are summed by several threads."""
    arguments = make((1, 7, 7, 50, 500, 64, 64))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(ours("cpu", average)(**arguments))
    finally:
        torch.set_num_threads(threads)
    wanted = exact(average)(**{name: t.double() for name, t in arguments.items()})
    for result in results:
        for one, other in zip(result, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@backends
def test_compiled(backend):
    arguments = make(SHAPES["gqa"])
    function = ours(backend, True)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = testing.run(function, arguments), testing.run(compiled, arguments)
    torch.testing.assert_close(traced, eager)


@backends
def test_autocast(backend):
    arguments = make(SHAPES["plain"])
    with torch.autocast("cpu", torch.bfloat16):
        results = testing.run(ours(backend, True), arguments)
    wanted = testing.run(exact(True), {name: t.double() for name, t in arguments.items()})
    assert results["output0"].dtype == results["output1"].dtype == torch.bfloat16
    assert results["grad_query"].dtype == torch.float32
    for name, value in wanted.items():
        torch.testing.assert_close(results[name].double(), value, rtol=0.02, atol=0.02)


@native
def test_auto_takes_the_kernel():
    fmkernels._dispatch.clear_decisions()
    ours(None, True)(**make(SHAPES["plain"]))
    assert [d.chosen for d in fmkernels._dispatch.last_decisions()] == ["cpu"]


BAD = {
    "average": ({"average": 1}, TypeError, "average"),
    "key": ({"key": torch.randn(2, 3, 7, 9)}, ValueError, "key"),
    "value": ({"value": torch.randn(2, 3, 6, 8)}, ValueError, "value"),
    "dtype": ({"value": torch.randn(2, 3, 7, 8).double()}, TypeError, "value"),
    "mask_shape": ({"attn_mask": torch.zeros(4, 7)}, ValueError, "attn_mask"),
    "mask_dtype": ({"attn_mask": torch.zeros(5, 7).long()}, TypeError, "attn_mask"),
    "dropout": ({"dropout_p": 1.5}, ValueError, "dropout_p"),
    "backend": ({"backend": "fast"}, ValueError, "backend"),
}


@pytest.mark.parametrize(("changes", "error", "name"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(changes, error, name):
    arguments = make((2, 3, 3, 5, 7, 8, 8)) | changes
    with pytest.raises(error, match=name):
        FF.attention_with_weights(**arguments)


@pytest.mark.parametrize("shape", [(4, 8), (2, 0, 4, 8)], ids=str)
def test_no_heads_to_average_over(shape):
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="query must have heads"):
        FF.attention_with_weights(x, x, x, average=True)


@native
def test_the_op_refuses_what_it_cannot_read():
    query = torch.randn(2, 3, 5, 8)
    ops = torch.ops.fmkernels
    output, weights, lse = ops.sdpa_weights(query, query, query, *Options(), True)
    no_heads = query[:, :0]
    with pytest.raises(RuntimeError, match="head"):
        ops.sdpa_weights(no_heads, no_heads, no_heads, *Options(), True)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    packed = Options(cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    with pytest.raises(RuntimeError, match="packed"):
        ops.sdpa_weights(query[:1], query[:1], query[:1], *packed, False)
    needs = (True, True, True, False, False, False)
    for grad in (weights.double(), weights[:1], weights.unsqueeze(1)):
        with pytest.raises(RuntimeError, match="grad_weights"):
            ops.sdpa_weights_backward(
                output, grad, query, query, query, output, lse, *Options(), True, *needs
            )


PROGRAM = """
import resource, torch
import fmkernels.functional as FF
import fmkernels.ops.attention.reference
torch.set_num_threads(2)
def step(length):
    tensors = [torch.randn(1, 64, length, 8, requires_grad=True) for _ in range(3)]
    output, weights = FF.attention_with_weights(*tensors, average=True, backend="cpu")
    (output.sum() + weights.square().sum()).backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@native
def test_the_mean_needs_no_weights_of_single_heads():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    # The weights of 64 heads are 256 MB, their mean 4 MB, and so is each of the operands.
    assert int(run.stdout) < 100 * 1024, f"{run.stdout} KB"
