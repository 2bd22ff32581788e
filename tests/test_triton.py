"""What only the Triton backend has: masks at the edges, launches, choices without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels.ops._triton import support

triton = pytest.importorskip("triton")

interpret = [
    pytest.mark.interpret,
    pytest.mark.skipif(not support.INTERPRETING, reason="needs TRITON_INTERPRET=1"),
]


def test_which_table_serves_a_chip():
    assert support.cuda_table(7, 5) is None
    assert [support.cuda_table(*cc) for cc in ((8, 0), (8, 6), (8, 9), (12, 0))] == ["sm_80"] * 4
    assert support.cuda_table(9, 0) == "sm_90" and support.cuda_table(10, 0) == "sm_100"
    assert support.hip_table("gfx942:sramecc+:xnack-") == "gfx942"
    assert support.hip_table("gfx1100") is None


def test_offsets_are_32_bit_only_where_they_fit():
    from fmkernels.ops._triton.launch import index_dtype

    small = torch.empty(2**20, 2**10, device="meta")
    large = torch.empty(2**21, 2**10, device="meta")
    assert index_dtype(small, None) == triton.language.int32
    assert index_dtype(small, large) == triton.language.int64


def test_tf32_only_where_torch_allows_it():
    import fmkernels
    from fmkernels.bench.gpu.sweep import allow_tf32
    from fmkernels.ops._triton.launch import dot_precision

    full, half = torch.empty(1), torch.empty(1, dtype=torch.bfloat16)
    with allow_tf32(False):
        assert dot_precision(full, "matmul") == dot_precision(full, "conv") == "ieee"
    with allow_tf32(True):
        assert dot_precision(full, "matmul") == dot_precision(full, "conv") == "tf32"
        assert dot_precision(full, "conv", exact=True) == "ieee"
        assert dot_precision(half, "conv") == "ieee"
        with fmkernels.precision("exact"):
            assert dot_precision(full, "matmul") == "ieee"


def test_tuning_is_off_by_default_and_cached(monkeypatch):
    from fmkernels.ops._triton import launch

    slow, fast = launch.config(4, 1, BLOCK=16), launch.config(8, 1, BLOCK=32)
    timed = []

    def milliseconds(run, choice):
        timed.append(choice)
        return 2.0 if choice is slow else 1.0

    monkeypatch.setattr(launch, "_milliseconds", milliseconds)
    monkeypatch.setattr(launch, "_tuned", {})
    table = {"slow": slow, "fast": fast}
    monkeypatch.delenv("FMKERNELS_AUTOTUNE", raising=False)
    assert launch.tuned("key", slow, table, None) is slow and not timed
    monkeypatch.setenv("FMKERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launch.tuned("key", slow, table, None) is fast
    assert launch.tuned("key", slow, table, None) is fast
    assert timed == [slow, fast], "each configuration once, and one key once"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch.tuned("other", slow, table, None) is slow


class TestLaunches:
    """The goals for the number of launches; weights are channels_last, so nothing is packed."""

    pytestmark = interpret

    @staticmethod
    def counted(function, *tensors):
        from fmkernels.ops._triton.launch import observed_launches

        leaves = [tensor.requires_grad_() for tensor in tensors]
        with observed_launches() as forward:
            output = function(*leaves)
        with observed_launches() as backward:
            output.backward(torch.ones_like(output))
        return [launch.kernel for launch in forward], [launch.kernel for launch in backward]

    def test_conv_block(self):
        last = torch.channels_last
        forward, backward = self.counted(
            lambda x, w, b: FF.conv2d(
                x, w, b, padding=1, activation="relu", pool=("max", 2), backend="triton"
            ),
            torch.randn(2, 8, 8, 8).to(memory_format=last),
            torch.randn(8, 8, 3, 3).to(memory_format=last),
            torch.randn(8),
        )
        assert len(forward) == 1 and len(backward) <= 3, (forward, backward)

    def test_linear(self):
        forward, backward = self.counted(
            lambda x, w, b: FF.linear(x, w, b, activation="gelu", backend="triton"),
            torch.randn(70, 8),
            torch.randn(9, 8),
            torch.randn(9),
        )
        assert len(forward) == 1 and len(backward) <= 3, (forward, backward)

    @pytest.mark.parametrize("gated", [False, True])
    def test_feed_forward(self, gated):
        extra = {"gate_weight": torch.randn(12, 8)} if gated else {}
        forward, _ = self.counted(
            lambda x, w1, w2: FF.feed_forward(
                x, w1, None, w2, None, activation="silu", backend="triton", **extra
            ),
            torch.randn(5, 8),
            torch.randn(12, 8),
            torch.randn(8, 12),
        )
        assert len(forward) <= 2, forward


@pytest.mark.interpret
@pytest.mark.skipif(not support.INTERPRETING, reason="needs TRITON_INTERPRET=1")
def test_split_reduction_over_many_rows():
    """More rows than a split takes, so that the gradients are summed in two phases."""
    arguments = {
        "input": testing.normal(1100, 20),
        "weight": testing.normal(12, 20),
        "bias": testing.normal(12, 1).squeeze(-1),
    }
    testing.compare(
        lambda **kw: FF.linear(**kw, activation="gelu", backend="triton"),
        lambda **kw: F.gelu(F.linear(**kw)),
        arguments,
    )


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_commands_refuse_a_gpu_that_is_not_there(command):
    from typer.testing import CliRunner

    from fmkernels.bench.commands import app

    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(app, [command, "--device", "cuda"])
    assert result.exit_code == 2 and "finds no GPU" in result.output


def test_dense_convolutions_with_nothing_to_fuse_are_left_to_the_vendor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fmkernels.ops.conv.backends import CONV
    from fmkernels.ops.conv.geometry import ConvOptions

    plain = ConvOptions((1, 1), (1, 1), (1, 1), 1)
    yields = CONV["triton"].yields_to
    with FakeTensorMode():
        input = torch.empty(8, 64, 28, 28, device="cuda")
        weight, few = torch.empty(128, 64, 3, 3), torch.empty(128, 16, 3, 3)
        assert yields(input, weight, plain)[0] == "reference"
        assert yields(input, weight, plain, True) is None, "scale, shift or residual are fused"
        assert yields(input, weight, plain._replace(activation="relu")) is None
        assert yields(input, weight, plain._replace(transposed=True)) is None
        assert yields(input, few, plain._replace(groups=4)) is None
        assert yields(input, few, plain) is None
    assert yields(torch.empty(8, 64, 28, 28), torch.empty(128, 64, 3, 3), plain) is None
