"""Transformer encoder and decoder layers and the feed-forward block against PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels.nn import _fuse
from fmkernels.ops.attention.backends import SDPA
from fmkernels.ops.attention.schema import Options

BACKENDS = testing.available_backends(SDPA, torch.zeros(1, 1, 1, 1), Options())
backends = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native library")
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

WIDTH, HEADS, HIDDEN, BATCH, TARGETS, SOURCES = 12, 3, 20, 2, 5, 7

LAYERS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "batch_first": {"batch_first": True},
    "gelu": {"activation": "gelu", "batch_first": True, "norm_first": True},
    "module": {"activation": nn.GELU(approximate="tanh")},
    "callable": {"activation": lambda x: F.softplus(x) - 0.5},
    "no_bias": {"bias": False, "norm_first": True},
    "eps": {"layer_norm_eps": 0.1},
}
layers = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
kinds = pytest.mark.parametrize("kind", ["encoder", "decoder"])

CLASSES = {
    "encoder": (nn.TransformerEncoderLayer, fnn.TransformerEncoderLayer),
    "decoder": (nn.TransformerDecoderLayer, fnn.TransformerDecoderLayer),
}


def make_layers(kind, options, backend="auto", dtype=torch.float64, dropout=0.0):
    torch_class, our_class = CLASSES[kind]
    theirs = torch_class(WIDTH, HEADS, HIDDEN, dropout, dtype=dtype, **options)
    with torch.no_grad():
        # Norms and biases start at ones and zeros, where leaving them out would go unnoticed.
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return theirs, our_class.from_torch(theirs, backend=backend)


def make_inputs(kind, layer, dtype=torch.float64):
    def make(length):
        batch_first = layer.self_attn.batch_first
        shape = (BATCH, length, WIDTH) if batch_first else (length, BATCH, WIDTH)
        return testing.normal(*shape, dtype=dtype)

    return [make(TARGETS)] if kind == "encoder" else [make(TARGETS), make(SOURCES)]


def make_masks(kind):
    causal = torch.ones(TARGETS, TARGETS, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, TARGETS, dtype=torch.bool)
    padding[1, -2:] = True
    if kind == "encoder":
        return {"src_mask": causal, "src_key_padding_mask": padding}
    memory_padding = torch.zeros(BATCH, SOURCES, dtype=torch.bool)
    memory_padding[0, -3:] = True
    return {
        "tgt_mask": causal,
        "tgt_key_padding_mask": padding,
        "memory_mask": testing.normal(TARGETS, SOURCES, dtype=torch.float64),
        "memory_key_padding_mask": memory_padding,
    }


def gradients(layer, inputs, **arguments):
    """Output and all gradients of one call."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    output = layer(*leaves, **arguments)
    return output, torch.autograd.grad(output.square().sum(), [*leaves, *layer.parameters()])


@kinds
@layers
@backends
def test_layer_matches_torch(kind, options, backend):
    theirs, ours = make_layers(kind, options, backend)
    inputs = make_inputs(kind, theirs)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


@kinds
@layers
def test_layer_with_masks_matches_torch(kind, options):
    theirs, ours = make_layers(kind, options)
    inputs, masks = make_inputs(kind, theirs), make_masks(kind)
    torch.testing.assert_close(
        gradients(ours, inputs, **masks), gradients(theirs, inputs, **masks)
    )


@kinds
@backends
@dtypes
def test_layer_in_every_dtype(kind, backend, dtype):
    theirs, ours = make_layers(kind, {"activation": "gelu"}, backend, dtype)
    inputs = make_inputs(kind, theirs, dtype)
    exact = gradients(copy.deepcopy(theirs).double(), [t.double() for t in inputs])
    wanted, results = gradients(theirs, inputs), gradients(ours, inputs)
    testing.assert_within_policy("output", results[0], wanted[0], exact[0])
    for index, grads in enumerate(zip(results[1], wanted[1], exact[1], strict=True)):
        # The gradient of the keys' bias is 0: rounding noise of terms of magnitude 1.
        magnitude = max(1.0, grads[2].abs().max().item())
        floor = max(4 * torch.finfo(dtype).eps, testing.FLOORS[dtype]) * magnitude
        allowed = 2 * testing.max_error(grads[1], grads[2]) + floor
        assert testing.max_error(grads[0], grads[2]) <= allowed, index


