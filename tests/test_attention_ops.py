"""The attention ops themselves: fakes, opcheck, torch.compile, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels.ops import _dropout
from fmkernels.ops.attention import reference
from fmkernels.ops.attention.backends import SDPA
from fmkernels.ops.attention.schema import Options, empty_weights

BACKENDS = testing.available_backends(SDPA, torch.zeros(1, 1, 1, 1), Options())
backends = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native library")
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

# name: batch, query heads, key heads, queries, keys, D, Dv
PROBLEMS = {
    "plain": (2, 3, 3, 16, 16, 64, 64),
    "value_width": (2, 2, 2, 10, 12, 16, 24),
    "two_queries": (3, 4, 4, 2, 40, 64, 64),
    "gqa": (2, 6, 2, 13, 15, 16, 16),
}


def make_options(kind, query, key):
    """Every option of the op at once, or few."""
    batch, heads, queries, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if kind == "causal":
        return Options(window_right=0, scale=0.5)
    if kind == "bool":
        return Options(attn_mask=torch.rand(1, 1, queries, key.size(2)) > 0.3)
    return Options(
        attn_mask=testing.normal(1, heads, queries, key.size(2), dtype=query.dtype),
        alibi_slopes=torch.rand(batch, heads, dtype=wide),
        sinks=torch.rand(heads, dtype=wide),
        dropout_seed=_dropout.new_seed(query.device),
        window_left=8,
        window_right=5,
        scale=0.5,
        softcap=3.0,
        dropout_p=0.2,
    )


KINDS = ("causal", "bool", "everything")
kinds = pytest.mark.parametrize("kind", KINDS)
layouts = pytest.mark.parametrize("layout", ["heads_first", "positions_first", "packed"])


def make_operands(name, layout, dtype):
    batch, heads, shared, queries, keys, width, value_width = PROBLEMS[name]
    tensors = [
        testing.normal(batch, heads, queries, width, dtype=dtype),
        testing.normal(batch, shared, keys, width, dtype=dtype),
        testing.normal(batch, shared, keys, value_width, dtype=dtype),
    ]
    if layout == "heads_first":
        return tensors
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    if layout == "packed":
        tensors = [torch.cat([t, t], dim=-1)[..., : t.size(-1)] for t in tensors]
    return tensors


def backward_arguments(operands, options, output, lse, need_all):
    grad_lse = lse if need_all else None
    needs = (need_all, True, need_all)
    needs += tuple(
        need_all and t is not None and t.is_floating_point()
        for t in (options.attn_mask, options.alibi_slopes, options.sinks)
    )
    return (output, grad_lse, *operands, output, lse, *options, *needs)


def weights_backward_arguments(operands, options, output, lse, average):
    weights = torch.rand_like(empty_weights(*operands[:2], average))
    output, _, *rest = backward_arguments(operands, options, output, lse, True)
    count = 5 + len(Options._fields)  # operands, output, lse and options
    return (output, weights, *rest[:count], average, *rest[count:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
@pytest.mark.parametrize("name", ["plain", "gqa", "value_width"])
@layouts
@kinds
def test_fakes_agree_with_the_reference(name, layout, dtype, kind):
    operands = make_operands(name, layout, dtype)
    options = make_options(kind, *operands[:2])
    ops = torch.ops.fmkernels
    output, lse = reference.sdpa_forward(*operands, *options)
    assert_same_metadata(ops.sdpa_forward, (*operands, *options), (output, lse))
    for need_all in (True, False):
        arguments = backward_arguments(operands, options, output, lse, need_all)
        assert_same_metadata(ops.sdpa_backward, arguments, reference.sdpa_backward(*arguments))
    for average in (True, False):
        arguments = (*operands, *options, average)
        assert_same_metadata(ops.sdpa_weights, arguments, reference.sdpa_weights(*arguments))
        arguments = weights_backward_arguments(operands, options, output, lse, average)
        real = reference.sdpa_weights_backward(*arguments)
        assert_same_metadata(ops.sdpa_weights_backward, arguments, real)
    arguments = (*operands[:2], *options)
    assert_same_metadata(ops.sdpa_statistics, arguments, reference.sdpa_statistics(*arguments))


def assert_same_metadata(op, arguments, real):
    def metadata(values):
        return [(t.shape, t.stride(), t.dtype) for t in values]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        assert metadata(op(*fakes)) == metadata(real)


# Tracing through AOTAutograd takes a second per call and does not depend on the dtype.
QUICK_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*QUICK_CHECKS, "test_aot_dispatch_dynamic")


@native
@dtypes
@pytest.mark.parametrize("name", PROBLEMS)
@layouts
@kinds
def test_opcheck(name, layout, dtype, kind):
    operands = make_operands(name, layout, dtype)
    options = make_options(kind, *operands[:2])
    thorough = dtype == torch.float32 and name == "gqa"
    checks = ALL_CHECKS if thorough else QUICK_CHECKS
    ops = torch.ops.fmkernels
    forward = (*operands, *options)
    torch.library.opcheck(ops.sdpa_forward.default, forward, test_utils=checks)
    output, lse = ops.sdpa_forward(*forward)
    for is_causal in (True, False):
        alone = (*operands, options.attn_mask, is_causal, 0.3)
        torch.library.opcheck(ops.sdpa_inference.default, alone, test_utils=checks)
        plain = Options(options.attn_mask, window_right=0 if is_causal else -1, scale=0.3)
        expected = ops.sdpa_forward(*operands, *plain)[0]
        assert torch.equal(ops.sdpa_inference(*alone), expected)
    for need_all in (True, False):
        backward = backward_arguments(operands, options, output, lse, need_all)
        torch.library.opcheck(ops.sdpa_backward.default, backward, test_utils=checks)
    for average in (True, False):
        forward = (*operands, *options, average)
        torch.library.opcheck(ops.sdpa_weights.default, forward, test_utils=checks)
        backward = weights_backward_arguments(operands, options, output, lse, average)
        torch.library.opcheck(ops.sdpa_weights_backward.default, backward, test_utils=checks)


@backends
@pytest.mark.parametrize("kind", ["full", "causal", "bool", "float", "options"])
def test_compiled_function_matches(backend, kind):
    query, key, value = make_operands("gqa", "heads_first", torch.float32)
    mask = {"bool": torch.rand(13, 15) > 0.3, "float": testing.normal(13, 15)}.get(kind)
    arguments = {"query": query, "key": key, "value": value, "attn_mask": mask}
    options = {"is_causal": kind == "causal"}
    if kind == "options":
        arguments |= {"sinks": torch.randn(6), "alibi_slopes": torch.rand(6)}
        options |= {"window": (5, 4), "softcap": 2.0}

    def attention(**tensors):
        return FF.scaled_dot_product_attention(
            **tensors, **options, enable_gqa=True, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager, traced = testing.run(attention, arguments), testing.run(compiled, arguments)
    for name in eager:
        torch.testing.assert_close(traced[name], eager[name])


@backends
def test_compiled_dropout_drops_the_same_weights_in_the_backward(backend):
    """The values' gradient tells the weights that the output used."""
    dtype = torch.float32 if backend == "triton" else torch.float64  # Triton has no float64 here
    query = testing.normal(1, 1, 6, 8, dtype=dtype)
    values = torch.eye(6, dtype=dtype)[None, None].requires_grad_()

    def attention(values):
        return FF.scaled_dot_product_attention(
            query, query, values, dropout_p=0.5, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    weights = compiled(values)
    (grad,) = torch.autograd.grad(weights[0, 0].sum(), values)
    torch.testing.assert_close(grad[0, 0, :, 0], weights[0, 0].sum(dim=0).detach())
    assert (weights == 0).any() and not torch.equal(weights, compiled(values))


@backends
def test_autocast(backend):
    query, key, value = make_operands("plain", "heads_first", torch.float32)
    arguments = {"query": query, "key": key, "value": value}

    def ours(**tensors):
        return FF.scaled_dot_product_attention(**tensors, backend=backend)

    torchs = F.scaled_dot_product_attention
    with torch.autocast("cpu", torch.bfloat16):
        results, expected = testing.run(ours, arguments), testing.run(torchs, arguments)
    assert results["output"].dtype == expected["output"].dtype == torch.bfloat16
    exact = testing.run(torchs, {name: t.double() for name, t in arguments.items()})
    for name in expected:
        assert results[name].dtype == expected[name].dtype
        allowed = 2 * testing.max_error(expected[name], exact[name]) + 2**-8
        assert testing.max_error(results[name], exact[name]) <= allowed, name
