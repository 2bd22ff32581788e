"""replace() on models of Hugging Face's transformers, small and with random weights, offline."""

from __future__ import annotations

import copy

import pytest
import torch

import fmkernels
from fmkernels import _native, testing
from fmkernels._dispatch import clear_decisions
from fmkernels._replace import hub, hub_layers

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(**options):
    config = transformers.BertConfig(
        **SIZES, vocab_size=50, intermediate_size=48, max_position_embeddings=40, **options
    )
    tokens = torch.randint(0, 50, (2, 11))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    return transformers.BertModel(config), {"input_ids": tokens, "attention_mask": mask}


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=40,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (2, 11))}


def vit(**options):
    config = transformers.ViTConfig(
        **SIZES, intermediate_size=48, image_size=24, patch_size=8, num_channels=3, **options
    )
    return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 24, 24)}


def whisper(**options):
    config = transformers.WhisperConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=10, max_target_positions=20, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, **options,
    )  # fmt: skip
    inputs = {
        "input_features": torch.randn(2, 8, 20),
        "decoder_input_ids": torch.randint(3, 50, (2, 7)),
    }
    return transformers.WhisperForConditionalGeneration(config), inputs


def llama(**options):
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=50, intermediate_size=48, num_key_value_heads=2, pad_token_id=0,
        max_position_embeddings=40, **options,
    )  # fmt: skip
    tokens = torch.randint(3, 50, (2, 11))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 8:] = 0
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "attention_mask": mask}


MODELS = {"bert": bert, "gpt2": gpt2, "vit": vit, "whisper": whisper, "llama": llama}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
WITHOUT_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "vit": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "whisper": {"dropout": 0.0, "attention_dropout": 0.0},
    "llama": {},
}


