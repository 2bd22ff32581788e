"""Loading the compiled part, forcing an instruction set, and life without it."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fmkernels
from fmkernels import _native

PACKAGE = Path(_native.__file__).parent
ISAS = ["scalar", "avx2", "avx512", "avx512_bf16"]

needs_native = pytest.mark.skipif(
    not _native.HAS_NATIVE, reason=f"no native library: {_native.NATIVE_ERROR}"
)


def run_python(code: str, **environ: str | None) -> subprocess.CompletedProcess:
    """`python -c code` in a process of its own; an environment variable of None is removed.

    Not in the current folder: `-c` looks there first, and would find a checkout's sources.
    """
    merged = {**os.environ, **environ}
    variables = {key: text for key, text in merged.items() if text is not None}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd="/", capture_output=True, text=True
    )


def supported_isas() -> list[str]:
    return _native.build_info().get("isas_supported", [])


def test_version_is_stated_once():
    assert fmkernels.__version__ == version("fmkernels")


@needs_native
class TestIsa:
    def test_default_is_the_best_available(self):
        result = run_python("import fmkernels._native as n; print(n.isa())", FMKERNELS_ISA=None)
        assert result.stdout.strip() == supported_isas()[-1]

    def test_empty_means_default(self):
        result = run_python("import fmkernels._native as n; print(n.isa())", FMKERNELS_ISA="")
        assert result.stdout.strip() == supported_isas()[-1]

    @pytest.mark.parametrize("isa", ISAS)
    def test_forced(self, isa):
        result = run_python("import fmkernels._native as n; print(n.isa())", FMKERNELS_ISA=isa)
        if isa in supported_isas():
            assert result.stdout.strip() == isa
        else:
            assert f"RuntimeError: ISA '{isa}'" in result.stderr

    def test_unknown_name_raises_at_the_first_kernel_and_not_at_import(self):
        code = (
            "import torch, fmkernels\n"
            "print('imported')\n"
            "fmkernels.functional.linear(torch.ones(2, 3), torch.ones(4, 3), backend='cpu')"
        )
        result = run_python(code, FMKERNELS_ISA="sse9")
        assert result.stdout.strip() == "imported"
        assert "RuntimeError: unknown ISA 'sse9'" in result.stderr
        assert result.returncode == 1, "an exception, not a crash"

    def test_scalar_is_always_there(self):
        assert _native.build_info()["isas"][0] == "scalar"
        assert supported_isas()[0] == "scalar"

    @pytest.mark.parametrize("isa", ISAS)
    def test_detection_agrees_with_the_kernel(self, isa):
        """Linux lists in /proc/cpuinfo what the processor has and the system lets programs use."""
        if isa not in _native.build_info()["isas"]:
            pytest.skip(f"{isa} is not compiled in")
        needed = {
            "scalar": set(),
            "avx2": {"avx2", "fma", "f16c"},
            "avx512": {"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
            "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
        }[isa]
        flags = set()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                flags = set(line.split(":")[1].split())
                break
        assert (isa in supported_isas()) == (needed <= flags)


@needs_native
class TestPeak:
    @pytest.mark.parametrize("dtype", ["f32", "f64"])
    def test_vectors_do_more(self, dtype):
        """The widest need not do the most: some processors take 512 bits as two halves."""
        isas = supported_isas()[:3]
        scalar, *vectors = (_native.lab().peak_gflops(dtype, 0.02, isa) for isa in isas)
        assert scalar > 0
        assert all(peak > scalar for peak in vectors)

    def test_bf16_only_where_there_is_an_instruction(self):
        lab = _native.lab()
        with pytest.raises(RuntimeError, match="no bf16 multiply-add"):
            lab.peak_gflops("bf16", 0.01, "scalar")
        if "avx512_bf16" in supported_isas():
            peak = lab.peak_gflops("f32", 0.02, "avx512_bf16")
            assert lab.peak_gflops("bf16", 0.02, "avx512_bf16") > peak

    @pytest.mark.parametrize("isa", ISAS)
    def test_read_bandwidth(self, isa):
        if isa not in supported_isas():
            pytest.skip(f"{isa} is not available here")
        assert _native.lab().read_bandwidth_gbs(1 << 20, 0.01, isa) > 0

    def test_bad_arguments(self):
        lab = _native.lab()
        with pytest.raises(ValueError, match="dtype must be"):
            lab.peak_gflops("f8", 0.01)
        with pytest.raises(ValueError, match="bytes must be"):
            lab.read_bandwidth_gbs(100, 0.01)
        with pytest.raises(RuntimeError, match="unknown ISA 'mmx'"):
            lab.peak_gflops("f32", 0.01, "mmx")


class TestWithoutNative:
    @pytest.fixture
    def pure(self, tmp_path):
        """The folder of a copy of the package as a pure-Python install has it."""
        shutil.copytree(PACKAGE, tmp_path / "fmkernels", ignore=shutil.ignore_patterns("*.so"))
        return str(tmp_path)

    def test_import_warns_in_one_line(self, pure):
        result = run_python("import fmkernels", PYTHONPATH=pure, FMKERNELS_REQUIRE_NATIVE=None)
        assert result.returncode == 0, result.stderr
        assert (
            result.stderr.count("RuntimeWarning: fmkernels runs WITHOUT its native kernels") == 1
        )

    def test_layers_still_give_right_answers(self, pure):
        code = (
            "import torch, fmkernels\n"
            "from fmkernels import _native\n"
            "x, w = torch.randn(3, 5), torch.randn(4, 5)\n"
            "torch.testing.assert_close(fmkernels.functional.linear(x, w), x @ w.T)\n"
            "assert not _native.HAS_NATIVE and _native.isa() is None and _native.lab() is None\n"
            "assert _native.build_info() == {'native': False, 'error': _native.NATIVE_ERROR}\n"
            "print('right')"
        )
        result = run_python(code, PYTHONPATH=pure, FMKERNELS_REQUIRE_NATIVE=None)
        assert result.stdout.strip() == "right", result.stderr

    def test_required(self, pure):
        result = run_python("import fmkernels", PYTHONPATH=pure, FMKERNELS_REQUIRE_NATIVE="1")
        assert "ImportError: FMKERNELS_REQUIRE_NATIVE=1, but" in result.stderr

    def test_library_that_does_not_load_is_reported(self, tmp_path):
        (tmp_path / "_ops.so").write_text("not a library")
        reason = _native.load_ops(tmp_path)
        assert reason.startswith("_ops.so does not load into torch")
        assert len(reason) > len("_ops.so does not load into torch") + 20, "the loader's own words"


@needs_native
def test_what_a_kernel_leaves_out_is_poisoned():
    """The suite rests on it: of a sequence of one step, gates are saved for no other step."""
    code = (
        "import torch, fmkernels\n"
        "x, h = torch.randn(3, 2, 5), torch.randn(1, 2, 6)\n"
        "weights = [torch.randn(18, 5), torch.randn(18, 6), torch.randn(18), torch.randn(18)]\n"
        "options = (torch.tensor([3, 1]), True, False)\n"
        "forward = torch.ops.fmkernels.gru_forward\n"
        "*_, gates = forward(x, h, weights, None, *options, True)\n"
        "left_out = gates.reshape(3, 2, 24).isnan()\n"
        "assert left_out[1:, 1].all() and left_out.sum() == 2 * 24\n"
        "print('poisoned')"
    )
    result = run_python(code, FMKERNELS_POISON="1")
    assert result.stdout.strip() == "poisoned", result.stderr