@kinds
def test_causal_hint(kind):
    theirs, ours = make_layers(kind, {"batch_first": True})
    inputs = make_inputs(kind, theirs)
    mask = nn.Transformer.generate_square_subsequent_mask(TARGETS, dtype=torch.float64)
    prefix = "src" if kind == "encoder" else "tgt"
    hint = "is_causal" if kind == "encoder" else "tgt_is_causal"
    arguments = {f"{prefix}_mask": mask, hint: True}
    torch.testing.assert_close(
        gradients(ours, inputs, **arguments), gradients(theirs, inputs, **arguments)
    )


@kinds
@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_does_not_depend_on_the_backend(kind, norm_first):
    """Masks come from seeds, so the native kernels drop what the reference drops."""
    theirs, ours = make_layers(kind, {"norm_first": norm_first}, dropout=0.3)
    reference = CLASSES[kind][1].from_torch(theirs, backend="reference")
    inputs = make_inputs(kind, theirs)
    results = []
    for layer in (ours, reference):
        torch.manual_seed(2)
        results.append(gradients(layer, inputs))
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(ours(*inputs), ours(*inputs))
    theirs.eval(), ours.eval()
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


@kinds
@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_has_torchs_expectation(kind, norm_first):
    """The mean over many masks, against torch's: each half of the layer drops and rescales."""
    theirs, ours = make_layers(kind, {"norm_first": norm_first}, dropout=0.2)
    inputs = make_inputs(kind, theirs)
    with torch.no_grad():
        means = [
            torch.stack([layer(*inputs) for _ in range(400)]).mean(0) for layer in (ours, theirs)
        ]
    # 400 draws of values of about 1: standard errors of about 0.05, and their largest of many.
    assert (means[0] - means[1]).abs().max() < 0.3
    assert (means[0] - means[1]).abs().mean() < 0.06


@kinds
@layers
def test_training_step_matches_torch(kind, options):
    theirs, ours = make_layers(kind, options)
    ours = copy.deepcopy(ours)
    inputs = make_inputs(kind, theirs)
    states = []
    for layer in (theirs, ours):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            layer(*inputs).square().mean().backward()
            optimizer.step()
        states.append(layer.state_dict())
    for key in states[0]:
        torch.testing.assert_close(states[1][key], states[0][key])


@kinds
@backends
def test_training_and_evaluation_agree_without_dropout(kind, backend):
    _, ours = make_layers(kind, {"batch_first": True}, backend, torch.float32)
    inputs = make_inputs(kind, ours, torch.float32)
    trained = ours.train()(*inputs).detach()
    with torch.no_grad():
        assert torch.equal(ours.eval()(*inputs), trained)


@kinds
@layers
def test_layer_is_a_drop_in(kind, options):
    torch_class, our_class = CLASSES[kind]
    torch.manual_seed(5)
    theirs = torch_class(WIDTH, HEADS, HIDDEN, **options).eval()
    torch.manual_seed(5)
    ours = our_class(WIDTH, HEADS, HIDDEN, **options).eval()
    assert isinstance(ours, torch_class)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key in other:
        assert torch.equal(mine[key], other[key]), key
    ours.load_state_dict(other)
    inputs = make_inputs(kind, theirs, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), theirs(*inputs))
        torch.testing.assert_close(copy.deepcopy(ours)(*inputs), theirs(*inputs))


@kinds
@layers
def test_from_torch_shares_parameters(kind, options):
    theirs, ours = make_layers(kind, options)
    names = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == names.keys()
    assert all(value is names[name] for name, value in ours.named_parameters())
    assert isinstance(ours.self_attn, fnn.MultiheadAttention)
    assert isinstance(ours.linear1, fnn.Linear)
    assert not CLASSES[kind][1].from_torch(theirs.eval()).training


@kinds
def test_hooks_on_children_still_run(kind):
    """Fusing skips the calls of linear1 and linear2; a hook on one must bring it back."""
    _, ours = make_layers(kind, {"activation": nn.ReLU()})
    inputs = make_inputs(kind, ours)
    wanted = ours(*inputs)
    called = []
    hooked = ["self_attn", "self_attn.out_proj", "linear1", "activation", "dropout", "linear2"]
    for name in [*hooked, "dropout1", "dropout2"]:
        ours.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: called.append(name)
        )
    torch.testing.assert_close(ours(*inputs), wanted)
    assert called.count("self_attn") == 1
    assert set(called) == {*hooked, "dropout1", "dropout2"}


