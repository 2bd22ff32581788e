"""Backend selection, the log of decisions, and the settings' scope."""

from __future__ import annotations

import importlib.metadata
import threading

import pytest
import torch

import fmkernels
import fmkernels.functional as FF
from fmkernels import _dispatch, _native
from fmkernels._dispatch import SUPPORTED, Backend, Support, select
from fmkernels.ops._triton import support


def make_backend(name, support=SUPPORTED):
    return Backend(supports=lambda *problem: support, forward=lambda: name, backward=lambda: name)


@pytest.fixture
def backends():
    refusal = Support(False, "needs a faster machine")
    return {"cpu": make_backend("cpu", refusal), "reference": make_backend("reference")}


def test_a_refusal_needs_a_reason():
    with pytest.raises(ValueError, match="needs a reason"):
        Support(False)


def test_auto_takes_the_first_that_can_and_records_why(backends):
    _dispatch.clear_decisions()
    assert select("op", backends, None, 1, 2)[0] == "reference"
    (decision,) = fmkernels.last_decisions()
    assert decision.op == "op" and decision.chosen == "reference"
    assert decision.refused == (("cpu", "needs a faster machine"),)
    assert str(decision) == "op -> reference (cpu: needs a faster machine)"


def test_the_log_is_bounded(backends):
    for _ in range(1000):
        select("op", backends, "auto")
    assert len(fmkernels.last_decisions()) == 64


@pytest.mark.parametrize("requested", ["cpu", "triton"])
def test_explicit_never_falls_back(backends, requested):
    with pytest.raises(fmkernels.UnsupportedError) as error:
        select("op", backends, requested)
    message = str(error.value)
    assert f"backend '{requested}' cannot serve" in message
    assert "cpu: needs a faster machine" in message
    assert "triton: has no op" in message and "cuda: has no op" in message
    assert "reference: supported" in message


def test_auto_fails_only_if_all_refuse():
    none = {"cpu": make_backend("cpu", Support(False, "broken"))}
    with pytest.raises(fmkernels.UnsupportedError, match="cpu: broken"):
        select("op", none, None)


def test_unknown_names_are_refused(backends):
    with pytest.raises(ValueError, match="backend must be one of auto, cpu"):
        select("op", backends, "gpu")
    with pytest.raises(ValueError, match="name must be one of"):
        fmkernels.use_backend("gpu")
    with pytest.raises(ValueError, match="mode must be one of fast, exact"):
        fmkernels.precision("slow")


def test_use_backend_nests_and_yields_to_the_argument(backends):
    with fmkernels.use_backend("reference"):
        assert select("op", backends, None)[0] == "reference"
        with fmkernels.use_backend("cpu"), pytest.raises(fmkernels.UnsupportedError):
            select("op", backends, None)
        assert fmkernels.current_backend() == "reference"
        with pytest.raises(fmkernels.UnsupportedError):
            select("op", backends, "cpu")
        assert select("op", backends, "auto")[0] == "reference"
    assert fmkernels.current_backend() == "auto"


def test_settings_are_restored_after_an_exception():
    with pytest.raises(KeyError), fmkernels.use_backend("cpu"), fmkernels.precision("exact"):
        raise KeyError
    assert fmkernels.current_backend() == "auto"
    assert fmkernels.current_precision() == "fast"


def test_settings_belong_to_their_thread():
    seen = []
    with fmkernels.use_backend("reference"), fmkernels.precision("exact"):
        thread = threading.Thread(
            target=lambda: seen.extend(
                [fmkernels.current_backend(), fmkernels.current_precision()]
            )
        )
        thread.start()
        thread.join()
        assert fmkernels.current_precision() == "exact"
    assert seen == ["auto", "fast"]


def test_functional_calls_honour_use_backend():
    input, weight = torch.randn(2, 3), torch.randn(4, 3)
    with fmkernels.use_backend("cuda"):
        with pytest.raises(fmkernels.UnsupportedError, match="cuda: has no linear"):
            FF.linear(input, weight)
        FF.linear(input, weight, backend="reference")


def test_other_devices_fall_back_with_a_reason():
    _dispatch.clear_decisions()
    input, weight = torch.randn(2, 3, device="meta"), torch.randn(4, 3, device="meta")
    assert FF.linear(input, weight).shape == (2, 4)
    (decision,) = fmkernels.last_decisions()
    assert decision.chosen == ("triton" if support.TRITON.ok else "reference")
    assert "cpu" in dict(decision.refused)


@pytest.mark.skipif(support.INTERPRETING, reason="the interpreter serves CPU tensors")
def test_triton_refuses_cpu_tensors_and_serves_meta_tensors():
    shapes = (2, 3), (4, 3)
    with pytest.raises(fmkernels.UnsupportedError, match="triton: "):
        FF.linear(*map(torch.randn, shapes), backend="triton")
    if support.TRITON.ok:
        on_meta = [torch.randn(shape, device="meta") for shape in shapes]
        assert FF.linear(*on_meta, backend="triton").shape == (2, 4)


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "is not installed"), ("3.1.0", "3.1.0 is installed")]
)
def test_missing_or_old_triton_is_a_reason(version, reason, monkeypatch):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    found = support._find_triton()
    assert not found.ok and reason in found.reason


def test_compiled_code_follows_use_backend():
    torch._dynamo.reset()
    input, weight = torch.randn(2, 3), torch.randn(4, 3)
    compiled = torch.compile(lambda x: FF.linear(x, weight), fullgraph=True, backend="aot_eager")
    _dispatch.clear_decisions()
    expected = compiled(input)
    with fmkernels.use_backend("reference"):
        torch.testing.assert_close(compiled(input), expected)
    with fmkernels.use_backend("cuda"), pytest.raises(Exception, match="cannot serve this call"):
        compiled(input)
    assert not fmkernels.last_decisions(), "tracing leaves no trace in the log"


# Parts of the backend "cuda": the other backends have the whole.
CUDA_ONLY = ("cuda_", "rnn_recurrence_", "depthwise_", "sdpa_decode")


@pytest.mark.skipif(not _native.HAS_NATIVE, reason="there is no native library to look into")
def test_native_library_has_a_kernel_for_every_op():
    fmkernels.functional  # noqa: B018 - importing it has defined every op
    names = [
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fmkernels::")
    ]
    assert len(names) >= 8
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in names if not name.split("::")[1].startswith(CUDA_ONLY)]
    # An op without a tensor has one for all devices.
    keys = ("CPU", "CompositeExplicitAutograd")
    assert [name for name in names if not any(has(name, key) for key in keys)] == []
