"""The build's decisions: whether to compile, with what, which instruction sets, CUDA or not, and
what a package holds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _import_build_support():
    """build_support is not installed, and putting the checkout on sys.path would shadow the
    installed package."""
    folder = ROOT / "build_support"
    spec = importlib.util.spec_from_file_location(
        "build_support", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_support"] = module
    spec.loader.exec_module(module)


_import_build_support()
from build_support import cuda, native  # noqa: E402

needs_compiler = pytest.mark.skipif(
    native.find_compiler(os.environ) is None, reason="needs a C++ compiler"
)


def make_toolkit(root: Path, major: int = 13, missing: str = "") -> Path:
    """A folder that looks like a CUDA toolkit, less the part called `missing`."""
    files = {
        "nvcc": ("bin/nvcc", "#!/bin/sh\n"),
        "headers": ("include/cuda_runtime.h", ""),
        "cccl": ("include/cccl/nv/target", ""),
        "version": ("include/cuda_runtime_api.h", f"#define CUDART_VERSION  {major}020\n"),
        "library": ("lib64/libcudart_static.a", ""),
    }
    for part, (name, text) in files.items():
        if part != missing:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
            (root / name).chmod(0o755)
    return root


def decide(mode="auto", **changes):
    """cuda.decide for a machine that has everything, with `changes`."""
    machine = {
        "torch_cuda": "13.0",
        "sources": [Path("csrc/cuda/conv.cu")],
        "candidates": [],
        "has_gpu": True,
        "environ": {},
    }
    return cuda.decide(mode, **{**machine, **changes})


class TestCudaDecision:
    def test_everything_there(self, tmp_path):
        decision = decide(candidates=[make_toolkit(tmp_path)])
        assert decision.toolkit == cuda.Toolkit(tmp_path, tmp_path / "lib64", 13)
        assert decision.toolkit.nvcc == tmp_path / "bin" / "nvcc"
        assert decision.gencode == ("-arch=native",)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"sources": []}, "no CUDA sources"),
            ({"torch_cuda": None}, "CPU build"),
            ({"has_gpu": False}, "no GPU here and TORCH_CUDA_ARCH_LIST is not set"),
            ({"torch_cuda": "12.8"}, "no complete CUDA 12 toolkit .* is CUDA 13"),
        ],
    )
    def test_auto_refuses_with_a_reason(self, tmp_path, changes, reason):
        decision = decide(**{"candidates": [make_toolkit(tmp_path)], **changes})
        assert decision.toolkit is None
        assert re.search(reason, decision.reason)

    @pytest.mark.parametrize(
        ("missing", "reason"),
        [
            ("nvcc", "no bin/nvcc"),
            ("headers", "no include/cuda_runtime.h"),
            ("cccl", "no include/nv/target"),
            ("version", "no CUDART_VERSION"),
            ("library", "no libcudart_static.a"),
        ],
    )
    def test_incomplete_toolkit_is_passed_over(self, tmp_path, missing, reason):
        incomplete = make_toolkit(tmp_path / "incomplete", missing=missing)
        assert reason in decide(candidates=[incomplete]).reason
        complete = make_toolkit(tmp_path / "complete")
        assert decide(candidates=[incomplete, complete]).toolkit.root == complete

    def test_toolkit_of_another_major_version_is_passed_over(self, tmp_path):
        old, right = make_toolkit(tmp_path / "12", 12), make_toolkit(tmp_path / "13", 13)
        assert decide(candidates=[old, right]).toolkit.root == right

    def test_arch_list_stands_in_for_a_gpu(self, tmp_path):
        environ = {"TORCH_CUDA_ARCH_LIST": "9.0a"}
        decision = decide(candidates=[make_toolkit(tmp_path)], has_gpu=False, environ=environ)
        assert decision.gencode == ("-gencode=arch=compute_90a,code=sm_90a",)

    def test_never(self, tmp_path):
        assert decide("0", candidates=[make_toolkit(tmp_path)]).toolkit is None

    @pytest.mark.parametrize(
        "changes", [{"sources": []}, {"torch_cuda": None}, {"candidates": []}]
    )
    def test_always_raises_what_auto_refuses(self, tmp_path, changes):
        machine = {"candidates": [make_toolkit(tmp_path)], **changes}
        with pytest.raises(cuda.CudaBuildError, match="FMKERNELS_CUDA=1, but"):
            decide("1", **machine)
        assert decide("auto", **machine).toolkit is None

    def test_always_needs_no_gpu(self, tmp_path):
        decision = decide("1", candidates=[make_toolkit(tmp_path)], has_gpu=False)
        assert decision.gencode == cuda.gencode_flags(cuda.DEFAULT_ARCH_LIST)

    def test_unknown_mode(self):
        with pytest.raises(ValueError, match="FMKERNELS_CUDA must be"):
            decide("yes")

    def test_nvcc_on_the_path_may_be_a_wrapper(self, tmp_path):
        # bin/nvcc without any toolkit around it, as distributions and containers install it.
        wrapper = make_toolkit(tmp_path / "wrapper", missing="headers")
        home = make_toolkit(tmp_path / "home")
        environ = {"PATH": str(wrapper / "bin"), "CUDA_HOME": str(home)}
        candidates = cuda.toolkit_candidates(environ)
        assert candidates.index(home) < candidates.index(wrapper)
        assert cuda.inspect_toolkit(wrapper) == "no include/cuda_runtime.h"

    def test_arch_list(self):
        assert cuda.gencode_flags(" 8.0;9.0a 10.0+PTX;") == (
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_100,code=sm_100",
            "-gencode=arch=compute_100,code=compute_100",
        )

    def test_arch_list_with_an_error(self):
        with pytest.raises(cuda.CudaBuildError, match="'Hopper'"):
            cuda.gencode_flags("8.0;Hopper")


class TestCompiler:
    def test_none(self, tmp_path):
        assert native.find_compiler({"PATH": str(tmp_path)}) is None

    def test_cxx_is_taken_with_its_arguments(self):
        environ = {"CXX": f"{sys.executable} -O", "PATH": os.environ["PATH"]}
        assert native.find_compiler(environ) == [sys.executable, "-O"]

    def test_cxx_that_is_not_there(self):
        with pytest.raises(native.BuildError, match="CXX='no-such-compiler'"):
            native.find_compiler({"CXX": "no-such-compiler", "PATH": os.environ["PATH"]})

    def test_isas_elsewhere_than_x86(self):
        assert [isa.name for isa in native.usable_isas(["unused"], "aarch64")] == ["scalar"]

    def test_isa_that_the_compiler_does_not_know_is_left_out(self, tmp_path, capsys):
        compiler = tmp_path / "old-compiler"
        compiler.write_text('#!/bin/sh\ncase "$*" in *bf16*) exit 1;; esac\ncat > /dev/null\n')
        compiler.chmod(0o755)
        isas = [isa.name for isa in native.usable_isas([str(compiler)], "x86_64")]
        assert isas == ["scalar", "avx2", "avx512"]
        assert "avx512_bf16; that path is left out" in capsys.readouterr().out

    def test_requested_isas(self):
        def names(value):
            isas = native.requested_isas({"FMKERNELS_BUILD_ISAS": value})
            return [isa.name for isa in isas]

        assert names("") == [isa.name for isa in native.ISAS]
        assert names("avx512, avx2") == ["scalar", "avx2", "avx512"]
        with pytest.raises(native.BuildError, match="unknown sse9; there are scalar"):
            names("avx2,sse9")

    def test_job_count(self):
        processors = len(os.sched_getaffinity(0))
        assert native.job_count({}) == processors
        assert native.job_count({"MAX_JOBS": "1"}) == 1
        assert native.job_count({"MAX_JOBS": "100000"}) == processors


@needs_compiler
class TestIncrementalBuild:
    @pytest.fixture
    def unit(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("answer.h").write_text("inline int answer() { return 42; }\n")
        Path("answer.cpp").write_text('#include "answer.h"\nint get() { return answer(); }\n')
        unit = self.make_unit()
        assert not unit.up_to_date()
        unit.compile()
        assert unit.up_to_date()
        return unit

    @staticmethod
    def make_unit(*flags, stamp="1"):
        target = Path("objects/answer.o")
        depend = ("-MMD", "-MF", str(target.with_suffix(".d")))
        compiler = native.find_compiler(os.environ)
        command = (*compiler, *flags, *depend, "-c", "answer.cpp", "-o", str(target))
        return native.Unit(Path("answer.cpp"), target, command, stamp)

    @pytest.mark.parametrize("name", ["answer.cpp", "answer.h"])
    def test_edited_file(self, unit, name):
        Path(name).write_text(Path(name).read_text() + "\n")
        assert not unit.up_to_date()

    def test_removed_header(self, unit):
        Path("answer.h").unlink()
        assert not unit.up_to_date()

    def test_other_flags(self, unit):
        assert not self.make_unit("-O2").up_to_date()

    def test_other_torch(self, unit):
        assert not self.make_unit(stamp="2").up_to_date()

    def test_failed_compile_shows_the_error_and_leaves_nothing_up_to_date(self, unit):
        Path("answer.cpp").write_text("int get() { return no_such_name; }\n")
        with pytest.raises(native.BuildError, match="no_such_name"):
            unit.compile()
        assert not unit.up_to_date()


def run_setup(*arguments, prelude="", **environ):
    """`python setup.py ...` after `prelude`, with `environ` added. Returns the finished
    process."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    code = (
        f"{prelude}\nimport runpy, sys\n"
        f"sys.argv = ['setup.py', *{arguments!r}]\nrunpy.run_path('setup.py', run_name='__main__')"
    )
    variables = {key: text for key, text in os.environ.items() if key not in ("CXX", "MAX_JOBS")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**variables, **environ},
        capture_output=True,
        text=True,
    )


