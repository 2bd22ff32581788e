"""Threads take work from each other: every result must be the same whoever computed which part."""

import multiprocessing

import pytest
import torch

from fmkernels import functional as F
from fmkernels import nn


def _spin(stop):
    while not stop.is_set():
        pass


@pytest.fixture(scope="module")
def busy_core():
    """Another program, so that threads of equal shares do not end at the same time."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    process = context.Process(target=_spin, args=(stop,), daemon=True)
    process.start()
    yield
    stop.set()
    process.join()


def _linear(rows, features):
    x, weight = torch.randn(rows, features), torch.randn(features, features)
    return lambda: F.linear(x, weight)


def _conv(channels, size, kernel, stride, layout, groups=1, **options):
    x = torch.randn(2, channels, size, size).contiguous(memory_format=layout)
    weight = torch.randn(channels, channels // groups, kernel, kernel)
    return lambda: F.conv2d(
        x, weight, stride=stride, padding=kernel // 2, groups=groups, **options
    )


def _conv1d():
    x, weight = torch.randn(1, 16, 9000), torch.randn(16, 16, 5)
    return lambda: F.conv1d(x, weight, padding=2)


def _attention(**options):
    query, key, value = (torch.randn(2, 3, 300, 32) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(query, key, value, **options)


def _attention_gradients(**options):
    tensors = [torch.randn(2, 3, 300, 32, requires_grad=True) for _ in range(3)]
    # Sums over heads and queries: what a thread adds up must not depend on the others.
    tensors += [t.requires_grad_() for t in options.values()]

    def run():
        out = F.scaled_dot_product_attention(*tensors[:3], **options)
        return torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), tensors)])

    return run


def _block(layout, norm, **options):
    """A ConvBlock and all its gradients: sums over pixels and images."""
    block = nn.ConvBlock2d(16, 48, 3, padding=1, norm=norm, activation="relu", **options)
    x = torch.randn(3, 16, 40, 40).contiguous(memory_format=layout).requires_grad_()
    tensors = [x, *block.parameters()]

    def run():
        out = block(x)
        gradients = torch.autograd.grad(out.square().sum(), tensors)
        return torch.cat([t.flatten() for t in (out, *gradients)])

    return run


NCHW, NHWC = torch.contiguous_format, torch.channels_last
CASES = {
    "linear": lambda: _linear(300, 400),
    "linear, rows in blocks": lambda: _linear(2500, 150),
    "conv 1x1 NCHW": lambda: _conv(48, 33, 1, 1, NCHW),
    "conv 1x1 NHWC": lambda: _conv(48, 33, 1, 1, NHWC),
    "conv 3x3 NCHW": lambda: _conv(48, 33, 3, 1, NCHW),
    "conv 3x3 NHWC": lambda: _conv(48, 33, 3, 1, NHWC),
    "conv 3x3 stride 2": lambda: _conv(48, 33, 3, 2, NHWC),
    "conv depthwise": lambda: _conv(48, 65, 3, 1, NHWC, groups=48),
    "conv one long row": _conv1d,
    "batch norm NCHW": lambda: _block(NCHW, "batch"),
    "batch norm NHWC": lambda: _block(NHWC, "batch"),
    "batch norm, pool": lambda: _block(NHWC, "batch", pool=("max", 2)),
    "group norm, pool": lambda: _block(NCHW, ("group", 4), pool=("avg", 2)),
    "attention": lambda: _attention(),
    "attention, causal": lambda: _attention(is_causal=True),
    "attention gradients": lambda: _attention_gradients(),
    "attention gradients of a mask": lambda: _attention_gradients(attn_mask=torch.randn(300, 300)),
    "attention gradients of slopes and sinks": lambda: _attention_gradients(
        alibi_slopes=torch.rand(3), sinks=torch.randn(3)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_who_computes_them(name, threads, busy_core):
    torch.manual_seed(0)
    run = CASES[name]()
    expected = run()
    for _ in range(20):
        assert torch.equal(run(), expected)
