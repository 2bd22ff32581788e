"""The emulator that runs the CUDA kernels on the CPU: its pieces, the kernels under sanitizers,
and whether it catches kernels that are broken on purpose."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.emu
ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_cuda_rnn.py", "test_cuda_conv.py", "test_cuda_attention.py")
pieces = torch.ops.fmkernels_emulator


@pytest.mark.usefixtures("emulated_ops")
class TestPieces:
    def test_fragments_multiply_matrices(self):
        a = torch.randint(-8, 9, (16, 16)).float()
        b = torch.randint(-8, 9, (16, 8)).float()
        assert torch.equal(pieces.multiply_fragments(a, b), a @ b)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_matrices_are_dealt_to_lanes(self, transposed):
        matrices = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
        lanes = pieces.load_matrices(matrices, transposed)
        source = matrices.transpose(1, 2) if transposed else matrices
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            assert torch.equal(lanes[lane], source[:, row, column : column + 2])

    def test_warp_functions(self):
        values = torch.randn(32)
        lane = torch.arange(32)
        own, flipped, down, from_seventh, positive = pieces.warp_functions(values)
        assert torch.equal(own, values)
        assert torch.equal(flipped, values[lane ^ 5])
        assert torch.equal(down, values[torch.where(lane + 3 < 32, lane + 3, lane)])
        assert (from_seventh == values[7]).all()
        assert (positive == (values > 0).sum()).all()

    @pytest.mark.parametrize("seed", ["0", "1", "2"])
    def test_blocks_meet(self, seed, monkeypatch):
        monkeypatch.setenv("FMK_EMU_SEED", seed)
        sums = pieces.grid_sums(torch.zeros(1), 5)
        assert (sums == 5 * sum(range(64))).all()

    def test_shared_memory_starts_as_nan(self):
        assert pieces.fresh_shared(torch.zeros(1)).isnan().all()

    def test_asynchronous_copies_land_sooner_or_later(self):
        early, late = pieces.asynchronous_copies(torch.zeros(1), 100).view(2, 100, 4)
        assert 25 < (early == 1).all(dim=1).sum() < 75
        assert (early.isnan() | (early == 1)).all() and (late == 1).all()

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("divergent barrier", "deadlock: .* barriers that others never reach"),
            ("different barriers", "wait at different barriers, in lines"),
            ("divergent shuffle", "deadlock: .* barriers that others never reach"),
            ("endless wait", "a store that never comes"),
            ("misaligned vector", "misaligned vector access"),
            ("too many blocks", "too many blocks for a cooperative launch"),
            ("too much shared memory", "too much shared memory"),
        ],
    )
    def test_broken_rules_are_reported(self, what, message):
        with pytest.raises(RuntimeError, match=message):
            pieces.broken(what)


def run_tests(variant: str, library: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The kernels' tests with one build of the emulator, in a process of their own."""
    from build_support import emulator

    # A sanitizer writes to the process's own stderr: pytest must not swallow it.
    command = [sys.executable, "-m", "pytest", "-qx", "--capture=sys", "-p", "no:cacheprovider"]
    if variant == "thread":
        # ThreadSanitizer of gcc 12 wants addresses where it expects them.
        command = ["setarch", "-R", *command]
    environment = {**os.environ, **emulator.environment(variant, library), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT / "tests", env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def emulator():
    sys.path.insert(0, str(ROOT))
    from build_support import emulator, native

    if native.find_compiler(os.environ) is None:
        pytest.skip("the emulator cannot be built: no C++ compiler was found")
    return emulator


# One OS thread per CUDA thread: the smallest case of each kernel.
SMALL = (
    "test_cuda_rnn.py::test_matches_torch",
    "test_cuda_conv.py::test_3x3",
    "test_cuda_conv.py::test_causal_with_state",
    "test_cuda_attention.py::test_features",
    "test_cuda_attention.py::test_softcap_slopes_and_sinks",
)


@pytest.mark.slow
def test_kernels_under_address_and_undefined_sanitizers(emulator):
    # Without the widest layers, which take minutes here and no other path of the code.
    smaller = ("-k", "not large_hidden and not beyond_the_registers")
    done = run_tests("address", emulator.build("address"), *TESTS, *smaller)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_small_cases_under_thread_sanitizer(emulator):
    # float16 takes the way of bfloat16.
    done = run_tests("thread", emulator.build("thread"), *SMALL, "-k", "not -float16")
    report = done.stdout + done.stderr
    assert done.returncode == 0 and "ThreadSanitizer" not in report, report[-6000:]


# A kernel's file, what is taken from it, what is put in its place, the variant that has to notice,
# the tests to run, and what the failure says.
MUTANTS = {
    "dropped barrier": (
        "depthwise_conv.cu",
        "__syncthreads();  // the tiles are complete",
        "",
        "plain",
        "test_cuda_conv.py::test_3x3",
        "error .* against float64",
    ),
    "dropped barrier, as a race": (
        "rnn_forward.cu",
        "__syncthreads();  // all warps' partial sums are there",
        "",
        "thread",
        "test_cuda_rnn.py::test_matches_torch",
        "data race.*(rnn_forward.cu|rnn_product.cuh)",
    ),
    "dropped grid barrier": (
        "rnn_forward.cu",
        "if (step + 1 < steps) barrier.wait();",
        "",
        "plain",
        "test_cuda_rnn.py::test_matches_torch",
        "error .* against float64",
    ),
    "dropped grid barrier, backward": (
        "rnn_backward.cu",
        "if (round < steps) barrier.wait();",
        "",
        "plain",
        "test_cuda_rnn.py::test_matches_torch",
        "error .* against float64",
    ),
    "stage overwritten while it is read": (
        "attention_decode.cu",
        "__syncthreads();  // the stage may be overwritten",
        "",
        "plain",
        "test_cuda_attention.py::test_lengths_around_tiles",
        "error .* against float64",
    ),
    "barrier that some threads miss": (
        "depthwise_grad_weight.cu",
        "__syncthreads();  // the tile is complete",
        "if (threadIdx.x < 64) __syncthreads();",
        "plain",
        "test_cuda_conv.py::test_3x3",
        "wait at different barriers",
    ),
    "tile overwritten while it is read": (
        "depthwise_grad_weight.cu",
        "__syncthreads();  // the tile before has been used",
        "",
        "plain",
        "test_cuda_conv.py::test_weight_gradient_over_splits",
        "error .* against float64",
    ),
    "load past the end of a row": (
        "depthwise_tile.cuh",
        "if (row_inside && c >= 0 && c < shape.width) values[k]",
        "if (row_inside && c >= 0 && c <= shape.width) values[k]",
        "address",
        "test_cuda_conv.py::test_3x3",
        "heap-buffer-overflow",
    ),
    "shared memory one row short": (
        "depthwise_conv.cu",
        "size_t(t.rows) * t.pitch",
        "size_t(t.rows - 1) * t.pitch",
        "address",
        "test_cuda_conv.py::test_3x3",
        "heap-buffer-overflow",
    ),
    "one key too many": (
        "attention_decode.cu",
        "valid = key < end &&",
        "valid = key <= end &&",
        "plain",
        "test_cuda_attention.py::test_lengths_around_tiles",
        "error inf against float64",
    ),
    "copy not waited for": (
        "attention_decode.cu",
        "copy_async_wait<1>();",
        "",
        "plain",
        "test_cuda_attention.py::test_lengths_around_tiles",
        "error .* against float64",
    ),
    "fragment operands exchanged": (
        "rnn_product.cuh",
        "lower.word[k0], upper.word[k1]",
        "upper.word[k1], lower.word[k0]",
        "plain",
        "test_cuda_rnn.py::test_matches_torch",
        "error .* against float64",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MUTANTS))
def test_broken_kernels_are_caught(name, emulator, tmp_path):
    file, found, replacement, variant, tests, report = MUTANTS[name]
    built = emulator.build(variant).parent
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(built, tmp_path / "build" / built.name)
    source = tmp_path / "csrc" / "cuda" / file
    text = source.read_text()
    assert found in text, f"{file} has changed: bring this test up to date"
    source.write_text(text.replace(found, replacement))
    done = run_tests(variant, emulator.build(variant, tmp_path), tests)
    assert done.returncode != 0, "nothing noticed"
    said = done.stdout + done.stderr
    assert re.search(report, said, re.DOTALL), said[-4000:]
