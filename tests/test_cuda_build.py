"""The CUDA kernels compiled for real chips: registers, spills, instructions. Nothing runs here."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compile_only
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def static():
    path = ROOT / "benchmarks" / "cuda_static.py"
    spec = importlib.util.spec_from_file_location("cuda_static", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(static):
    tools = static.find_tools()
    if isinstance(tools, str):
        pytest.skip(f"the CUDA kernels cannot be compiled here: {tools}")
    return list(static.rows(tools))


@pytest.mark.slow
def test_kernels_keep_to_registers_and_use_the_hardware(static, rows):
    wrong = {f"{row.kernel} {row.arch}": static.problems(row) for row in rows}
    assert not {key: reasons for key, reasons in wrong.items() if reasons}


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_chip(static, rows):
    by_arch = {arch: {row.kernel for row in rows if row.arch == arch} for arch in static.ARCHS}
    first = by_arch[static.ARCHS[0]]
    assert all(kernels == first for kernels in by_arch.values())
    names = {kernel.split("<")[0] for kernel in first}
    assert names >= {
        "rnn_forward_kernel",
        "rnn_backward_kernel",
        "decode_kernel",
        "decode_float_kernel",
        "merge_kernel",
        "depthwise_forward_kernel",
        "depthwise_grad_input_kernel",
        "depthwise_grad_weight_kernel",
    }


@pytest.mark.slow
def test_static_shared_memory(rows):
    """The rest is dynamic, and the launchers compare it with the device's limit."""
    assert all(row.shared <= 48 << 10 for row in rows)


def test_sources_keep_their_rules():
    """No torch in a kernel's file; inline PTX in one file, each piece with a host twin."""
    files = [path for path in (ROOT / "csrc" / "cuda").iterdir()]
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        assert "torch/" not in re.sub(r"//.*", "", text), path.name
        if path.name != "arch.cuh":
            assert not re.search(r"\basm\b", text), path.name
    arch = (ROOT / "csrc" / "cuda" / "arch.cuh").read_text()
    twin = r"#if defined\(FMK_EMULATE_CUDA\)\n(.*?)#else\n(.*?)#endif"
    twins = re.findall(twin, arch, re.DOTALL)
    assert all(host.strip() for host, _ in twins)
    in_twins = sum(len(re.findall(r"\basm\b", device)) for _, device in twins)
    assert in_twins == len(re.findall(r"\basm\b", arch)) > 0


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN3fmk4cuda47_GLOBAL__N__a_14_x_cu_b18rnn_forward_kernelINS_3f16ELi8EEEvNS0_1PE",
         "rnn_forward_kernel<f16, 8>"),
        ("_ZN3fmk4cuda47_GLOBAL__N__a_14_x_cu_b18rnn_forward_kernelIfLi0EEEvNS0_1PE",
         "rnn_forward_kernel<float, 0>"),
        ("_ZN3fmk4cuda47_GLOBAL__N__a_14_x_cu_b19decode_float_kernelENS0_1PE",
         "decode_float_kernel"),
    ],
)  # fmt: skip
def test_names_of_kernels(static, symbol, name):
    assert static.kernel_name(symbol) == name


def test_problems_are_found(static):
    good = static.Row("rnn_forward_kernel<bf16, 8>", "sm_90", 255, 0, 0, 32, 4)
    assert static.problems(good) == []
    bad = static.Row("rnn_forward_kernel<bf16, 8>", "sm_90", 255, 16, 0, 0, 0)
    assert static.problems(bad) == ["16 bytes spilled", "no matrix instruction", "no 16-byte load"]
    assert static.problems(static.Row("merge_kernel<f16>", "sm_80", 32, 0, 0, 0, 0)) == []