@kinds
def test_other_modules_in_the_place_of_linears(kind):
    """What a library puts there (an adapter, a quantised layer) is called as it is."""

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    theirs, _ = make_layers(kind, {})
    theirs.linear1 = Doubled(WIDTH, HIDDEN, dtype=torch.float64)
    theirs.linear2 = Doubled(HIDDEN, WIDTH, dtype=torch.float64)
    ours = CLASSES[kind][1].from_torch(theirs)
    assert ours.linear1 is theirs.linear1
    inputs = make_inputs(kind, theirs)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


@pytest.mark.parametrize("training", [False, True])
def test_activation_sums_and_dropout_are_fused(training, monkeypatch):
    calls = []

    def spy_on(name):
        function = getattr(_fuse, name)

        def spy(*tensors, **options):
            kept = {o: options[o] for o in ("activation", "dropout_p") if options.get(o)}
            calls.append((name, options.get("residual") is not None, kept))
            return function(*tensors, **options)

        monkeypatch.setattr(_fuse, name, spy)

    def forbidden(*args, **kwargs):
        raise AssertionError("dropout ran on its own")

    spy_on("linear")
    spy_on("feed_forward")
    monkeypatch.setattr(nn.Dropout, "forward", forbidden)
    _, ours = make_layers("encoder", {"batch_first": True}, dropout=0.1)
    ours.train(training)(*make_inputs("encoder", ours))
    added_by_product = not training
    dropped = {"dropout_p": 0.1} if training else {}
    assert calls == [
        ("linear", added_by_product, {}),
        ("feed_forward", added_by_product, {"activation": "relu", **dropped}),
    ]


@backends
def test_nested_tensors_of_torchs_encoder(backend, monkeypatch):
    """torch.nn.TransformerEncoder makes nested tensors of padded batches in evaluation."""

    def forbidden(*args, **kwargs):
        raise AssertionError("torch's fast path ran")

    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    source = testing.normal(3, 6, WIDTH)
    padding = torch.arange(6) >= torch.tensor([[6], [2], [4]])
    with torch.no_grad():
        wanted = encoder(source, src_key_padding_mask=padding)
        for index in range(2):
            encoder.layers[index] = fnn.TransformerEncoderLayer.from_torch(
                encoder.layers[index], backend=backend
            )
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", forbidden)
        monkeypatch.setattr(torch, "_native_multi_head_attention", forbidden)
        torch.testing.assert_close(encoder(source, src_key_padding_mask=padding), wanted)


@backends
def test_whole_transformer_of_torch_with_these_layers(backend):
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64}
    theirs = nn.Transformer(WIDTH, HEADS, 2, 2, HIDDEN, **options)
    ours = copy.deepcopy(theirs)
    for stack, our_class in (
        (ours.encoder, fnn.TransformerEncoderLayer),
        (ours.decoder, fnn.TransformerDecoderLayer),
    ):
        for index, layer in enumerate(stack.layers):
            stack.layers[index] = our_class.from_torch(layer, backend=backend)
    inputs = [testing.normal(2, n, WIDTH, dtype=torch.float64) for n in (SOURCES, TARGETS)]
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


