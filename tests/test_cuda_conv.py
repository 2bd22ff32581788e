"""The depthwise CUDA kernels, executed on the CPU, against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fmkernels import testing
from fmkernels.ops.conv import cuda  # noqa: F401 - defines the ops

pytestmark = [pytest.mark.emu, pytest.mark.usefixtures("emulated_cuda")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.dtype_name)
ops = torch.ops.fmkernels
ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh",
    "hardswish", "hardsigmoid", "mish",
)  # fmt: skip


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, state, *options):
        output, saved = ops.depthwise_forward(input, weight, bias, state, *options, True)
        activation = options[-1]
        kept = output if activation == "relu" else saved if activation else None
        ctx.save_for_backward(input, weight, bias, state, kept)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, state, kept = ctx.saved_tensors
        grads = ops.depthwise_backward(
            grad.contiguous(), input, weight, state, kept, *ctx.options, True, state is not None,
            True, bias is not None,
        )  # fmt: skip
        grad_input, grad_state, grad_weight, grad_bias = grads
        return (
            grad_input,
            grad_weight,
            grad_bias if bias is not None else None,
            grad_state if state is not None else None,
            *(None,) * len(ctx.options),
        )


def in_torch(input, weight, bias, state, stride, padding, dilation, activation):
    top, bottom, left, right = padding
    if state is not None:
        input = torch.cat([state, input], dim=-1)
        left -= state.size(-1)
    input = F.pad(input, (left, right, top, bottom))
    output = F.conv2d(input, weight, bias, stride, 0, dilation, input.size(1))
    return testing.torch_activation(activation, output)


def check(
    dtype,
    image,
    kernel,
    *,
    stride=(1, 1),
    padding=(0, 0, 0, 0),
    dilation=(1, 1),
    multiplier=1,
    bias=True,
    state=None,
    activation=None,
    batch=2,
    channels=3,
):
    outputs = channels * multiplier
    arguments = {
        "input": testing.normal(batch, channels, *image, dtype=dtype),
        "weight": testing.normal(outputs, 1, *kernel, dtype=dtype),
        "bias": testing.normal(outputs, 1, dtype=dtype).flatten() if bias else None,
        "state": None
        if state is None
        else testing.normal(batch, channels, image[0], state, dtype=dtype),
    }
    options = (stride, padding, dilation, activation)
    testing.compare(
        lambda **a: _Depthwise.apply(*a.values(), *options),
        lambda **a: in_torch(*a.values(), *options),
        arguments,
    )


@dtypes
@pytest.mark.parametrize("width", [16, 13, 1])
def test_3x3(dtype, width):
    """Rows that are whole vectors, and rows that are not."""
    check(dtype, (9, width), (3, 3), padding=(1, 1, 1, 1))


@dtypes
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (5, 5), (7, 7), (1, 9)])
def test_kernels(dtype, kernel):
    same = [n // 2 for size in kernel for n in (size, size)]
    check(dtype, (11, 16), kernel, padding=same)


@dtypes
@pytest.mark.parametrize(
    ("stride", "dilation"),
    [((2, 2), (1, 1)), ((1, 3), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (1, 3)), ((3, 2), (2, 3))],
)
def test_stride_and_dilation(dtype, stride, dilation):
    check(dtype, (13, 18), (3, 3), stride=stride, dilation=dilation, padding=(2, 1, 3, 0))


@dtypes
def test_multiplier(dtype):
    check(dtype, (6, 16), (3, 3), multiplier=3, padding=(1, 1, 1, 1))


@dtypes
@pytest.mark.parametrize("length", [8, 17, 700])
@pytest.mark.parametrize("kernel", [2, 4])
def test_causal(dtype, length, kernel):
    check(dtype, (1, length), (1, kernel), padding=(0, 0, kernel - 1, 0), activation="silu")


@dtypes
@pytest.mark.parametrize("length", [2, 16, 21])
def test_causal_with_state(dtype, length):
    check(dtype, (1, length), (1, 4), padding=(0, 0, 3, 0), state=3, activation="silu")
    check(dtype, (1, length), (1, 3), padding=(0, 0, 4, 0), dilation=(1, 2), state=4, bias=False)


def test_chunks_with_state_equal_one_shot():
    input, weight = testing.normal(2, 3, 1, 40), testing.normal(3, 1, 1, 4)
    options = ((1, 1), (0, 0, 3, 0), (1, 1), "silu", False)
    whole, _ = ops.depthwise_forward(input, weight, None, None, *options)
    state, parts = input.new_zeros(2, 3, 1, 3), []
    for chunk in input.split([7, 1, 16, 16], dim=-1):
        part, _ = ops.depthwise_forward(chunk.contiguous(), weight, None, state, *options)
        parts.append(part)
        state = torch.cat([state, chunk], dim=-1)[..., -3:].contiguous()
    assert torch.equal(torch.cat(parts, dim=-1), whole)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(torch.float32, (5, 8), (3, 3), padding=(1, 1, 1, 1), activation=activation)


@dtypes
def test_several_tiles(dtype):
    check(dtype, (40, 140), (3, 3), padding=(1, 1, 1, 1), batch=1, channels=1)


@dtypes
def test_many_small_planes(dtype):
    check(dtype, (4, 4), (3, 3), padding=(1, 1, 1, 1), batch=3, channels=13)


def test_weight_gradient_over_splits(monkeypatch):
    """Blocks with several tiles each, and a block for each tile."""
    for multiprocessors in ("1", "132"):
        monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", multiprocessors)
        check(torch.float32, (17, 40), (3, 3), padding=(1, 1, 1, 1), batch=5, channels=3)


def test_unaligned_data():
    input = testing.normal(2, 3, 6, 16, layout="offset")
    weight = testing.normal(3, 1, 3, 3, layout="offset")
    options = ((1, 1), (1, 1, 1, 1), (1, 1), None)
    output, _ = ops.depthwise_forward(input, weight, None, None, *options, False)
    expected = in_torch(input.double(), weight.double(), None, None, *options)
    testing.assert_within_policy(
        "output", output, in_torch(input, weight, None, None, *options), expected
    )


def test_nan_and_infinity_stay_where_they_belong():
    input = torch.ones(1, 1, 4, 16)
    input[0, 0, 1, 5], input[0, 0, 3, 12] = float("nan"), float("inf")
    weight = torch.ones(1, 1, 3, 3)
    options = ((1, 1), (1, 1, 1, 1), (1, 1), None)
    output, _ = ops.depthwise_forward(input, weight, None, None, *options, False)
    expected = in_torch(input, weight, None, None, *options)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf())


@pytest.mark.parametrize(
    ("image", "kernel", "stride", "padding", "dilation"),
    [
        ((1, 10), (1, 3), (1, 2**29), (0, 0, 1, 1), (1, 1)),
        ((1, 2**29), (1, 3), (1, 1), (0, 0, 2**29, 2**29), (1, 2**29)),
        ((2**29, 1), (3, 1), (1, 1), (2**29, 2**29, 0, 0), (2**29, 1)),
    ],
)
def test_a_reach_beyond_any_memory_is_refused(image, kernel, stride, padding, dilation):
    problem = ops.depthwise_problem(
        0, "float32", (1, 4, *image), (4, 1, *kernel), stride, padding, dilation
    )
    assert "does not fit a block's shared memory" in problem


def test_empty_batch():
    check(torch.float32, (5, 8), (3, 3), padding=(1, 1, 1, 1), batch=0)


def test_gradient_is_deterministic(monkeypatch):
    grads = []
    arguments = {
        "input": testing.normal(3, 2, 9, 24),
        "weight": testing.normal(2, 1, 3, 3),
        "bias": testing.normal(2, 1).flatten(),
        "state": None,
    }
    options = ((1, 1), (1, 1, 1, 1), (1, 1), "gelu")
    for seed in "01":
        monkeypatch.setenv("FMK_EMU_SEED", seed)
        results = testing.run(lambda **a: _Depthwise.apply(*a.values(), *options), arguments)
        grads.append(results)
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 3, 8)}, "input: expected four dimensions"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, "weight: expected a multiple of 3"),
        ({"weight": torch.zeros(3, 1, 9, 9)}, "does not fit the padded input"),
        ({"weight": torch.zeros(3, 1, 3, 3).half()}, "weight: expected the input's dtype"),
        ({"bias": torch.zeros(4)}, "bias: expected shape"),
        ({"state": torch.zeros(2, 3, 6, 2)}, "state: expected at most 0 columns"),
    ],
)
def test_bad_operands_are_named(change, message):
    operands = {
        "input": torch.zeros(2, 3, 6, 8),
        "weight": torch.zeros(3, 1, 3, 3),
        "bias": None,
        "state": None,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        ops.depthwise_forward(*operands.values(), (1, 1), (0,) * 4, (1, 1), None, False)
