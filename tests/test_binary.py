"""What the compiled libraries ask of the machine and of torch, read from the files themselves.

The ops library must use torch's stable ABI alone, or it breaks with the next torch. And no
instruction beyond the x86-64 baseline may stand outside the functions that are reached after cpuid
said so: a shared inline function that the linker took from an AVX-512 object would crash older
processors far from its cause.
"""

import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from fmkernels import _native
from fmkernels.ops import _cuda_support

pytestmark = [
    pytest.mark.skipif(
        not _native.HAS_NATIVE, reason=f"no native library: {_native.NATIVE_ERROR}"
    ),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils (nm, objdump)"),
]


def libraries() -> dict[str, Path]:
    if not _native.HAS_NATIVE:
        return {}
    return {"ops": Path(_native.build_info()["library"]), "lab": Path(_native.lab().__file__)}


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dynamic_symbols(library: Path, which: str) -> list[str]:
    """Demangled names of the dynamic symbols; `which` is nm's "--undefined-only" or
    "--defined-only"."""
    lines = output("nm", "-D", "-C", which, library).splitlines()
    return [re.sub(r"^[0-9a-f]*\s+\w\s", "", line) for line in lines]


def needed_libraries(library: Path) -> set[str]:
    return set(re.findall(r"NEEDED\s+(\S+)", output("objdump", "-p", library)))


class TestInterface:
    def test_ops_uses_the_stable_abi_alone(self):
        symbols = dynamic_symbols(libraries()["ops"], "--undefined-only")
        assert not [name for name in symbols if re.search(r"\b(at|c10|torch|caffe2)::", name)]
        assert any(re.match(r"(aoti_)?torch_", name) for name in symbols), (
            "control: torch's C interface"
        )

    def test_lab_knows_no_torch(self):
        library = libraries()["lab"]
        symbols = dynamic_symbols(library, "--undefined-only")
        assert not [name for name in symbols if "torch" in name or "c10::" in name]
        assert not [name for name in needed_libraries(library) if "torch" in name]

    def test_needed_libraries(self):
        system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
        if platform.machine() == "x86_64":
            system.add("ld-linux-x86-64.so.2")
        assert needed_libraries(libraries()["lab"]) <= system
        # The two are asked for by the static CUDA runtime, where the CUDA kernels are built in.
        runtime = {"libdl.so.2", "librt.so.1"} if _cuda_support.is_built() else set()
        torch_libraries = {"libtorch.so", "libtorch_cpu.so"}
        assert needed_libraries(libraries()["ops"]) <= system | torch_libraries | runtime

    @pytest.mark.parametrize("name", ["ops", "lab"])
    def test_no_path_of_the_build_machine(self, name):
        library = libraries()[name]
        assert not re.search(r"\b(RPATH|RUNPATH)\b", output("objdump", "-p", library))
        assert b"/torch/include/" not in library.read_bytes(), "__FILE__ of torch's headers"

    def test_kernels_are_not_exported(self):
        for library in libraries().values():
            symbols = dynamic_symbols(library, "--defined-only")
            assert not [name for name in symbols if "fmk::" in name]
        assert not [
            n for n in dynamic_symbols(libraries()["ops"], "--defined-only") if "PyInit" in n
        ]


# --- instructions ---

# AVX mnemonics start with v; below AVX-512 only 16 registers and no opmask registers (%k0 to %k7)
# exist.
AVX = re.compile(r"^v\w+\s.*%[xyz]mm\d")
AVX512 = re.compile(r"%zmm\d|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]\b")
BF16 = re.compile(r"^v(dpbf16ps|cvtne2?ps(2)?pbf16|cvtneps2bf16|cvtne2ps2bf16)")