@kinds
@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast(kind, norm_first):
    theirs, ours = make_layers(kind, {"norm_first": norm_first}, dtype=torch.float32)
    inputs = make_inputs(kind, theirs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results, wanted = ours(*inputs), theirs(*inputs)
    assert results.dtype == wanted.dtype
    exact = copy.deepcopy(theirs).double()(*(t.double() for t in inputs))
    allowed = 2 * testing.max_error(wanted, exact) + 2**-8
    assert testing.max_error(results, exact) <= allowed


@kinds
@backends
@pytest.mark.parametrize("norm_first", [False, True])
def test_compiled_layer_matches(kind, backend, norm_first):
    _, ours = make_layers(kind, {"norm_first": norm_first}, backend, torch.float32)
    inputs = dict(zip("ab", make_inputs(kind, ours, torch.float32), strict=False))

    def call(**tensors):
        return ours(*tensors.values())

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(testing.run(compiled, inputs), testing.run(call, inputs))


@native
@kinds
def test_frozen_layer_matches(kind):
    _, ours = make_layers(kind, {"batch_first": True}, "cpu", torch.float32)
    inputs = make_inputs(kind, ours, torch.float32)
    with torch.no_grad():
        wanted = ours.eval()(*inputs)
        for module in ours.modules():
            if hasattr(module, "_pack"):
                module._pack()
        torch.testing.assert_close(ours(*inputs), wanted)


# --- FeedForward


@backends
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_feed_forward(backend, activation, frozen):
    layer = fnn.FeedForward(
        WIDTH, HIDDEN, activation, 0.2, dtype=torch.float64, gated=True, backend=backend
    ).eval()
    assert list(layer.state_dict()) == [
        f"{part}.{kind}" for part in ("linear1", "gate", "linear2") for kind in ("weight", "bias")
    ]
    input, residual = (testing.normal(3, 5, WIDTH, dtype=torch.float64) for _ in range(2))
    if frozen:
        for module in layer.modules():
            if hasattr(module, "_pack"):
                module._pack()
    hidden = getattr(F, activation)(F.linear(input, layer.gate.weight, layer.gate.bias))
    hidden = hidden * F.linear(input, layer.linear1.weight, layer.linear1.bias)
    wanted = F.linear(hidden, layer.linear2.weight, layer.linear2.bias) + residual
    torch.testing.assert_close(layer(input, residual=residual), wanted)
    layer.train()
    assert not torch.equal(layer(input), layer(input))


@native
def test_frozen_gate_notices_an_update():
    layer = fnn.FeedForward(8, 6, "silu", gated=True)
    input = torch.randn(3, 8)
    for module in layer.modules():
        if hasattr(module, "_pack"):
            module._pack()
    with torch.no_grad():
        layer.gate.weight.mul_(2)
        after = layer(input)
        for module in layer.modules():
            if hasattr(module, "_pack"):
                module._unpack()
        torch.testing.assert_close(after, layer(input))


@backends
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_feed_forward(backend, activation):
    layer = fnn.FeedForward(WIDTH, HIDDEN, activation, dtype=torch.float64, backend=backend)
    exact = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
    }[activation]
    weights = dict(layer.named_parameters())
    input = testing.normal(2, 3, WIDTH, dtype=torch.float64)
    residual = testing.normal(2, 3, WIDTH, dtype=torch.float64)
    hidden = exact(F.linear(input, weights["linear1.weight"], weights["linear1.bias"]))
    output = F.linear(hidden, weights["linear2.weight"], weights["linear2.bias"])
    torch.testing.assert_close(layer(input), output)
    torch.testing.assert_close(layer(input, residual=residual), output + residual)


@pytest.mark.parametrize("dropout", [None, 0.3])
def test_feed_forward_from_torch(dropout):
    middle = [] if dropout is None else [nn.Dropout(dropout)]
    theirs = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), *middle, nn.Linear(HIDDEN, WIDTH))
    ours = fnn.FeedForward.from_torch(theirs)
    assert ours.linear1.weight is theirs[0].weight and ours.linear2.bias is theirs[-1].bias
    assert ours.training and ours.dropout.p == (dropout or 0.0)
    input = testing.normal(4, WIDTH)
    if dropout is not None:  # masks come from another generator than torch's
        assert not torch.equal(ours(input), ours(input))
        ours.eval(), theirs.eval()
    torch.testing.assert_close(gradients(ours, [input]), gradients(theirs, [input]))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(2, 3), nn.ReLU()),
        nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 2)),
        nn.Sequential(nn.Dropout(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
        nn.Sequential(nn.ReLU(), nn.Linear(2, 3), nn.Linear(3, 2)),
    ],
    ids=["short", "activation", "dropout_first", "order"],
)
def test_feed_forward_refuses_other_sequences(module):
    with pytest.raises(ValueError, match="module must be Sequential"):
        fnn.FeedForward.from_torch(module)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="activation must be one of"):
        fnn.FeedForward(4, 8, "fast")
    with pytest.raises(ValueError, match="backend must be one of"):
        fnn.FeedForward(4, 8, backend="fast")
    for _, our_class in CLASSES.values():
        with pytest.raises(ValueError, match="backend must be one of"):
            our_class(4, 2, backend="fast")
