"""ConvBlock1d and ConvBlock2d in training and evaluation against torch's layers in sequence."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels.ops.conv.backends import NORM

BACKENDS = testing.available_backends(NORM, torch.zeros(1, 1, 1, 1))
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])

NORMS = {
    "batch": lambda c: nn.BatchNorm2d(c),
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None, eps=1e-3),
    "untracked": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "plain": lambda c: nn.BatchNorm2d(c, affine=False, momentum=0.4),
    "group": lambda c: nn.GroupNorm(4, c),
    "layer": lambda c: nn.GroupNorm(1, c, affine=False),
}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
POOLS = {
    "nopool": None,
    "max2": ("max", 2),
    "max3": ("max", 3, 2, 1),
    "avg2": ("avg", 2),
    "avg3": ("avg", 3, 2, 1),
    "max4": ("max", 4, 3, 1),
}


def reference(conv, norm, activation, pool, input, residual):
    output = norm(conv(input))
    output = output if residual is None else output + residual
    output = testing.torch_activation(activation, output)
    if pool is None:
        return output
    return {"max": F.max_pool2d, "avg": F.avg_pool2d}[pool[0]](output, *pool[1:])


def randomise(*modules):
    torch.manual_seed(3)
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)


def check(conv, norm, activation, pool, input, residual, backend):
    """Outputs, every gradient and the running statistics, over two steps."""
    modules = nn.ModuleList([conv, norm])
    exact = copy.deepcopy(modules).double()
    theirs = copy.deepcopy(modules)
    ours = copy.deepcopy(modules)
    block = fnn.ConvBlock2d.from_torch(*ours, activation=activation, pool=pool, backend=backend)
    names = [name for name, _ in modules.named_parameters()]

    def run(function, modules, dtype):
        leaves = {"input": input.to(dtype)}
        if residual is not None:
            leaves["residual"] = residual.to(dtype)
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        results = {}
        for step in range(2):
            output = function(leaves["input"], leaves.get("residual"))
            torch.manual_seed(step)
            grad = torch.randn(output.shape, dtype=torch.float64).to(dtype)
            sources = [*leaves.values(), *modules.parameters()]
            grads = torch.autograd.grad(output, sources, grad)
            results[f"output{step}"] = output.detach()
            results |= {
                f"grad_{n}{step}": g for n, g in zip([*leaves, *names], grads, strict=True)
            }
        for name, buffer in modules.named_buffers():
            if buffer.is_floating_point():
                results[name] = buffer.clone()
            else:
                assert buffer == 2
        return results

    def torch_step(modules):
        return lambda x, r: reference(*modules, activation, pool, x, r)

    expected = run(torch_step(exact), exact, torch.float64)
    from_torch = run(torch_step(theirs), theirs, input.dtype)
    actual = run(block, ours, input.dtype)
    for name, value in expected.items():
        if "grad_0.bias" in name and isinstance(norm, nn.BatchNorm2d):
            # Zero: the norm takes the bias away again. What is left are the roundings of a sum of
            # the gradients that the weight's gradient sums too, so that one gives the scale.
            scale = expected[name.replace("bias", "weight")]
            torch_error = testing.max_error(from_torch[name], value)
            allowed = testing.allowed_error(torch_error, scale, input.dtype)
            assert testing.max_error(actual[name], value) <= allowed, name
            continue
        testing.assert_within_policy(name, actual[name], from_torch[name], value)


@norms
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@layouts
def test_training_matches_torch(norm, activation, layout, backend):
    conv, norm = nn.Conv2d(5, 8, 3, padding=1), norm(8)
    randomise(conv, norm)
    input = testing.normal(3, 5, 9, 10, layout=layout)
    check(conv, norm, activation, None, input, None, backend)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("with_residual", [False, True])
@layouts
def test_residual_and_pool(pool, activation, norm, with_residual, layout, backend):
    # Triton's interpreter takes seconds for nine taps, and this is about what follows them.
    kernel = 1 if backend == "triton" else 3
    conv, norm = nn.Conv2d(5, 20, kernel, padding=kernel // 2, bias=False), NORMS[norm](20)
    randomise(conv, norm)
    input = testing.normal(2, 5, 9, 10, layout=layout)
    residual = testing.normal(2, 20, 9, 10, layout=layout) if with_residual else None
    check(conv, norm, activation, pool, input, residual, backend)


def test_wide_block_and_large_mean(backend):
    """The variance of values far from zero must not drown in their mean."""
    conv, norm = nn.Conv2d(32, 33, 1), nn.BatchNorm2d(33)
    randomise(conv, norm)
    nn.init.constant_(conv.bias, 100.0)
    check(conv, norm, "relu", None, testing.normal(4, 32, 17, 19), None, backend)


def test_double_precision(backend):
    conv, norm = nn.Conv2d(4, 6, 3).double(), nn.BatchNorm2d(6).double()
    randomise(conv, norm)
    input = testing.normal(2, 4, 7, 8, dtype=torch.float64)
    check(conv, norm, "elu", ("max", 2), input, None, backend)


@pytest.mark.parametrize("wide_norm", [False, True])
def test_bfloat16(wide_norm, backend):
    """Against torch's own error; the norm's parameters may stay float32."""
    torch.manual_seed(1)
    conv, norm = nn.Conv2d(8, 16, 3).bfloat16(), nn.BatchNorm2d(16)
    norm = norm if wide_norm else norm.bfloat16()
    block = fnn.ConvBlock2d.from_torch(
        copy.deepcopy(conv), copy.deepcopy(norm), activation="relu", backend=backend
    )
    input = torch.randn(4, 8, 10, 10).bfloat16()
    exact = nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm)).double()
    for training in (True, False):
        block.train(training)
        exact.train(training), conv.train(training), norm.train(training)
        theirs = norm(conv(input)).relu()
        testing.assert_within_policy("output", block(input), theirs, exact(input.double()).relu())


def test_block_of_one_axis(backend):
    conv, norm = nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)
    block = fnn.ConvBlock1d.from_torch(
        copy.deepcopy(conv), copy.deepcopy(norm), activation="relu", backend=backend
    )
    input = torch.randn(3, 4, 11)
    for training in (True, False):
        for module in (block, conv, norm):
            module.train(training)
        torch.testing.assert_close(block(input), norm(conv(input)).relu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.norm.running_var, norm.running_var)


def test_frozen_norm_trains_its_weight(backend):
    """A norm in evaluation mode inside a training model: scale and shift get gradients."""
    conv, norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    randomise(conv, norm)
    norm.running_mean.normal_()
    norm.eval()
    check_modules = nn.ModuleList([conv, norm])
    ours = copy.deepcopy(check_modules)
    block = fnn.ConvBlock2d.from_torch(*ours, activation="relu", pool=("max", 2), backend=backend)
    input = torch.randn(2, 4, 9, 9)
    expected = reference(conv, norm, "relu", ("max", 2), input, None)
    actual = block(input)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(expected.square().sum(), check_modules.parameters())
    for ours_grad, grad in zip(
        torch.autograd.grad(actual.square().sum(), ours.parameters()), grads, strict=True
    ):
        torch.testing.assert_close(ours_grad, grad, rtol=1e-3, atol=1e-3)


def saved_bytes(function, input, parameters):
    """Bytes held for the backward besides the input and the parameters."""
    owned = {t.untyped_storage().data_ptr() for t in (input, *parameters)}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function(input)
    del output
    return sum(held.values())


def test_less_memory_is_held_for_the_backward(backend):
    conv, norm = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
    block = fnn.ConvBlock2d.from_torch(
        conv, norm, activation="relu", pool=("max", 2), backend=backend
    )
    input = torch.randn(4, 16, 32, 32)
    parameters = (*conv.parameters(), *norm.parameters())
    eager = saved_bytes(lambda x: F.max_pool2d(norm(conv(x)).relu(), 2), input, parameters)
    ours = saved_bytes(block, input, parameters)
    values = 4 * 32 * 32 * 32
    # The convolution's output, and a byte per pooled output.
    assert ours <= 4 * values + values // 4 + 4096
    assert ours < 0.45 * eager


@pytest.mark.parametrize("training", [False, True])
def test_compile(training, backend):
    torch._dynamo.reset()
    block = fnn.ConvBlock2d(
        4, 6, 3, norm="batch", activation="relu", pool=("max", 2), backend=backend
    ).train(training)
    other = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 4, 9, 8, requires_grad=True)
    actual, expected = compiled(input), other(input)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(block.norm.running_var, other.norm.running_var)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), input), torch.autograd.grad(expected.sum(), input)
    )


def test_bad_arguments_are_named(backend):
    with pytest.raises(ValueError, match="norm must be None, 'batch'"):
        fnn.ConvBlock2d(3, 4, 3, norm="instance", backend=backend)
    with pytest.raises(ValueError, match=r"norm\[1\] must divide the 4 channels"):
        fnn.ConvBlock2d(3, 4, 3, norm=("group", 3), backend=backend)
    block = fnn.ConvBlock2d(3, 4, 3, norm="batch", backend=backend)
    with pytest.raises(ValueError, match="more than one value per channel"):
        block(torch.randn(1, 3, 3, 3))
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 4, 3, 3\)"):
        block(torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5))
