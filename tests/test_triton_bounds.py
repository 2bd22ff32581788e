"""Every access of an interpreted kernel is checked (fixture checked_triton): what that finds.

First in small kernels, then in each family's kernels with a mask broken on purpose.
"""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch

import fmkernels.functional as FF
from fmkernels import nn as fnn
from fmkernels.ops._triton import support

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fmkernels.ops._triton.bounds import OutOfBoundsError  # noqa: E402

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not support.INTERPRETING, reason="needs TRITON_INTERPRET=1"),
]


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, m, step, FROM: tl.constexpr, BLOCK: tl.constexpr):
    """x[FROM + i * step] for i < n, to y[i] for i < m."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + FROM + at * step, mask=at < n, other=0.0)
    tl.store(y_ptr + at, x, mask=at < m)


def copied(x, y, n, m, step=1, start=0, programs=1):
    copy_kernel[(programs,)](x, y, n, m, step, FROM=start, BLOCK=16)


def refused(text):
    return pytest.raises(OutOfBoundsError, match="^" + text)


def test_right_kernels_do_what_they_do_without_the_check():
    memory = torch.arange(40.0)
    copied(memory, memory[20:], 20, 20, programs=2)
    assert torch.equal(memory, torch.arange(20.0).repeat(2)), "views of one memory stay so"
    x, y = torch.arange(60.0).view(20, 3)[:, 0], torch.zeros(20)
    copied(x, y, 20, 20, step=3, programs=2)
    assert torch.equal(x, y)
    copied(x, y[:0], 20, 0, step=3)


def test_an_access_is_described():
    x, y = torch.ones(30)[:20], torch.zeros(30)[:20]
    line = inspect.getsourcelines(copy_kernel.fn)[1] + 5
    with refused(
        r"copy_kernel stores y_ptr at 20 \.\.\. 22 \(3 places\), outside of its 20 "
        rf"\(shape \(20,\), strides \(1,\)\); program \(1, 0, 0\), test_triton_bounds.py:{line}$"
    ):
        copied(x, y, 20, 23, programs=2)


def test_the_first_element_outside_is_seen_on_both_sides():
    x, y = torch.ones(30)[10:20], torch.zeros(10)
    copied(x, y, 10, 10)
    with refused(r"copy_kernel loads x_ptr at 10 \(1 places\), outside of its 10"):
        copied(x, y, 11, 10)
    with refused(r"copy_kernel loads x_ptr at -1 \(1 places\), outside of its 10"):
        copied(x, y, 10, 10, start=-1)
    with refused(r"copy_kernel stores y_ptr at 0 \(1 places\), outside of its 0"):
        copied(x, y[:0], 10, 1)


def test_another_argument_beside_it_is_outside():
    memory = torch.zeros(32)
    with refused(r"copy_kernel loads x_ptr at 16 \.\.\. 31"):
        copied(memory[:16], memory[16:], 16, 16, start=16)
    with refused(r"copy_kernel loads x_ptr at -16 \.\.\. -1"):
        copied(memory[16:], memory[:16], 16, 16, start=-16)


def test_gaps_of_a_view_are_outside():
    x, y = torch.zeros(6, 5)[:, :3], torch.zeros(30)
    with refused(r"copy_kernel loads x_ptr at 3 \.\.\. 14 \(6 places\), between its elements"):
        copied(x, y, 15, 15)
    copied(x[:1].expand(6, 3), y, 3, 15)
    with refused(r"copy_kernel loads x_ptr at 3 "):
        copied(x[:1].expand(6, 3), y, 4, 15)


def test_what_a_mask_leaves_out_may_be_anywhere():
    x, y = torch.ones(4), torch.zeros(4)
    copied(x, y, 0, 4, step=2**28)
    copied(x, y, 0, 4, start=2**45)
    assert not y.any()


@pytest.mark.parametrize("far", [2**20, 2**45, -(2**45), 2**61], ids=str)
def test_far_addresses_belong_to_no_argument(far):
    with refused("copy_kernel loads .*(outside|no argument)"):
        copied(torch.ones(16), torch.ones(16), 16, 16, start=far)


@triton.jit
def atomics_kernel(x_ptr, AT: tl.constexpr, EXCHANGE: tl.constexpr):
    if EXCHANGE:
        tl.atomic_cas(x_ptr + AT, 0, 1)
    else:
        at = tl.arange(0, 4) + AT
        tl.atomic_add(x_ptr + at, 1, mask=at < 8)


def test_atomics():
    x = torch.zeros(8, dtype=torch.int32)
    for exchange, verb in ((False, "updates"), (True, "exchanges")):
        atomics_kernel[(1,)](x, AT=6, EXCHANGE=exchange)
        with refused(f"atomics_kernel {verb} x_ptr at 6"):
            atomics_kernel[(1,)](x[:6], AT=6, EXCHANGE=exchange)
    assert x.tolist() == [0] * 6 + [1, 1]


@triton.jit
def block_kernel(x_ptr, y_ptr, rows, columns, CHECK: tl.constexpr, DESCRIPTOR: tl.constexpr):
    if DESCRIPTOR:
        tile = tl.make_tensor_descriptor(x_ptr, [rows, columns], [columns, 1], [4, 4])
        x = tile.load([4, 4])
    else:
        block = tl.make_block_ptr(x_ptr, (rows, columns), (columns, 1), (4, 4), (4, 4), (1, 0))
        x = tl.load(block, boundary_check=(0, 1)) if CHECK else tl.load(block)
    tl.store(y_ptr + tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4), x)


def test_block_pointers_and_descriptors():
    x, y = torch.ones(7, 8), torch.empty(4, 4)
    for descriptor in (False, True):
        block_kernel[(1,)](x, y, 7, 8, CHECK=True, DESCRIPTOR=descriptor)
        assert y.tolist() == [[1.0] * 4] * 3 + [[0.0] * 4]
    with refused(r"block_kernel loads x_ptr at 60 \.\.\. 63 \(4 places\)"):
        block_kernel[(1,)](x, y, 7, 8, CHECK=False, DESCRIPTOR=False)
    with refused(r"block_kernel loads x_ptr at 60 \.\.\. 63 \(4 places\)"):
        block_kernel[(1,)](x, y, 8, 8, CHECK=False, DESCRIPTOR=True)


@triton.jit
def either_kernel(x_ptr, y_ptr, z_ptr, n):
    lane = tl.arange(0, 8)
    pointers = tl.where(lane < 4, x_ptr + lane, y_ptr + lane)
    tl.store(z_ptr + lane, tl.load(pointers, mask=lane < n, other=0.0))


def test_pointers_of_two_arguments_in_one_access():
    x, y, z = torch.ones(4), torch.full((6,), 2.0), torch.empty(8)
    either_kernel[(1,)](x, y, z, 6)
    assert z.tolist() == [1.0] * 4 + [2.0] * 2 + [0.0] * 2
    with refused(r"either_kernel loads y_ptr at 6 \(1 places\), outside of its 6"):
        either_kernel[(1,)](x, y, z, 7)


@triton.jit
def wide_kernel(x_ptr, y_ptr):
    y = tl.load(x_ptr.to(tl.pointer_type(tl.int64)) + tl.arange(0, 2))
    tl.store(y_ptr + tl.arange(0, 2), y)


def test_an_access_wider_than_an_element():
    x, y = torch.arange(4, dtype=torch.int32), torch.empty(2, dtype=torch.int64)
    wide_kernel[(1,)](x, y)
    with refused("wide_kernel loads x_ptr at 2 "):
        wide_kernel[(1,)](x[:3], y)


def normal(*shape):
    return torch.randn(shape, requires_grad=True)


def trained(output):
    output.sum().backward()


def linear():
    trained(FF.linear(normal(5, 7), normal(3, 7), normal(3), backend="triton"))


def gated():
    weights = {"gate_weight": normal(11, 7)}
    x, up, down = normal(5, 7), normal(11, 7), normal(7, 11)
    FF.feed_forward(x, up, None, down, None, activation="silu", backend="triton", **weights)


def layer_norm():
    trained(FF.layer_norm(normal(5, 7), (7,), normal(7), normal(7), backend="triton"))


def conv(**options):
    options = {"padding": 1, **options}
    x, weight = normal(2, 6, 5, 7), normal(6, 6 // options.get("groups", 1), 3, 3)
    trained(FF.conv2d(x, weight, normal(6), backend="triton", **options))


def depthwise():
    conv(groups=6)


def conv_pool():
    conv(activation="relu", pool=("max", 3, 2, 1))


def max_pool():
    FF.max_pool2d(normal(2, 6, 5, 7), 3, 2, 1, backend="triton")


def channel_norm():
    layer = fnn.ConvBlock2d(3, 6, 3, norm="batch", backend="triton")
    trained(layer(normal(2, 3, 5, 7)))


def attention(**options):
    tensors = (normal(1, 2, 21, 20), normal(1, 2, 37, 20), normal(1, 2, 37, 20))
    trained(FF.scaled_dot_product_attention(*tensors, backend="triton", **options))


def masked_attention():
    attention(attn_mask=normal(1, 2, 21, 37))


def statistics():
    FF.attention_statistics(torch.randn(1, 2, 21, 20), torch.randn(1, 2, 37, 20), backend="triton")


def weights(average=True):
    tensors = (torch.randn(1, 2, 21, 20), torch.randn(1, 2, 37, 20), torch.randn(1, 2, 37, 20))
    FF.attention_with_weights(*tensors, average=average, backend="triton")


def cached_attention():
    caches = torch.randn(2, 1, 2, 19, 20)
    lengths = torch.tensor([19], dtype=torch.int32)
    FF.attention_with_kv_cache(
        torch.randn(1, 2, 1, 20), *caches, cache_seqlens=lengths, backend="triton"
    )


def lstm():
    layer = fnn.LSTM(5, 7, backend="triton")
    trained(layer(normal(4, 3, 5))[0])


def gru():
    layer = fnn.GRU(5, 7, backend="triton")
    trained(layer(normal(4, 3, 5))[0])


def lstm_cell():
    trained(fnn.LSTMCell(5, 7, backend="triton")(normal(3, 5))[0])


# A module in ops, a function there, what is taken from it, what is put in its place, who runs it,
# and what is said.
MUTANTS = {
    "linear: a row of x too many": (
        "_triton.gemm", "gemm_fwd_kernel", "mask_m = offs_m < M", "mask_m = offs_m <= M",
        linear, r"gemm_fwd_kernel loads x_ptr at 35 \.\.\. 41",
    ),
    "linear: the reduction's end": (
        "_triton.gemm", "gemm_fwd_kernel", "offs_k < K - k", "offs_k <= K - k",
        linear, r"gemm_fwd_kernel loads x_ptr at 35 ",
    ),
    "linear: bias without a mask": (
        "_triton.gemm", "gemm_fwd_kernel", "bias_ptr + offs_n, mask=mask_n, other=0.0",
        "bias_ptr + offs_n", linear, r"gemm_fwd_kernel loads bias_ptr at 3 \.\.\.",
    ),
    "linear: a row too many in the weight's gradient": (
        "_triton.gemm", "_bwd_dw_tile", "< last - m", "<= last - m",
        linear, r"gemm_bwd_kernel loads dy_ptr at 15 ",
    ),
    "linear: the input's gradient written without a mask": (
        "_triton.gemm", "_bwd_dx_tile", "mask_m[:, None] & mask_k[None, :]\n    if",
        "mask_k[None, :] & (offs_m >= 0)[:, None]\n    if",
        linear, r"gemm_bwd_kernel stores dx_ptr at 35 ",
    ),
    "feed-forward: a column of the gate too many": (
        "_triton.gemm", "gemm_gated_fwd_kernel", "offs_n < N", "offs_n <= N",
        gated, r"gemm_gated_fwd_kernel loads gate_ptr at 77 ",
    ),
    "norm: a row too many": (
        "norm.triton", "norm_fwd_kernel", "row < rows", "row <= rows",
        layer_norm, r"norm_fwd_kernel loads x_ptr at 35 ",
    ),
    "norm: a column too many, backward": (
        "norm.triton", "_bwd_rows", "column < features", "column <= features",
        layer_norm, r"norm_bwd_kernel loads \w+ at (7|35) ",
    ),
    "conv: padding that is read": (
        "conv.triton_gemm", "gather_tile", "mask=inside[:, None] & mask_c[None, :]",
        "mask=row_mask[:, None] & mask_c[None, :]", conv, r"conv_fwd_kernel loads x_ptr at -\d",
    ),
    "conv: pixels of the output too many": (
        "conv.triton_gemm", "conv_fwd_kernel", "mask = mask_m[:, None] & mask_o[None, :]",
        "mask = (mask_m == mask_m)[:, None] & mask_o[None, :]",
        conv, r"conv_fwd_kernel stores y_ptr at \d+",
    ),
    "conv: pixels too many in the weight's gradient": (
        "conv.triton_gemm", "_bwd_dw_tile", "mask_row = row < last", "mask_row = row <= last",
        conv, r"conv_bwd_kernel loads \w+ at \d+",
    ),
    "conv: pixels too many in the input's gradient": (
        "conv.triton_gemm", "_bwd_dx_tile", "mask_m = row < rows", "mask_m = row <= rows",
        conv, r"conv_bwd_kernel stores dx_ptr at \d+",
    ),
    "depthwise: padding that is read": (
        "conv.triton_depthwise", "_gathered", "mask=inside[:, None] & mask", "mask=mask",
        depthwise, r"conv_depthwise_fwd_kernel loads x_ptr at -\d",
    ),
    "conv and pool: windows past the edge, backward": (
        "conv.triton_pool", "unpooled", "dy_ptr + at, mask=inside, other=0.0", "dy_ptr + at",
        conv_pool, r"conv_bwd_epilogue_kernel loads dy_ptr at ",
    ),
    "pool: padding that is read": (
        "conv.triton_pool", "pool_fwd_kernel", "mask=inside[:, None] & mask", "mask=mask",
        max_pool, r"pool_fwd_kernel loads x_ptr at -\d",
    ),
    "batch norm: a channel too many": (
        "conv.triton_norm", "channel_norm_fwd_kernel", "c < C", "c <= C",
        channel_norm, r"channel_norm_fwd_kernel loads \w+ at ",
    ),
    "attention: a key too many": (
        "attention.triton_tiles", "load_rows", "[:, None] < count", "[:, None] <= count",
        attention, r"attention_fwd_kernel loads \w+ at \d+",
    ),
    "attention: a query too many": (
        "attention.triton_tiles", "store_rows", "[:, None] < count", "[:, None] <= count",
        attention, r"attention_fwd_kernel stores out_ptr at \d+",
    ),
    "attention: rows of the sums too many": (
        "attention.triton_forward", "attention_fwd_kernel", "mask=rows < queries.count",
        "mask=rows <= queries.count", attention, r"attention_fwd_kernel stores lse_ptr at 42 ",
    ),
    "attention: past the mask": (
        "attention.triton_tiles", "add_mask", "< num_rows", "<= num_rows",
        masked_attention, r"attention_fwd_kernel loads mask_ptr at 1554 ",
    ),
    "attention statistics: a row too many": (
        "attention.triton_statistics", "attention_statistics_kernel", "inside = at < num_queries",
        "inside = at <= num_queries",
        statistics, r"attention_statistics_kernel stores entropy_ptr at 42 ",
    ),
    "attention weights: a column too many": (
        "attention.triton_weights", "attention_weights_kernel", "(n + columns < num_keys)",
        "(n + columns <= num_keys)",
        weights, r"attention_weights_kernel stores weights_ptr at 777 ",
    ),
    "attention: a key too many in the cache": (
        "attention.triton_decode", "attention_decode_kernel", "mask=held[:, None] & (lanes",
        "mask=(held == held)[:, None] & (lanes",
        cached_attention, r"attention_decode_kernel loads \w+ at \d+",
    ),
    "lstm: a sequence too many": (
        "rnn.triton_tiles", "rows_mask", "rows < count", "rows <= count",
        lstm, r"lstm_sequence_fwd_kernel loads \w+ at ",
    ),
    "gru: a unit of the weights too many": (
        "rnn.triton_tiles", "load_gate_weight", "rows < HIDDEN", "rows <= HIDDEN",
        gru, r"gru_sequence_fwd_kernel loads w_hh_ptr at 147 ",
    ),
    "lstm cell: a sequence too many": (
        "rnn.triton_step", "tile_at", "rows < batch", "rows <= batch",
        lstm_cell, r"lstm_step_fwd_kernel loads \w+ at ",
    ),
}  # fmt: skip


def test_the_cases_are_right_before_they_are_broken():
    for run in {mutant[4] for mutant in MUTANTS.values()}:
        run()


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_masks_are_caught(name, monkeypatch):
    module, function, found, replacement, run, said = MUTANTS[name]
    kernel = getattr(importlib.import_module(f"fmkernels.ops.{module}"), function)
    kernel.rewrite()
    rewriter = kernel.rewriter
    source = rewriter._prepare_source(inspect.getsourcelines(kernel.fn)[0])
    assert found in source, f"{function} has changed: bring this test up to date"
    broken = rewriter._compile_and_exec(
        rewriter._transform_ast(source.replace(found, replacement))
    )
    monkeypatch.setitem(kernel.rewritten_fn, kernel.fn, broken)
    with pytest.raises(OutOfBoundsError) as caught:
        run()
    assert re.match(said, str(caught.value)), caught.value
