"""Attention's peers on a GPU, with a stand-in for the package flash-attn."""

from __future__ import annotations

import math
import sys
import types
from functools import partial

import pytest
import torch

import fmkernels.functional as FF
from fmkernels.bench import flash_attention, peers, run, timer, workloads
from fmkernels.bench.candidates import Problem
from fmkernels.bench.roofline import Ceilings
from fmkernels.bench.workloads import Workload

CEILINGS = Ceilings(2, {"fp32": 100.0, "bf16": 200.0}, 10.0, 1 << 20, "a test")


class FlashAttn(types.ModuleType):
    """``(B, S, H, D)``, in half precision, positions counted from the last key."""

    def __init__(self):
        super().__init__("flash_attn")
        self.calls = []

    def flash_attn_func(self, q, k, v, **options):
        self.calls.append(("flash_attn_func", tuple(q.shape), tuple(k.shape), options))
        return self._attend(q, k, v, **options)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
    ):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.diff().max() == max_seqlen_q
        assert cu_seqlens_k.diff().max() == max_seqlen_k
        assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k)) and len(k) == len(v)
        self.calls.append(("flash_attn_varlen_func", tuple(q.shape), tuple(k.shape), options))
        parts = [
            self._attend(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0]
            for a, b, c, d in zip(
                *(x for ends in (cu_seqlens_q, cu_seqlens_k) for x in (ends[:-1], ends[1:])),
                strict=True,
            )
        ]
        return torch.cat(parts)

    @staticmethod
    def _attend(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
    ):
        assert q.dtype in (torch.float16, torch.bfloat16) and not dropout_p
        assert q.size(2) % k.size(2) == 0 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        k, v = (x.repeat_interleave(q.size(2) // k.size(2), 2) for x in (k, v))
        q32, k32, v32 = (x.float().transpose(1, 2) for x in (q, k, v))
        scores = q32 @ k32.mT * (softmax_scale or 1 / math.sqrt(q.size(-1)))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(k.size(1)) - torch.arange(q.size(1))[:, None]
        distance = distance - (k.size(1) - q.size(1))
        if alibi_slopes is not None:
            assert alibi_slopes.dtype == torch.float32
            scores = scores - alibi_slopes.view(-1, q.size(2), 1, 1) * distance.abs()
        left, right = window_size[0], 0 if causal else window_size[1]
        if left >= 0:
            scores = scores.masked_fill(distance < -left, float("-inf"))
        if right >= 0:
            scores = scores.masked_fill(distance > right, float("-inf"))
        return (scores.softmax(-1) @ v32).transpose(1, 2).to(q.dtype)


@pytest.fixture
def package(monkeypatch):
    stand_in = FlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    return stand_in


@pytest.fixture
def quickly(monkeypatch):
    rounds = {"budget_s": 0, "pause_s": 0, "burst_s": 0, "min_rounds": 1}
    real = timer.time_interleaved
    monkeypatch.setattr(timer, "time_interleaved", lambda calls, **_: real(calls, **rounds))


def tensors(heads=4, kv_heads=4, queries=12, keys=12, dtype=torch.bfloat16):
    return (
        torch.randn(2, heads, queries, 8, dtype=dtype),
        torch.randn(2, kv_heads, keys, 8, dtype=dtype),
        torch.randn(2, kv_heads, keys, 8, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.5, "softcap": 2.0},
        {"window": (3, 0), "is_causal": True},
        {"window": (3, 2)},
        {"window": (-1, 2)},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "is_causal": True},
        {"alibi_slopes": torch.rand(2, 4, generator=torch.Generator().manual_seed(0))},
        {"enable_gqa": True, "kv_heads": 2, "is_causal": True},
        {"keys": 20},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_options_mean_the_same(package, options, dtype):
    options = dict(options)
    shapes = {name: options.pop(name) for name in ("kv_heads", "keys") if name in options}
    inputs = tensors(**shapes, dtype=dtype)
    found = flash_attention.attend(package, *inputs, **options)
    doubles = [tensor.double() for tensor in inputs]
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"].double()
    expected = FF.scaled_dot_product_attention(*doubles, **options, backend="reference")
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2)


def test_lengths_are_packed(package):
    query, key, value = tensors(queries=5, keys=9)
    lengths = [4, 9]
    found = flash_attention.attend(package, query, key, value, lengths=lengths)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
    ((name, packed_queries, packed_keys, _),) = package.calls
    assert name == "flash_attn_varlen_func"
    assert (packed_queries, packed_keys) == ((10, 4, 8), (13, 4, 8))


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        ({"dtype": torch.float32}, {}, "float16 and bfloat16 only"),
        ({"keys": 20}, {"is_causal": True}, "from the last key"),
        ({"keys": 20}, {"window": (3, 3)}, "from the last key"),
        ({"keys": 20}, {"alibi_slopes": torch.ones(4)}, "from the last key"),
        ({}, {"lengths": [3, 12], "is_causal": True}, "from the last key"),
        ({"kv_heads": 2}, {}, "without enable_gqa"),
    ],
)
def test_what_would_mean_something_else_is_refused(package, shapes, options, reason):
    with pytest.raises(flash_attention.Refused, match=reason):
        flash_attention.attend(package, *tensors(**shapes), **options)
    assert not package.calls


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 1, 1, 12),
        torch.ones(2, 1, 12, 12, dtype=torch.bool),
        torch.tensor([False] + [True] * 11).expand(2, 1, 1, 12),
    ],
    ids=["added", "per query", "first key"],
)
def test_other_masks_are_refused(package, mask):
    module = workloads.Attention(torch.nn.functional.scaled_dot_product_attention)
    with pytest.raises(flash_attention.Refused, match="no mask"):
        flash_attention.FlashAttention(package, module, mask)