class TestSetup:
    def test_unknown_mode(self):
        result = run_setup("--version", FMKERNELS_BUILD="maybe")
        assert result.returncode != 0
        assert "FMKERNELS_BUILD must be 'auto', '0' or '1', not 'maybe'" in result.stderr

    def test_auto_without_a_compiler_warns_and_goes_on(self, tmp_path):
        result = run_setup("--version", FMKERNELS_BUILD="auto", PATH=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert "no C++ compiler was found" in result.stderr
        assert "WITHOUT native kernels" in result.stderr

    def test_required_without_a_compiler_fails(self, tmp_path):
        result = run_setup("--version", FMKERNELS_BUILD="1", PATH=str(tmp_path))
        assert result.returncode != 0
        assert "FMKERNELS_BUILD=1, but no C++ compiler was found" in result.stderr

    def test_compiler_that_is_not_there_fails_in_auto_too(self):
        result = run_setup("--version", FMKERNELS_BUILD="auto", CXX="no-such-compiler")
        assert result.returncode != 0
        assert "no such compiler" in result.stderr

    def test_old_setuptools_is_named(self):
        prelude = "import setuptools; setuptools.__version__ = '65.5.0'"
        result = run_setup("--version", prelude=prelude)
        assert result.returncode != 0
        assert "needs setuptools 77.0.3 or newer" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources without anything built."""
    target = tmp_path_factory.mktemp("checkout") / "fmkernels"
    ignored = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def run_backend(hook: str, checkout: Path, **environ) -> Path:
    """Run a PEP 517 hook (build_wheel, build_sdist) and return the file it made."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    code = f"import setuptools.build_meta as b; print('made', b.{hook}('dist'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return checkout / "dist" / result.stdout.split("made ")[-1].strip()


@pytest.mark.slow
class TestPackages:
    def test_pure_wheel(self, checkout):
        wheel = run_backend("build_wheel", checkout, FMKERNELS_BUILD="0")
        assert wheel.name.endswith("-py3-none-any.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert not [name for name in names if name.endswith((".so", ".o"))]
        assert {"fmkernels/__init__.py", "fmkernels/py.typed"} <= set(names)
        assert any(name.endswith("licenses/LICENSE") for name in names)
        outside = [n for n in names if not n.startswith(("fmkernels/", "fmkernels-"))]
        assert not outside, "the wheel installs something beside the package"

    def test_sdist_has_what_a_build_reads(self, checkout):
        sdist = run_backend("build_sdist", checkout, FMKERNELS_BUILD="0")
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu")]
        needed = {str(p.relative_to(ROOT)) for p in sources}
        needed |= {"setup.py", "pyproject.toml", "LICENSE", "README.md"}
        needed |= {"build_support/native.py", "build_support/cuda.py", "tests/test_build.py"}
        assert needed <= names

    @needs_compiler
    def test_broken_source_fails_the_install(self, checkout, tmp_path):
        broken = tmp_path / "broken"
        shutil.copytree(checkout, broken)
        for source in [*(broken / "csrc").rglob("*.cpp")]:
            source.write_text("")
        (broken / "csrc" / "cpu" / "isa.cpp").write_text("this does not compile\n")
        code = "import setuptools.build_meta as b; b.build_wheel('dist')"
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=broken, capture_output=True, text=True
        )
        assert result.returncode != 0
        assert "the native build failed" in result.stderr
