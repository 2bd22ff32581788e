"""One forward and backward of every operator on the native kernels: enough to see that one build
of the library works under another version of torch than it was compiled against.

    pytest -m smoke
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels
import fmkernels.functional as FF
import fmkernels.nn as fnn
from fmkernels import _native

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(not _native.HAS_NATIVE, reason="needs the native kernels"),
]


def assert_same(ours, theirs, *tensors):
    """Outputs and gradients of two functions of the same tensors agree."""
    results = []
    for function in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in tensors]
        output = function(*leaves)
        output.square().sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_conv2d():
    assert_same(
        lambda x, w, b: FF.conv2d(
            x, w, b, padding=1, activation="relu", pool=("max", 2, 2, 0), backend="cpu"
        ),
        lambda x, w, b: F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 2),
        torch.randn(2, 32, 12, 12),
        torch.randn(32, 32, 3, 3) / 17,
        torch.randn(32),
    )


def test_max_pool2d():
    assert_same(
        lambda x: FF.max_pool2d(x, 3, 2, 1, backend="cpu"),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        torch.randn(2, 5, 9, 9),
    )


def test_linear():
    assert_same(
        lambda x, w, b: FF.linear(x, w, b, activation="gelu", backend="cpu"),
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        torch.randn(7, 33),
        torch.randn(20, 33) / 6,
        torch.randn(20),
    )


def test_lstm():
    reference = torch.nn.LSTM(9, 11, num_layers=2, bidirectional=True)
    layer = fnn.LSTM.from_torch(reference, backend="cpu")
    assert_same(lambda x: layer(x)[0], lambda x: reference(x)[0], torch.randn(6, 3, 9))


def test_attention():
    assert_same(
        lambda q, k, v: FF.scaled_dot_product_attention(q, k, v, is_causal=True, backend="cpu"),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        *(torch.randn(2, 3, 21, 16) for _ in range(3)),
    )


def test_replace_and_freeze():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    input = torch.randn(5, 8)
    with torch.no_grad():
        expected = model(input)
        report = fmkernels.replace(model.eval(), freeze=True, strict=True)
        torch.testing.assert_close(model(input), expected, rtol=1e-4, atol=1e-5)
    assert {row.backend for row in report.rows if row.status != "kept"} == {"cpu"}