SDPA = partial(Workload, family="attention", substitute=workloads._with_our_attention)
SMALL = {
    "plain": SDPA("plain", build=partial(workloads._sdpa, 2, 4, 24, 16)),
    "causal": SDPA("causal", build=partial(workloads._sdpa, 2, 4, 24, 16, is_causal=True)),
    "padded": SDPA("padded", build=partial(workloads._sdpa, 3, 4, 24, 16, padded=True)),
    "decode": SDPA(
        "decode",
        build=partial(workloads._sdpa, 2, 8, 1, 16, keys=40, kv_heads=2),
        modes=("inference",),
    ),
    "window": SDPA(
        "window",
        build=partial(workloads._windowed, 1, 2, 24, 16, 6),
        substitute=workloads._with_our_window,
    ),
}


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, workload in SMALL.items() for mode in workload.modes]
)
def test_flash_attn_is_a_candidate(package, quickly, name, mode):
    workload = SMALL[name]
    options = run.Options(peers=("flash-attn",))
    cell = run.measure(workload, "bf16", mode, options, CEILINGS)
    flash = cell.fastest("flash-attn")
    assert flash is not None, [(m.candidate, m.message) for m in cell.measurements]
    names = {"padded": "flash_attn_varlen_func"}
    assert {call[0] for call in package.calls} == {names.get(name, "flash_attn_func")}


@pytest.mark.parametrize("workload", [w for w in workloads.WORKLOADS if w.family == "attention"])
def test_every_workload_is_served_or_refused_by_name(package, workload):
    with torch.device("meta"):
        module, inputs = workload.build()
    served = isinstance(module, workloads.Attention)
    assert served == workload.name.startswith("sdpa")
    if served and len(inputs) == 3:
        module = flash_attention.FlashAttention(package, module, None)
        same = inputs[0].size(2) == inputs[1].size(2)
        assert same or not module.options.get("is_causal"), "the package would align otherwise"


def test_without_the_package_the_reason_is_given(quickly, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    options = run.Options(peers=("flash-attn",))
    cell = run.measure(SMALL["plain"], "bf16", "inference", options, CEILINGS)
    (flash,) = (m for m in cell.measurements if m.candidate == "flash-attn")
    assert (flash.status, flash.message) == ("unavailable", "flash_attn is not installed")
    assert not cell.failed


def test_refusals_are_reasons(package, monkeypatch):
    problem = Problem.build(SMALL["plain"], "fp32", "inference")
    with pytest.raises(peers.PeerUnavailable, match="flash-attn: float16 and bfloat16 only"):
        peers.PEERS["flash-attn"](problem)

    def no_such_head(*_, **__):
        raise RuntimeError("FlashAttention only supports head dimension at most 256")

    problem = Problem.build(SMALL["plain"], "bf16", "inference")
    monkeypatch.setattr(package, "flash_attn_func", no_such_head)
    with pytest.raises(peers.PeerUnavailable, match="refused it: RuntimeError: .* at most 256"):
        peers.PEERS["flash-attn"](problem)
    layer = Workload("layer", "attention", partial(workloads._encoder_layer, 2, 8, 64))
    with pytest.raises(peers.PeerUnavailable, match="one call of attention, not a layer"):
        peers.PEERS["flash-attn"](Problem.build(layer, "bf16", "inference"))


def test_pytorchs_kernels_are_candidates_of_their_own(quickly):
    """On the CPU there is one of them, flash; that cuDNN's is not is said with the reason."""
    options = run.Options(peers=("sdpa-flash", "sdpa-cudnn"))
    cell = run.measure(SMALL["causal"], "fp32", "training", options, CEILINGS)
    found = {m.candidate: m for m in cell.measurements}
    assert found["sdpa-flash"].status == "ok", found["sdpa-flash"].message
    assert found["sdpa-cudnn"].status == "unavailable" and found["sdpa-cudnn"].message
    assert not cell.failed


def test_on_a_gpu_all_of_them_are_asked_by_default():
    assert peers.DEFAULT["cpu"] == ("eager",)
    sdpa = {"sdpa-cudnn", "sdpa-flash", "sdpa-mem-efficient"}
    assert set(peers.DEFAULT["cuda"]) == {"eager", "compile", "flash-attn", *sdpa}


def test_other_families_have_no_rows_of_attention_kernels():
    options = run.Options(peers=("compile", *peers.ATTENTION_PEERS))
    (conv,) = workloads.select(match="conv 3x3 8x128x28x28")
    (sdpa,) = workloads.select(match="sdpa 4x8x512x64")
    of_conv = {name for name, *_ in run._entries(conv, options)}
    of_sdpa = {name for name, *_ in run._entries(sdpa, options)}
    assert of_conv == {"eager", "fmkernels", "compile"}
    assert of_sdpa == of_conv | set(peers.ATTENTION_PEERS)
