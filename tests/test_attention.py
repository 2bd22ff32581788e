"""scaled_dot_product_attention against PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels.ops.attention.backends import SDPA
from fmkernels.ops.attention.schema import Options

BACKENDS = testing.available_backends(SDPA, torch.zeros(1, 1, 1, 1), Options())
backends = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native library")
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

EPS = {dtype: torch.finfo(dtype).eps for dtype in testing.DTYPES}

# name: batch, query heads, key heads, queries, keys, D, Dv
PROBLEMS = {
    "plain": (2, 3, 3, 16, 16, 64, 64),
    "head5": (2, 2, 2, 9, 11, 5, 5),
    "head80": (1, 2, 2, 33, 17, 80, 80),
    "head128": (1, 2, 2, 20, 35, 128, 128),
    "value_width": (2, 2, 2, 10, 12, 16, 24),
    "narrow_value": (1, 3, 3, 7, 9, 33, 1),
    "cross": (2, 2, 2, 5, 70, 32, 32),
    "more_queries": (1, 2, 2, 70, 5, 32, 32),
    "two_queries": (3, 4, 4, 2, 40, 64, 64),
    "gqa": (2, 6, 2, 13, 15, 16, 16),
    "mqa": (2, 4, 1, 13, 15, 16, 16),
    "long": (1, 1, 1, 300, 521, 16, 16),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def make_arguments(problem, dtype, layout="contiguous"):
    batch, heads, shared, queries, keys, width, value_width = problem
    return {
        "query": testing.normal(batch, heads, queries, width, dtype=dtype, layout=layout),
        "key": testing.normal(batch, shared, keys, width, dtype=dtype, layout=layout),
        "value": testing.normal(batch, shared, keys, value_width, dtype=dtype, layout=layout),
    }


def functions(backend, problem=PROBLEMS["plain"], mask=None, **options):
    """Attention on these options, by this package and by PyTorch; the mask is not a leaf."""
    options["enable_gqa"] = problem[1] != problem[2]

    def of(function, **extras):
        def attend(query, key, value):
            own = mask
            if mask is not None and mask.is_floating_point():
                own = mask.to(query.dtype)
            return function(query, key, value, own, **options, **extras)

        return attend

    return (
        of(FF.scaled_dot_product_attention, backend=backend),
        of(F.scaled_dot_product_attention),
    )


# --- the function


@backends
@dtypes
@problems
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_forward_and_gradients_match_torch(backend, problem, dtype, is_causal):
    ours, torchs = functions(backend, problem, is_causal=is_causal)
    testing.compare(ours, torchs, make_arguments(problem, dtype))


@backends
@dtypes
@pytest.mark.parametrize(
    ("sizes", "is_causal"), [((6, 1), False), ((1, 40), False), ((1, 40), True)], ids=str
)
def test_one_query_or_one_key(backend, dtype, sizes, is_causal):
    """A weight of exactly 1 has gradient 0 as the difference of two equal sums of products."""
    problem = (2, 3, 3, *sizes, 64, 64)
    ours, torchs = functions(backend, problem, is_causal=is_causal)
    arguments = make_arguments(problem, dtype)
    testing.compare(ours, torchs, arguments, grad_layout=None)
    results, wanted = testing.run(ours, arguments), testing.run(torchs, arguments)
    exact = testing.run(torchs, {name: t.double() for name, t in arguments.items()})
    # One term of the difference: |grad . value| * scale * |key|, with 64 incoming ones.
    term = 64**0.5 * 3 * 64**-0.5 * 3
    for name in exact:
        allowed = 2 * testing.max_error(wanted[name], exact[name])
        allowed += testing.allowed_error(0.0, exact[name], dtype) + 8 * EPS[dtype] * term
        assert testing.max_error(results[name], exact[name]) <= allowed, name


@backends
@dtypes
@problems
def test_forward_without_gradients_matches_torch(backend, problem, dtype):
    ours, torchs = functions(backend, problem, is_causal=True)
    testing.compare(ours, torchs, make_arguments(problem, dtype), grad_layout=None)


MASK_SHAPES = [
    (2, 3, 9, 11),
    (2, 1, 9, 11),
    (1, 3, 9, 11),
    (1, 1, 9, 11),
    (2, 1, 1, 11),
    (2, 3, 9, 1),
    (1, 1, 1, 1),
    (3, 9, 11),
    (1, 1, 11),
    (9, 11),
    (1, 11),
    (9, 1),
]


@backends
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "infinite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_masks_of_every_shape(backend, shape, kind, dtype):
    problem = (2, 3, 3, 9, 11, 16, 16)
    if kind == "bool":
        mask = torch.rand(shape) > 0.3
    else:
        mask = testing.normal(*shape, dtype=dtype)
        if kind == "infinite":
            mask[torch.rand(shape) > 0.7] = float("-inf")
    ours, torchs = functions(backend, problem, mask)
    testing.compare(ours, torchs, make_arguments(problem, dtype))


@backends
@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=testing.dtype_name)
def test_masks_of_any_strides(backend, kind, dtype):
    values = torch.randn(2, 3, 10, 10)
    mask = values > -0.5 if dtype is torch.bool else values
    mask = {
        "expanded": mask[:1, :1].expand(2, 3, 10, 10),
        "transposed": mask.transpose(-1, -2),
        "sliced": torch.cat([mask, mask], dim=-1)[..., ::2],
    }[kind]
    problem = (2, 3, 3, 10, 10, 16, 16)
    ours, torchs = functions(backend, problem, mask)
    testing.compare(ours, torchs, make_arguments(problem, torch.float32))


@backends
def test_mask_with_shared_heads(backend):
    problem = PROBLEMS["gqa"]
    ours, torchs = functions(backend, problem, torch.rand(2, 6, 13, 15) > 0.4)
    testing.compare(ours, torchs, make_arguments(problem, torch.float32))


@backends
@pytest.mark.parametrize("scale", [0.0, 0.3, 2, -1.0])
def test_scale(backend, scale):
    ours, torchs = functions(backend, scale=scale)
    testing.compare(ours, torchs, make_arguments(PROBLEMS["plain"], torch.float32))


@backends
@pytest.mark.parametrize("kind", ["bool", "float"])
@dtypes
def test_rows_that_see_no_key_are_zero_and_pass_no_gradient(backend, kind, dtype):
    problem = PROBLEMS["plain"]
    mask = torch.rand(2, 3, 16, 16) > 0.5
    mask[:, :, [0, 7, 15]] = False
    mask[1, 2] = False
    empty = ~mask.any(dim=-1)
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    ours, torchs = functions(backend, problem, mask)
    arguments = make_arguments(problem, dtype)
    testing.compare(ours, torchs, arguments)
    results = testing.run(ours, arguments)
    assert (results["output"][empty] == 0).all()
    assert (results["grad_query"][empty] == 0).all()
    assert (results["grad_key"][1, 2] == 0).all() and (results["grad_value"][1, 2] == 0).all()


@backends
@pytest.mark.parametrize("return_lse", [False, True])
def test_lse(backend, return_lse):
    problem = PROBLEMS["gqa"]
    arguments = make_arguments(problem, torch.float64)
    mask = torch.rand(13, 15) > 0.4
    mask[3] = False

    def exact(query, key, value):
        keys, values = (t.repeat_interleave(3, dim=1) for t in (key, value))
        scores = query @ keys.transpose(-1, -2) / math.sqrt(16)
        scores = scores.masked_fill(~mask, -1e30)
        weights = scores.softmax(-1) * mask.any(-1, keepdim=True)
        return weights @ values, scores.logsumexp(-1)[:, :, mask.any(-1)]

    def ours(query, key, value):
        output, lse = FF.scaled_dot_product_attention(
            query, key, value, mask, enable_gqa=True, return_lse=True, backend=backend
        )
        assert (lse[:, :, 3] == float("-inf")).all()
        return output, lse[:, :, mask.any(-1)]

    kept = slice(None) if return_lse else slice(1)
    results = testing.run(lambda **t: ours(**t)[kept], arguments)
    expected = testing.run(lambda **t: exact(**t)[kept], arguments)
    for name in expected:
        torch.testing.assert_close(results[name], expected[name])


@backends
def test_lse_alone_is_differentiable(backend):
    arguments = make_arguments(PROBLEMS["plain"], torch.float64)

    def ours(query, key, value):
        return FF.scaled_dot_product_attention(
            query, key, value, return_lse=True, backend=backend
        )[1]

    def exact(query, key, value):
        return (query @ key.transpose(-1, -2) / 8).logsumexp(-1)

    results, expected = testing.run(ours, arguments), testing.run(exact, arguments)
    for name in expected:
        torch.testing.assert_close(results[name], expected[name])


@backends
@dtypes
def test_lse_dtype(backend, dtype):
    arguments = make_arguments(PROBLEMS["plain"], dtype)
    _, lse = FF.scaled_dot_product_attention(**arguments, return_lse=True, backend=backend)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == (2, 3, 16)


@backends
@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "offset"])
@pytest.mark.parametrize("name", ["plain", "head5", "gqa"])
def test_inputs_of_any_strides(backend, name, layout):
    ours, torchs = functions(backend, PROBLEMS[name])
    testing.compare(ours, torchs, make_arguments(PROBLEMS[name], torch.float32, layout))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_heads_inside_one_projection(backend, dtype):
    """Query, key and value as views of (B, S, 3, H, D), as MultiheadAttention passes them."""

    def of(function):
        def attend(qkv):
            return function(*qkv.permute(2, 0, 3, 1, 4).unbind(0))

        return attend

    ours, torchs = functions(backend)
    arguments = {"qkv": testing.normal(2, 16, 3, 3, 64, dtype=dtype)}
    testing.compare(of(ours), of(torchs), arguments)


@backends
def test_output_keeps_the_layout_of_the_query(backend):
    query = testing.normal(2, 16, 3, 8).transpose(1, 2)
    output = FF.scaled_dot_product_attention(query, query, query, backend=backend)
    assert output.transpose(1, 2).is_contiguous()
    query = query.contiguous()
    assert FF.scaled_dot_product_attention(query, query, query, backend=backend).is_contiguous()


@backends
@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "value_width", "mqa"])
def test_incoming_gradients_of_any_strides(backend, name, grad_layout):
    ours, torchs = functions(backend, PROBLEMS[name])
    arguments = make_arguments(PROBLEMS[name], torch.float32)
    testing.compare(ours, torchs, arguments, grad_layout=grad_layout)


@backends
@pytest.mark.parametrize("needed", ["query", "key", "value"])
def test_gradients_of_some_arguments(backend, needed):
    ours, torchs = functions(backend)
    arguments = make_arguments(PROBLEMS["plain"], torch.float64)
    wanted = testing.run(torchs, arguments)[f"grad_{needed}"]
    leaves = {k: v.clone().requires_grad_(k == needed) for k, v in arguments.items()}
    ours(**leaves).sum().backward()
    torch.testing.assert_close(leaves[needed].grad, wanted)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != needed)


@backends
@pytest.mark.parametrize("name", ["head5", "gqa", "value_width", "two_queries"])
@pytest.mark.parametrize("kind", ["full", "causal", "bool", "float"])
def test_gradcheck(backend, name, kind):
    batch, heads, shared, *_ = PROBLEMS[name]
    problem = (1, heads, shared, 3, 4, 3, 2)
    mask = {"bool": torch.rand(3, 4) > 0.3, "float": testing.normal(3, 4)}.get(kind)
    ours, _ = functions(backend, problem, mask, is_causal=kind == "causal")
    leaves = [t.requires_grad_() for t in make_arguments(problem, torch.float64).values()]
    assert torch.autograd.gradcheck(ours, leaves)


@backends
def test_double_backward_is_refused(backend):
    ours, _ = functions(backend)
    arguments = make_arguments(PROBLEMS["plain"], torch.float64)
    arguments["query"].requires_grad_()
    output = ours(**arguments).square().sum()
    (grad,) = torch.autograd.grad(output, arguments["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@backends
@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys", "width", "value_width"])
def test_empty(backend, empty):
    names = ("batch", "heads", "shared", "queries", "keys", "width", "value_width")
    sizes = dict(zip(names, (2, 3, 3, 4, 5, 8, 8), strict=True))
    sizes[empty] = 0
    if empty == "heads":
        sizes["shared"] = 0
    problem = tuple(sizes.values())
    ours, torchs = functions(backend, problem)
    testing.compare(ours, torchs, make_arguments(problem, torch.float32))


@backends
@pytest.mark.parametrize("factor", [16, 2**12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=testing.dtype_name)
def test_extreme_scores(backend, factor, dtype):
    """Scores up to 1e9: few keys take each row, and exp must neither overflow nor give NaN.

    The scores are exact in any order of summation: rounding errors of such numbers are large
    enough to change the weights, in the oracle too.
    """
    ours, torchs = functions(backend)
    arguments = make_arguments(PROBLEMS["plain"], dtype)
    for name in ("query", "key"):
        arguments[name] = factor * testing.integers(*arguments[name].shape, dtype=dtype)
    testing.compare(ours, torchs, arguments, grad_layout=None)


@backends
@dtypes
def test_nan_and_infinity_propagate(backend, dtype):
    ours, torchs = functions(backend)
    arguments = make_arguments(PROBLEMS["plain"], dtype)
    arguments["query"][0, 0, 3, 1] = float("nan")
    arguments["key"][0, 1, 5, 2] = float("nan")
    arguments["value"][1, 0, 2, 7] = float("nan")
    arguments["value"][1, 1, 4, 9] = float("inf")
    testing.compare(ours, torchs, arguments, grad_layout=None)
    output = ours(**arguments)
    assert output[0, 0, 3].isnan().all() and not output[0, 0, :3].isnan().any()
    assert output[0, 1].isnan().all()
    assert output[1, 0, :, 7].isnan().all() and not output[1, 0, :, :7].isnan().any()
    assert (output[1, 1, :, 9] == float("inf")).all()


@backends
def test_same_inputs_same_bits(backend):
    ours, _ = functions(backend, PROBLEMS["long"], is_causal=True)
    arguments = make_arguments(PROBLEMS["long"], torch.float32)
    first, second = (testing.run(ours, arguments) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@backends
@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 8), (7, 8), (7, 8)),
        ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
        ((2, 3, 5, 8), (3, 7, 8), (1, 7, 8)),
        ((2, 3, 5, 8), (1, 1, 7, 8), (2, 1, 7, 8)),
        ((1, 3, 5, 8), (4, 1, 7, 8), (4, 3, 7, 8)),
        ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
        ((2, 1, 3, 5, 8), (2, 3, 7, 8), (1, 3, 7, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [None, "scores", "leading"])
def test_leading_dimensions_broadcast(backend, shapes, masked):
    arguments = {
        name: testing.normal(*shape, dtype=torch.float64)
        for name, shape in zip(("query", "key", "value"), shapes, strict=True)
    }
    mask = None
    if masked is not None:
        leading = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
        mask = torch.rand(*(leading if masked == "leading" else ()), 5, 7) > 0.3
    ours, torchs = functions(backend, mask=mask)
    results, expected = testing.run(ours, arguments), testing.run(torchs, arguments)
    for name in expected:
        torch.testing.assert_close(results[name], expected[name])


@backends
@pytest.mark.parametrize(
    "shapes",
    [
        ((6, 5, 8), (2, 7, 8), (2, 7, 8)),
        ((2, 6, 5, 8), (1, 2, 7, 8), (2, 3, 7, 8)),
        ((2, 2, 6, 5, 8), (2, 2, 3, 7, 8), (2, 1, 3, 7, 8)),
    ],
    ids=str,
)
def test_shared_heads_of_any_rank(backend, shapes):
    arguments = {
        name: testing.normal(*shape, dtype=torch.float64)
        for name, shape in zip(("query", "key", "value"), shapes, strict=True)
    }
    ours, torchs = functions(backend, PROBLEMS["gqa"])
    results, expected = testing.run(ours, arguments), testing.run(torchs, arguments)
    for name in expected:
        torch.testing.assert_close(results[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=testing.dtype_name)
def test_float32_mask_on_half_precision(dtype):
    arguments = make_arguments(PROBLEMS["plain"], dtype)
    mask = testing.normal(16, 16) * 3
    mask[2, 5:] = -1e9
    output = FF.scaled_dot_product_attention(**arguments, attn_mask=mask)
    exact = F.scaled_dot_product_attention(
        *(t.double() for t in arguments.values()), attn_mask=mask.double()
    )
    wanted = F.scaled_dot_product_attention(*arguments.values(), attn_mask=mask)
    assert output.dtype == dtype
    assert testing.max_error(output, exact) <= 2 * testing.max_error(wanted, exact) + 2**-8
