"""A package with CUDA kernels on whatever machine it meets: why they run, or do not."""

from __future__ import annotations

import os
import re

import pytest
import torch

import fmkernels
from fmkernels.ops import _cuda_support
from fmkernels.ops.attention.backends import CACHED
from fmkernels.ops.rnn.backends import GRU, LSTM

pytestmark = pytest.mark.smoke
built = pytest.mark.skipif(
    not _cuda_support.is_built(), reason="this package was built without CUDA kernels"
)


def test_the_kernels_are_there_where_they_should_be():
    if os.environ.get("FMKERNELS_EXPECT_CUDA") == "1":
        assert _cuda_support.is_built()
    if _cuda_support.is_built():
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert all(has(f"fmkernels::{name}", "CUDA") for name in _cuda_support.OPERATORS)


@built
def test_info_lists_what_was_built():
    build = fmkernels.info().build
    assert build["CUDA operators"] == list(_cuda_support.OPERATORS)
    assert re.fullmatch(r"\d+\.\d(, \d+\.\d)*", build["CUDA architectures"])


def test_info_says_why_not():
    (state,) = [state for state in fmkernels.info().backends if state.name == "cuda"]
    assert state.available or state.reason
    if not _cuda_support.is_built():
        assert "without CUDA kernels" in state.reason or "not loaded" in state.reason
    elif torch.version.cuda is None:
        assert "not a CUDA build" in state.reason
    elif not torch.cuda.is_available():
        assert "driver" in state.reason or "device" in state.reason  # CUDA's own words


@built
def test_the_runtime_answers_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert torch.ops.fmkernels.cuda_device_problem(0) != ""


@pytest.mark.parametrize("backends", [LSTM, GRU, CACHED], ids=["lstm", "gru", "cached"])
def test_cpu_tensors_are_refused_with_a_reason(backends):
    support = backends["cuda"].supports(torch.zeros(1, 1, 8))
    assert not support.ok and support.reason


def test_explicit_backend_raises():
    layer = fmkernels.nn.LSTM(4, 8, backend="cuda")
    with pytest.raises(fmkernels.UnsupportedError, match="cuda: "):
        layer(torch.zeros(2, 1, 4))