def instructions(listing: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(demangled function, instruction) from the lines of `objdump -d -C --no-show-raw-insn`."""
    function = ""
    for line in listing:
        if header := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            function = header[1]
        elif "\t" in line:
            yield function, line.split("\t", 1)[1].strip()


def violation(function: str, instruction: str) -> str | None:
    """What is wrong with this instruction in this function, or None.

    A function belongs to an instruction set when its name mentions that namespace, as a template
    argument too: then no other instruction set's code can share its symbol.
    """
    if function.startswith("_Z"):  # too nested for the demangler: names come with their lengths
        isas = set(
            re.findall(r"(?<=11)avx512_bf16|(?<=6)avx512(?!_)|(?<=4)avx2|(?<=6)scalar", function)
        )
    else:
        isas = set(re.findall(r"\bfmk::(avx512_bf16|avx512|avx2|scalar)\b", function))
    if BF16.search(instruction) and isas != {"avx512_bf16"}:
        return "bf16 instruction"
    if AVX512.search(instruction) and not (isas and isas <= {"avx512", "avx512_bf16"}):
        return "AVX-512 instruction"
    if AVX.search(instruction) and (not isas or "scalar" in isas or len(isas) > 1):
        return "AVX instruction"
    return None


@pytest.mark.parametrize(
    ("function", "instruction", "expected"),
    [
        ("fmk::avx512::(anonymous namespace)::f(float*)", "vaddps %zmm0,%zmm1,%zmm2", None),
        ("void fmk::run<fmk::avx512::f()::{lambda()#1}>()", "vaddps %zmm0,%zmm1,%zmm2", None),
        ("fmk::avx2::f() [clone .cold]", "vaddps %ymm0,%ymm1,%ymm2", None),
        ("fmk::scalar::f()", "addps  %xmm0,%xmm1", None),
        ("fmk::avx512_bf16::f()", "vdpbf16ps %zmm0,%zmm1,%zmm2", None),
        ("std::vector<int>::push_back(int)", "vaddps %zmm0,%zmm1,%zmm2", "AVX-512 instruction"),
        ("std::vector<int>::push_back(int)", "vmovups %xmm0,(%rax)", "AVX instruction"),
        ("_GLOBAL__sub_I_conv.cpp", "vpxor  %xmm0,%xmm0,%xmm0", "AVX instruction"),
        ("fmk::scalar::f()", "vaddss %xmm0,%xmm1,%xmm2", "AVX instruction"),
        ("fmk::avx2::f()", "vaddps %ymm16,%ymm1,%ymm2", "AVX-512 instruction"),
        ("fmk::avx2::f()", "kmovw  %eax,%k1", "AVX-512 instruction"),
        ("fmk::avx512::f()", "vdpbf16ps %zmm0,%zmm1,%zmm2", "bf16 instruction"),
        ("fmk::avx512::f()", "vcvtneps2bf16 %zmm0,%ymm0", "bf16 instruction"),
        ("fmk::f()", "verr   %ax", None),
        ("_ZZN3fmk3runIZNS_6avx5121fEvE", "vaddps %zmm0,%zmm1,%zmm2", None),
        ("_ZZN3fmk3runIZNS_11avx512_bf161fEvE", "vdpbf16ps %zmm0,%zmm1,%zmm2", None),
        ("_ZZN3fmk3runIZNS_4avx21fEvE", "vaddps %zmm0,%zmm1,%zmm2", "AVX-512 instruction"),
        ("_ZNSt6vectorIiE9push_backEi", "vaddps %zmm0,%zmm1,%zmm2", "AVX-512 instruction"),
    ],
)
def test_the_rule_itself(function, instruction, expected):
    assert violation(function, instruction) == expected


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the rule is about x86-64")
@pytest.mark.parametrize("name", ["ops", "lab"])
def test_wide_instructions_stay_in_their_namespace(name):
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(libraries()[name])]
    found: dict[str, str] = {}
    wide_functions = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for function, instruction in instructions(process.stdout):
            if "%zmm" in instruction:
                wide_functions.add(function)
            if problem := violation(function, instruction):
                found.setdefault(function, f"{problem}: {instruction}")
    assert process.returncode == 0
    assert not found, "\n".join(f"{function}\n    {text}" for function, text in found.items())
    if "avx512" in _native.build_info()["isas"]:
        assert wide_functions, "control: the listing must show the AVX-512 kernels"
