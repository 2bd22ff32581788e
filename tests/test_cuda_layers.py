"""Layers and functions on the backend "cuda", whose kernels the emulator runs on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fmkernels
from fmkernels import functional, nn, testing
from fmkernels._dispatch import SUPPORTED, Backend, Support, select
from fmkernels.ops.rnn import cuda as rnn
from fmkernels.ops.rnn.schema import Sizes

pytestmark = [pytest.mark.emu, pytest.mark.usefixtures("emulated_cuda")]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_recurrent_layers(kind, dtype):
    ours = getattr(nn, kind)(6, 16, 2, bidirectional=True, backend="cuda").to(dtype)
    theirs = getattr(torch.nn, kind)(6, 16, 2, bidirectional=True).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    parameters = dict(ours.named_parameters())

    def run(layer, input, **weights):
        output, _ = torch.func.functional_call(layer, weights, (input,))
        return output

    exact = getattr(torch.nn, kind)(6, 16, 2, bidirectional=True).double()
    testing.compare(
        lambda **a: run(ours, **a),
        lambda **a: run(exact if a["input"].dtype == torch.float64 else theirs, **a),
        {"input": testing.normal(5, 3, 6, dtype=dtype), **parameters},
    )


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_lengths_equal_packed_sequences(kind):
    layer = getattr(nn, kind)(6, 8, bidirectional=True, batch_first=True, backend="cuda")
    plain = getattr(torch.nn, kind)(6, 8, bidirectional=True, batch_first=True)
    plain.load_state_dict(layer.state_dict())
    input, lengths = testing.normal(3, 5, 6), torch.tensor([5, 2, 3])
    output, _ = layer(input, lengths=lengths)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        input, lengths, batch_first=True, enforce_sorted=False
    )
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(plain(packed)[0], batch_first=True)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"activation": "silu"},
        {"activation": "relu"},
        {"activation": "gelu", "scale": 4, "shift": 4},
        {"activation": "tanh", "residual": True},
        {"scale": 4},
    ],
    ids=["plain", "silu", "relu", "scale", "residual", "scale alone"],
)
@pytest.mark.parametrize("axes", [1, 2])
def test_depthwise_convolutions(axes, extras):
    shape = (2, 4, 9, 12)[: 2 + axes]
    arguments = {
        "input": testing.normal(*shape),
        "weight": testing.normal(4, 1, *(3,) * axes),
        "bias": testing.normal(4, 1).flatten(),
    }
    for name in ("scale", "shift"):
        if name in extras:
            arguments[name] = testing.normal(4, 1).flatten()
    if "residual" in extras:
        arguments["residual"] = testing.normal(*shape)
    function = functional.conv1d if axes == 1 else functional.conv2d
    torch_function = torch.nn.functional.conv1d if axes == 1 else torch.nn.functional.conv2d

    def in_torch(input, weight, bias, scale=None, shift=None, residual=None):
        output = torch_function(input, weight, bias, 1, 1, 1, 4)
        vector = (-1, *(1,) * axes)
        output = output if scale is None else output * scale.view(vector)
        output = output if shift is None else output + shift.view(vector)
        output = output if residual is None else output + residual
        return testing.torch_activation(extras.get("activation"), output)

    testing.compare(
        lambda **a: function(
            **a, padding=1, groups=4, activation=extras.get("activation"), backend="cuda"
        ),
        in_torch,
        arguments,
    )


def test_causal_convolution_streams():
    input, weight = testing.normal(2, 4, 21), testing.normal(4, 1, 4)

    def run(piece, state):
        return functional.causal_conv1d(
            piece, weight, groups=4, state=state, return_state=True, backend="cuda"
        )

    whole, _ = run(input, None)
    state, parts = None, []
    for piece in input.split(8, dim=-1):
        part, state = run(piece, state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=-1), whole)


class OperatorLog(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("length", [1, 12])
def test_causal_convolution_reads_its_state_in_place(dtype, activation, length):
    arguments = {
        "input": testing.normal(2, 4, length, dtype=dtype),
        "weight": testing.normal(4, 1, 4, dtype=dtype),
        "bias": testing.normal(4, 1, dtype=dtype).flatten(),
        "state": testing.normal(2, 4, 6, dtype=dtype),
    }

    def definition(input, weight, bias, state):
        joined = torch.cat((state, input), -1)
        output = torch.nn.functional.conv1d(joined, weight, bias, dilation=2, groups=4)
        return testing.torch_activation(activation, output), joined[..., -6:]

    def ours(input, weight, bias, state):
        return functional.causal_conv1d(
            input, weight, bias, 2, 4, state=state, return_state=True, activation=activation,
            backend="cuda",
        )  # fmt: skip

    testing.compare(ours, definition, arguments)
    with OperatorLog() as log:
        functional.causal_conv1d(
            arguments["input"], arguments["weight"], dilation=2, groups=4,
            state=arguments["state"], backend="cuda",
        )  # fmt: skip
    assert "fmkernels.depthwise_forward" in log.names and "aten.cat" not in log.names


def test_causal_convolution_joins_what_no_kernel_reads_in_place():
    """A residual and full groups: the state is put before the input, as on other backends."""
    input, state = testing.normal(2, 4, 9), testing.normal(2, 4, 3)
    weight = testing.normal(4, 1, 4)
    residual = testing.normal(2, 4, 9)
    output = functional.causal_conv1d(
        input, weight, groups=4, state=state, residual=residual, backend="cuda"
    )
    joined = torch.cat((state, input), -1)
    expected = torch.nn.functional.conv1d(joined, weight, groups=4) + residual
    torch.testing.assert_close(output, expected)
    with pytest.raises(fmkernels.UnsupportedError, match="depthwise convolutions only"):
        functional.causal_conv1d(input, testing.normal(4, 4, 4), state=state, backend="cuda")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"groups": 1, "weight": torch.zeros(4, 4, 3, 3)}, "depthwise convolutions only"),
        ({"padding_mode": "reflect"}, "no reflect padding"),
        ({"pool": ("max", 2)}, "no pool"),
        ({"input": torch.zeros(2, 4, 9, 9, dtype=torch.float64),
          "weight": torch.zeros(4, 1, 3, 3, dtype=torch.float64)}, "float32, bfloat16, float16"),
        ({"input": torch.zeros(2, 9, 9, 4).permute(0, 3, 1, 2)}, "channels last"),
    ],
    ids=["dense", "reflect", "pool", "float64", "channels_last"],
)  # fmt: skip
def test_other_convolutions_are_refused(change, reason):
    arguments = {"input": torch.zeros(2, 4, 9, 9), "weight": torch.zeros(4, 1, 3, 3),
                 "groups": 4, "padding": 1, **change}  # fmt: skip
    with pytest.raises(fmkernels.UnsupportedError, match=reason):
        functional.conv2d(**arguments, backend="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=testing.dtype_name)
@pytest.mark.parametrize("paged", [False, True])
def test_attention_with_a_cache(dtype, paged):
    """Against the reference backend, which has tests of its own."""
    results = []
    for backend in ("cuda", "reference"):
        torch.manual_seed(1)
        query = testing.normal(2, 8, 1, 64, dtype=dtype)
        caches = [testing.normal(8, 2, 16, 64, dtype=dtype) for _ in range(2)]
        table = torch.randperm(8).view(2, 4) if paged else None
        if not paged:
            caches = [cache.view(2, 2, 64, 64) for cache in caches]
        new = [testing.normal(2, 2, 1, 64, dtype=dtype) for _ in range(2)]
        results.append(
            functional.attention_with_kv_cache(
                query, *caches, *new, cache_seqlens=torch.tensor([40, 3]), page_table=table,
                window=(30, 0), softcap=8.0, sinks=testing.normal(8, 1).flatten(),
                return_lse=True, backend=backend,
            )
        )  # fmt: skip
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float16 else {}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_what_decoding_does_not_take_is_refused():
    cache = torch.zeros(1, 2, 8, 64)
    for query, value, reason in (
        (torch.zeros(1, 2, 3, 64), cache, "one query per sequence, got 3"),
        (torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 8, 32), "as many features"),
    ):
        with pytest.raises(fmkernels.UnsupportedError, match=reason):
            functional.attention_with_kv_cache(
                query, cache, value, cache_seqlens=8, backend="cuda"
            )


def test_decoding_says_when_a_block_has_too_little_memory(monkeypatch):
    cache = torch.zeros(1, 2, 8, 256)
    monkeypatch.setenv("FMK_EMU_SHARED", "101376")
    with pytest.raises(fmkernels.UnsupportedError, match="bytes of shared memory"):
        functional.attention_with_kv_cache(
            torch.zeros(1, 2, 1, 256), cache, cache, cache_seqlens=8, backend="cuda"
        )


@pytest.mark.parametrize(
    ("sizes", "other"),
    [
        (Sizes(100, 32, 512, 1), None),
        (Sizes(100, 32, 128, 1), "triton"),
        (Sizes(100, 256, 512, 1), "triton"),
    ],
)
def test_the_heuristic_gives_its_reason(sizes, other):
    answer = rnn.recurrence_yields_to(torch.zeros(1), (), None, 0, sizes)
    assert (answer and answer[0]) == other
    assert answer is None or answer[1]


@pytest.mark.parametrize("other_serves", [True, False])
def test_a_backend_yields_only_to_one_that_serves(other_serves):
    def unused(*arguments):
        raise AssertionError

    other = SUPPORTED if other_serves else Support(False, "is not there")
    backends = {
        "cuda": Backend(lambda x: SUPPORTED, unused, unused, None, lambda x: ("triton", "faster")),
        "triton": Backend(lambda x: other, unused, unused),
    }
    assert select("op", backends, "auto", 1)[0] == ("triton" if other_serves else "cuda")
    assert select("op", backends, "cuda", 1)[0] == "cuda"
    if other_serves:
        assert fmkernels.last_decisions()[-1].refused == (
            ("cuda", "leaves this to triton: faster"),
        )


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_compile(kind):
    layer = getattr(nn, kind)(4, 8, backend="cuda")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = testing.normal(3, 2, 4)
    with torch._dynamo.config.patch(allow_rnn=True):
        assert torch.equal(compiled(input)[0], layer(input)[0])


def test_depthwise_convolutions_compile():
    layer = nn.Conv2d(4, 4, 3, groups=4, padding=1, activation="silu", backend="cuda")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = testing.normal(2, 4, 6, 8)
    assert torch.equal(compiled(input), layer(input))
