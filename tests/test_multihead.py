"""MultiheadAttention against PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels.ops.attention.backends import SDPA
from fmkernels.ops.attention.schema import Options

BACKENDS = testing.available_backends(SDPA, torch.zeros(1, 1, 1, 1), Options())
backends = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native library")
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

EPS = {dtype: torch.finfo(dtype).eps for dtype in testing.DTYPES}

LAYERS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both_extras": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 10, "vdim": 14, "batch_first": True},
    "widths_no_bias": {"kdim": 10, "vdim": 14, "bias": False, "add_bias_kv": True},
}
layers = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
weights_options = pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])

EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 4, 5, 7


def make_layers(options, backend, dtype=torch.float64):
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    if theirs.in_proj_bias is not None:
        # torch starts them at zero, where a bias that is not added would go unnoticed.
        with torch.no_grad():
            theirs.in_proj_bias.normal_()
            theirs.out_proj.bias.normal_()
    return theirs, fnn.MultiheadAttention.from_torch(theirs, backend=backend)


def make_inputs(theirs, kind, dtype=torch.float64):
    def make(length, width):
        shape = (BATCH, length, width) if theirs.batch_first else (length, BATCH, width)
        return testing.normal(*shape, dtype=dtype)

    if kind == "self":
        query = make(KEYS, EMBED)
        return query, query, query
    if kind == "memory":
        memory = make(KEYS, EMBED)
        return make(QUERIES, EMBED), memory, memory
    return make(QUERIES, EMBED), make(KEYS, theirs.kdim), make(KEYS, theirs.vdim)


def gradients(layer, inputs, **arguments):
    """Output, weights and all gradients of one call."""
    leaves = [t.detach().clone().requires_grad_() for t in dict.fromkeys(inputs)]
    by_id = dict(zip((id(t) for t in dict.fromkeys(inputs)), leaves, strict=True))
    output, weights = layer(*(by_id[id(t)] for t in inputs), **arguments)
    loss = output.square().sum()
    if weights is not None:
        loss = loss + weights.square().sum()
    grads = torch.autograd.grad(loss, [*leaves, *layer.parameters()])
    return output, weights, grads


@pytest.mark.parametrize("kind", ["self", "memory", "three"])
@layers
@weights_options
@pytest.mark.parametrize("masks", ["none", "padding", "both", "causal"])
def test_layer_matches_torch(options, kind, need_weights, masks):
    if kind != "three" and "kdim" in options:
        pytest.skip("keys of another width need tensors of their own")
    theirs, ours = make_layers(options, "auto")
    inputs = make_inputs(theirs, kind)
    queries = KEYS if kind == "self" else QUERIES
    arguments = {"need_weights": need_weights}
    if masks in ("padding", "both"):
        padding = torch.rand(BATCH, KEYS) > 0.7
        padding[:, 0] = False
        arguments["key_padding_mask"] = padding
    if masks == "both":
        attn_mask = torch.rand(BATCH * HEADS, queries, KEYS) > 0.7
        attn_mask[:, :, 0] = False
        arguments["attn_mask"] = attn_mask
    if masks == "causal":
        arguments["attn_mask"] = torch.ones(queries, KEYS, dtype=torch.bool).triu(1)
    results, expected = (
        gradients(ours, inputs, **arguments),
        gradients(theirs, inputs, **arguments),
    )
    torch.testing.assert_close(results, expected)


@backends
@pytest.mark.parametrize("kind", ["self", "memory"])
@dtypes
def test_layer_on_every_backend_and_dtype(backend, kind, dtype):
    theirs, ours = make_layers({"batch_first": True}, backend, dtype)
    inputs = make_inputs(theirs, kind, dtype)
    exact_layer = copy.deepcopy(theirs).double()
    twins = {id(t): t.double() for t in inputs}
    exact = gradients(exact_layer, [twins[id(t)] for t in inputs], need_weights=False)
    wanted = gradients(theirs, inputs, need_weights=False)
    results = gradients(ours, inputs, need_weights=False)
    testing.assert_within_policy("output", results[0], wanted[0], exact[0])
    for index, grads in enumerate(zip(results[2], wanted[2], exact[2], strict=True)):
        # The gradient of the keys' bias is 0: rounding noise of terms of magnitude 1.
        magnitude = max(1.0, grads[2].abs().max().item())
        floor = max(4 * EPS[dtype], testing.FLOORS[dtype]) * magnitude
        allowed = 2 * testing.max_error(grads[1], grads[2]) + floor
        assert testing.max_error(grads[0], grads[2]) <= allowed, index


@weights_options
@pytest.mark.parametrize("mask_kinds", ["float", "padding_float", "attn_float"])
def test_layer_with_float_masks(need_weights, mask_kinds):
    theirs, ours = make_layers({"batch_first": True}, "auto")
    inputs = make_inputs(theirs, "memory")
    padding, attn_mask = torch.rand(BATCH, KEYS) > 0.7, torch.rand(QUERIES, KEYS) > 0.7
    padding[:, 0] = attn_mask[:, 0] = False
    if mask_kinds in ("float", "padding_float"):
        padding = testing.normal(BATCH, KEYS, dtype=torch.float64)
    if mask_kinds in ("float", "attn_float"):
        attn_mask = testing.normal(QUERIES, KEYS, dtype=torch.float64)
    arguments = {
        "key_padding_mask": padding,
        "attn_mask": attn_mask,
        "need_weights": need_weights,
    }
    results, expected = (
        gradients(ours, inputs, **arguments),
        gradients(theirs, inputs, **arguments),
    )
    torch.testing.assert_close(results, expected)


@weights_options
@pytest.mark.parametrize("padded", [False, True])
def test_layer_with_the_causal_hint(need_weights, padded):
    theirs, ours = make_layers({"batch_first": True}, "auto")
    inputs = make_inputs(theirs, "self")
    arguments = {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(KEYS, dtype=torch.float64),
        "is_causal": True,
        "need_weights": need_weights,
    }
    if padded:
        arguments["key_padding_mask"] = torch.zeros(BATCH, KEYS, dtype=torch.float64)
        arguments["key_padding_mask"][:, -2:] = float("-inf")
    results, expected = (
        gradients(ours, inputs, **arguments),
        gradients(theirs, inputs, **arguments),
    )
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_layer_without_batch(batch_first, average):
    theirs, ours = make_layers({"batch_first": batch_first}, "auto")
    query, memory = (testing.normal(n, EMBED, dtype=torch.float64) for n in (QUERIES, KEYS))
    padding = torch.tensor([False, False, True, False, True, False, False])
    arguments = {"key_padding_mask": padding, "average_attn_weights": average}
    torch.testing.assert_close(
        ours(query, memory, memory, **arguments), theirs(query, memory, memory, **arguments)
    )


def test_layer_dropout_does_not_depend_on_the_weights_being_wanted():
    theirs, ours = make_layers({"batch_first": True, "dropout": 0.4}, "auto")
    inputs = make_inputs(theirs, "self")
    results = []
    for need_weights in (False, True):
        torch.manual_seed(2)
        results.append(ours(*inputs, need_weights=need_weights)[0])
    torch.testing.assert_close(*results)
    theirs.eval(), ours.eval()
    torch.testing.assert_close(
        gradients(ours, inputs, need_weights=False), gradients(theirs, inputs, need_weights=False)
    )


@weights_options
def test_layer_with_everything_padded_gives_zeros(need_weights):
    _, ours = make_layers({"batch_first": True, "bias": False}, "auto")
    query, *_ = make_inputs(ours, "self")
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1] = True
    output, weights = ours(query, query, query, padding, need_weights=need_weights)
    assert (output[1] == 0).all() and not output.isnan().any()
    assert weights is None or (weights[1] == 0).all()


@backends
def test_layer_never_runs_torchs_own_path(backend, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("torch's fast path ran")

    monkeypatch.setattr(torch, "_native_multi_head_attention", forbidden)
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", forbidden)
    theirs, ours = make_layers({"batch_first": True}, backend, torch.float32)
    query = testing.normal(2, 5, EMBED)
    block = nn.TransformerEncoderLayer(EMBED, 2, batch_first=True)
    block.self_attn = fnn.MultiheadAttention(EMBED, 2, batch_first=True, backend=backend)
    with torch.no_grad():
        ours.eval()(query, query, query, need_weights=False)
        block.eval()(query)
        nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()(query)


@backends
def test_layer_residual(backend):
    _, ours = make_layers({}, backend)
    query = testing.normal(QUERIES, BATCH, EMBED, dtype=torch.float64)
    residual = testing.normal(QUERIES, BATCH, EMBED, dtype=torch.float64)
    plain, _ = ours(query, query, query, need_weights=False)
    summed, _ = ours(query, query, query, need_weights=False, residual=residual)
    torch.testing.assert_close(summed, plain + residual)


@layers
def test_layer_is_a_drop_in(options):
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    torch.manual_seed(5)
    ours = fnn.MultiheadAttention(EMBED, HEADS, **options)
    assert isinstance(ours, nn.MultiheadAttention)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key in other:
        assert torch.equal(mine[key], other[key]), key
    ours._reset_parameters()
    ours.load_state_dict(other)
    inputs = make_inputs(theirs, "three", torch.float32)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    torch.testing.assert_close(copy.deepcopy(ours)(*inputs), theirs(*inputs))


@layers
def test_layer_from_torch_shares_parameters(options):
    theirs, ours = make_layers(options, None)
    names = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == names.keys()
    assert all(value is names[name] for name, value in ours.named_parameters())
    assert not fnn.MultiheadAttention.from_torch(theirs.eval()).training


@backends
def test_compiled_layer_matches(backend):
    _, ours = make_layers({"batch_first": True}, backend, torch.float32)
    query = testing.normal(2, 5, EMBED)

    def attend(query):
        return ours(query, query, query, need_weights=False)[0]

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = testing.run(compiled, {"query": query})
    expected = testing.run(attend, {"query": query})
    torch.testing.assert_close(results, expected)


@native
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
@pytest.mark.parametrize("name", ["plain", "widths"])
def test_frozen_layer_matches(kind, name):
    if kind != "three" and name == "widths":
        pytest.skip("keys of another width need tensors of their own")
    _, ours = make_layers(LAYERS[name], "cpu", torch.float32)
    inputs = make_inputs(ours, kind, torch.float32)
    with torch.no_grad():
        wanted = ours(*inputs, need_weights=False)[0]
        ours._pack()
        torch.testing.assert_close(ours(*inputs, need_weights=False)[0], wanted)
        weight = ours._packing_sources()[0]
        weight.mul_(2.0)
        changed = ours(*inputs, need_weights=False)[0]
        ours._unpack()
        torch.testing.assert_close(changed, ours(*inputs, need_weights=False)[0])


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of"):
        fnn.MultiheadAttention(4, 2, backend="fast")