def made(build, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model, inputs = build(**WITHOUT_DROPOUT[build.__name__], **options)
    # Biases and norms that do nothing would hide mistakes.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    return model.to(dtype).eval(), inputs


def output_of(model, inputs):
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def results(model, inputs):
    """The output and the gradient of every parameter."""
    model.zero_grad()
    output = output_of(model, inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    (output * weights.to(output.dtype)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **{n: g.clone() for n, g in grads.items()}}


@models
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("train", [False, True])
def test_nothing_is_kept_and_results_agree(build, attention, train):
    model, inputs = made(build, attn_implementation=attention)
    model.train(train)
    exact = results(copy.deepcopy(model).double(), double(inputs))
    theirs = results(model, inputs)
    state = model.state_dict()
    report = fmkernels.replace(model, strict=True)
    assert not report.of("kept"), report
    assert model.state_dict().keys() == state.keys()
    clear_decisions()
    ours = results(model, inputs)
    torch_ops = [d for d in fmkernels.last_decisions() if d.chosen == "torch"]
    assert not torch_ops, torch_ops
    assert ours.keys() == theirs.keys()
    for name in exact:
        # Twice PyTorch's own error, as everywhere, and a floor for chains of layers: rounding
        # differs from the first layer on. The gradient of a key's bias is zero, as softmax does
        # not see it: what is left of a sum that cancels out, whose size the weight's tells.
        error = testing.max_error(ours[name], exact[name])
        size = exact[name.replace("key.bias", "key.weight")].abs().max().item()
        floor = 2e-5 * max(size, 1e-3)
        assert error <= 2 * testing.max_error(theirs[name], exact[name]) + floor, name
    report.undo()
    assert model.config._attn_implementation == attention
    for name, value in results(model, inputs).items():
        assert torch.equal(value, theirs[name]), name


def double(inputs):
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


def test_rows_name_the_fused_layers():
    def new(build, path):
        model, _ = made(build)
        rows = {row.path: row for row in fmkernels.replace(model).rows}
        return rows[path].status, rows[path].new

    assert new(gpt2, "transformer.h.0.mlp.c_fc") == ("fused", "Conv1D")
    assert new(gpt2, "transformer.h.0.attn.c_attn") == ("replaced", "Conv1D")
    assert new(gpt2, "transformer.h.0.ln_1") == ("replaced", "LayerNorm")
    assert new(vit, "layers.0.mlp.fc1") == ("fused", "Linear")
    assert new(llama, "model.layers.0.mlp") == ("replaced", "GatedMLP")
    assert new(llama, "model.norm") == ("replaced", "RMSNorm")
    attention = ("replaced", "LlamaAttention (fmkernels attention)")
    assert new(llama, "model.layers.0.self_attn") == attention


@models
def test_frozen_inference(build):
    model, inputs = made(build)
    with torch.no_grad():
        expected = output_of(model, inputs)
        fmkernels.replace(model, freeze=True)
        torch.testing.assert_close(output_of(model, inputs), expected, rtol=1e-4, atol=1e-4)


@models
def test_bfloat16(build):
    model, inputs = made(build, torch.bfloat16)
    with torch.no_grad():
        exact = output_of(copy.deepcopy(model).double(), double(inputs))
        theirs = output_of(model, inputs)
        fmkernels.replace(model, strict=True)
        ours = output_of(model, inputs)
    # Not the largest error alone: in chains of layers that is a matter of luck.
    errors = [(t.double() - exact).square().mean().sqrt() for t in (ours, theirs)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("build", [gpt2, llama, whisper], ids=["gpt2", "llama", "whisper"])
def test_generation_with_a_cache(build):
    model, inputs = made(build)
    if "decoder_input_ids" in inputs:
        inputs = {"input_features": inputs["input_features"]}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    fmkernels.replace(model, freeze=True)
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_grouped_and_masked_attention_reaches_the_native_kernel():
    model, inputs = made(llama)
    fmkernels.replace(model, strict=True)
    clear_decisions()
    with torch.no_grad():
        model(**inputs)
    chosen = {d.chosen for d in fmkernels.last_decisions() if "attention" in d.op}
    if _native.HAS_NATIVE:
        assert chosen == {"cpu"}


def test_attention_weights_on_request():
    model, inputs = made(bert)
    layer = model.encoder.layer[0].attention.self
    query, key, value = (torch.randn(2, 4, 11, 8) for _ in range(3))
    mask = torch.rand(2, 1, 11, 11) > 0.3
    output, weights = hub.attention_forward(
        layer, query, key, value, mask, scaling=0.2, output_attentions=True
    )
    scores = (query @ key.transpose(-1, -2) * 0.2).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(weights, scores.softmax(-1).nan_to_num(0.0))
    torch.testing.assert_close(output, (weights @ value).transpose(1, 2))


def test_attention_bias_and_causality():
    query, key, value = (torch.randn(2, 4, 9, 8) for _ in range(3))
    bias, visible = torch.randn(1, 4, 9, 9), torch.ones(9, 9, dtype=torch.bool).tril()
    layer = torch.nn.Module()
    output, _ = hub.attention_forward(layer, query, key, value, None, position_bias=bias)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, bias.masked_fill(~visible, float("-inf"))
    )
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_asked_for_weights_keep_the_attention():
    model, _ = made(bert, attn_implementation="eager", output_attentions=True)
    report = fmkernels.replace(model)
    kept = report.of("kept")
    assert kept and all("output_attentions" in row.reason for row in kept)
    assert model.config._attn_implementation == "eager"


def test_only_the_asked_families():
    model, inputs = made(llama)
    report = fmkernels.replace(model, families=("linear",))
    assert model.config._attn_implementation == "sdpa"
    assert not any("Attention" in row.old for row in report.rows)
    report.undo()
    report = fmkernels.replace(model, families=("attention",))
    assert {row.old for row in report.rows} == {"LlamaAttention"}


class ShiftedRMSNorm(torch.nn.Module):
    """As Gemma's: the weight is an offset from one."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.eps = 1e-6

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, (8,), 1 + self.weight, self.eps)


def test_a_layer_that_only_looks_alike_is_kept():
    ShiftedRMSNorm.__module__ = "transformers.models.fake"
    model = torch.nn.Sequential(ShiftedRMSNorm())
    (row,) = fmkernels.replace(model).rows
    assert row.status == "kept" and "something else" in row.reason


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "silu"])
def test_activations_are_recognised(name):
    activation = transformers.activations.ACT2FN[name]
    expected = {"gelu": "gelu", "silu": "silu"}.get(name, "gelu_tanh")
    assert hub.activation_of(activation) == expected


def test_unknown_activations_are_not():
    for name in ("quick_gelu", "laplace", "relu2", "gelu_10"):
        assert hub.activation_of(transformers.activations.ACT2FN[name]) is None


def test_conv1d_compiles():
    layer = hub_layers.Conv1D(transformers.pytorch_utils.Conv1D(6, 8))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = torch.randn(3, 8)
    torch.testing.assert_close(compiled(input), layer(input))
    compiled(input).sum().backward()
    assert layer.weight.grad is not None
