"""causal_conv1d: against its definition, and streaming against one shot."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels.ops.conv.backends import CONV
from fmkernels.ops.conv.geometry import ConvOptions

PROBE = torch.zeros(1, 1, 1)
BACKENDS = testing.available_backends(CONV, PROBE, PROBE, ConvOptions((1,), (0, 0), (1,)))
backends = pytest.mark.parametrize("backend", BACKENDS)


def definition(input, weight, bias=None, dilation=1, groups=1, state=None, activation=None):
    reach = dilation * (weight.shape[2] - 1)
    before = input.new_zeros(*input.shape[:2], reach) if state is None else state
    padded = torch.cat((before, input), 2)
    return testing.torch_activation(
        activation, F.conv1d(padded, weight, bias, dilation=dilation, groups=groups)
    )


CASES = {
    "full": (6, 8, 4, 1, 1),
    "full_dilated": (6, 8, 3, 2, 1),
    "depthwise": (12, 12, 4, 1, 12),
    "depthwise_dilated": (12, 12, 4, 3, 12),
    "one_tap": (5, 4, 1, 1, 1),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)


def make(case, dtype=torch.float32, length=23, with_state=True):
    channels, out_channels, taps, dilation, groups = case
    arguments = {
        "input": testing.normal(2, channels, length, dtype=dtype),
        "weight": testing.normal(out_channels, channels // groups, taps, dtype=dtype) / taps**0.5,
        "bias": testing.normal(out_channels, 1, dtype=dtype).flatten(),
    }
    if with_state:
        arguments["state"] = testing.normal(2, channels, dilation * (taps - 1), dtype=dtype)
    return arguments, {"dilation": dilation, "groups": groups}


@backends
@cases
@dtypes
@pytest.mark.parametrize("with_state", [False, True])
def test_matches_the_definition(case, dtype, with_state, backend):
    arguments, options = make(case, dtype, with_state=with_state)
    testing.compare(
        lambda **kw: FF.causal_conv1d(**kw, **options, activation="silu", backend=backend),
        lambda **kw: definition(**kw, **options, activation="silu"),
        arguments,
    )


@backends
@cases
@pytest.mark.parametrize("chunks", [(1, 2, 20), (5, 5, 13), (1,) * 23, (23,)])
def test_streaming_equals_one_shot(case, chunks, backend):
    arguments, options = make(case)
    options["backend"] = backend
    input = arguments.pop("input").requires_grad_()
    state = arguments.pop("state").requires_grad_()
    whole, last = FF.causal_conv1d(input, **arguments, **options, state=state, return_state=True)
    parts, carried = [], state
    for chunk in input.split(chunks, 2):
        part, carried = FF.causal_conv1d(
            chunk, **arguments, **options, state=carried, return_state=True
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    assert torch.equal(carried, last)
    grads = [
        torch.autograd.grad(output.square().sum() + end.sum(), (input, state), allow_unused=True)
        for output, end in ((whole, last), (torch.cat(parts, 2), carried))
    ]
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_state_of_a_short_input_starts_with_zeros():
    input = torch.randn(1, 3, 2)
    _, state = FF.causal_conv1d(input, torch.randn(3, 1, 5), groups=3, return_state=True)
    assert torch.equal(state, F.pad(input, (2, 0)))


@backends
def test_unbatched(backend):
    arguments, options = make(CASES["full"], with_state=False)
    options["backend"] = backend
    single = {**arguments, "input": arguments["input"][0]}
    expected = FF.causal_conv1d(**arguments, **options)[0]
    torch.testing.assert_close(FF.causal_conv1d(**single, **options), expected)


BAD = {
    "state": ({"state": torch.zeros(2, 6, 2)}, ValueError, r"state must have shape \(2, 6, 3\)"),
    "rank": ({"input": torch.zeros(2, 6, 3, 3)}, ValueError, "input must have 2 or 3 dimensions"),
    "flag": ({"return_state": 1}, TypeError, "return_state must be a bool"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(change, error, message):
    arguments, options = make(CASES["full"])
    with pytest.raises(error, match=message):
        FF.causal_conv1d(**(arguments | options | change))
