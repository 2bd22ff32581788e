"""The command line: what it prints, what it writes, and when it fails."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fmkernels
from fmkernels import cli, functional
from fmkernels.bench import candidates, demo, memory, roofline, timer, verify, workloads
from fmkernels.bench.commands import app
from fmkernels.bench.results import SCHEMA_VERSION
from fmkernels.bench.workloads import Workload


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- info


def test_info_says_what_is_built_and_why_not_the_rest(tmp_path):
    result = invoke("info", "--json", tmp_path / "info.json")
    assert result.exit_code == 0, result.output
    for label in ("fmkernels", "native library", "ISA", "threads", "CPU flags", "torch", "triton"):
        assert label in result.output
    written = json.loads((tmp_path / "info.json").read_text())
    assert written["version"] == fmkernels.__version__
    assert written["threads"] == torch.get_num_threads()
    for backend in written["backends"]:
        assert backend["available"] or backend["reason"]


def test_info_is_readable_as_text_too():
    text = str(fmkernels.info())
    assert any(line.split() == ["torch", torch.__version__] for line in text.splitlines())
    assert any(line.startswith("backend reference") for line in text.splitlines())


def test_an_isa_that_does_not_exist_is_an_error_and_no_traceback(monkeypatch):
    def refuse():
        raise RuntimeError("FMKERNELS_ISA=mmx: unknown")

    monkeypatch.setattr(fmkernels, "info", refuse)
    result = invoke("info")
    assert result.exit_code == 2
    assert result.output.strip() == "FMKERNELS_ISA=mmx: unknown"


# --- the entry point


def test_missing_packages_are_named_with_the_command_that_brings_them(monkeypatch, capsys):
    monkeypatch.setattr(cli, "missing_packages", lambda: ["typer", "rich"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "typer, rich" in message
    assert "pip install 'fmkernels[bench]'" in message


def test_the_entry_point_imports_without_the_extra(tmp_path):
    # Packages of these names that fail to import stand in for absent ones.
    blocker = "import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'matplotlib']))"
    script = f"{blocker}; import fmkernels.cli, fmkernels"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- verify


def test_verify_passes_and_writes_every_verdict(tmp_path):
    file = tmp_path / "verify.json"
    result = invoke("verify", "--family", "linear", "--backend", "reference", "--json", file)
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert (written["schema_version"], written["ok"]) == (1, True)
    assert {verdict["dtype"] for verdict in written["verdicts"]} == set(verify.DTYPES)
    for verdict in written["verdicts"]:
        assert 0 <= verdict["error"] <= verdict["allowed"]
        assert verdict["backend"] == "reference"
    count = len(written["verdicts"])
    assert f"{count} of {count} cases passed" in result.output


def test_verify_covers_every_family():
    families = {case.family for case in verify.select()}
    assert families == {"conv", "linear", "rnn", "attention"}
    names = [(case.op, case.name) for case in verify.select()]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(not fmkernels.info().native, reason="no native kernels")
def test_verify_defaults_to_the_cpu_backend_and_shows_its_ops():
    result = invoke("verify", "--family", "linear", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert "linear_forward" in result.output
    assert "linear_backward" in result.output


def test_verify_fails_on_a_wrong_output(monkeypatch, tmp_path):
    right = functional.linear
    monkeypatch.setattr(functional, "linear", lambda *a, **k: right(*a, **k) * 1.01)
    file = tmp_path / "verify.json"
    result = invoke(
        "verify", "--family=linear", "--backend=reference", "--dtype=fp32", "--json", file
    )
    assert result.exit_code == 1
    assert "FAILED linear fp32 on reference" in result.output
    written = json.loads(file.read_text())
    assert not written["ok"]
    assert not any(v["ok"] for v in written["verdicts"] if v["op"] in ("linear", "Linear"))


def test_verify_fails_on_a_wrong_gradient_alone(monkeypatch):
    right = functional.linear

    def wrong_gradient(*args, **kwargs):
        output = right(*args, **kwargs)
        return output + 0.01 * (output - output.detach())

    monkeypatch.setattr(functional, "linear", wrong_gradient)
    result = invoke("verify", "--family=linear", "--backend=reference", "--dtype=fp64")
    assert result.exit_code == 1
    assert "grad weight" in result.output or "grad input" in result.output


def test_verify_fails_when_the_named_backend_did_not_compute(monkeypatch):
    right = functional.linear
    monkeypatch.setattr(
        functional, "linear", lambda *a, backend, **k: right(*a, backend="reference", **k)
    )
    result = invoke("verify", "--family=linear", "--backend=cpu", "--dtype=fp32")
    assert result.exit_code == 1
    assert "no fmkernels op ran" in result.output


def test_verify_fails_with_the_reason_when_a_backend_cannot_serve():
    result = invoke("verify", "--family=linear", "--backend=cuda", "--dtype=fp32")
    assert result.exit_code == 1
    assert "UnsupportedError" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "--backend", "auto"),
        ("verify", "--family", "models"),
        ("verify", "--dtype", "int8"),
        ("bench", "--family", "pooling"),
        ("bench", "--dtype", "fp64"),
        ("bench", "--mode", "sleep"),
        ("bench", "--peers", "abacus"),
        ("bench", "--match", "no workload is called this"),
        ("bench", "--threads", "0"),
    ],
)
def test_unknown_choices_are_refused(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output


# --- memory


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux"
)


@linux
@pytest.mark.skipif(not fmkernels.info().native, reason="no native kernels")
def test_memory_of_a_block(tmp_path):
    """Eager holds the convolution's output, 8.4 MB, the fused block its pooled quarter."""
    file = tmp_path / "memory.json"
    match = "conv-bn-relu-pool 32x3x32x32"
    threads = torch.get_num_threads()
    try:  # each has work buffers of its own
        options = ("--mode=inference", "--threads=2", "--match", match, "--json", file)
        result = invoke("memory", *options)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    (peak,) = json.loads(file.read_text())
    assert peak["bytes"]["eager"] > 8.4e6 > peak["bytes"]["fmkernels"] > 2.1e6
    assert peak["ratio"] == peak["bytes"]["fmkernels"] / peak["bytes"]["eager"]


@linux
def test_memory_counts_what_comes_and_what_stays(monkeypatch):
    name = workloads.select(("conv",), quick=True)[0].name

    def peak_of(call):
        candidate = candidates.Candidate("eager", "contiguous", call, dict)
        monkeypatch.setitem(memory._BUILDERS, "eager", lambda problem, layout: candidate)
        arguments = (name, "fp32", "inference", "eager", "contiguous", torch.get_num_threads())
        return memory._peak(arguments) / 1e6

    kept = []

    def grow():
        torch.ones(16, 1 << 20).sum()  # 67 MB that are freed
        kept.append(torch.ones(4, 1 << 20))  # 17 MB in each of three calls

    assert peak_of(lambda: None) < 10
    assert 80 < peak_of(grow) < 140


# --- bench


@pytest.fixture
def tiny_workloads(monkeypatch):
    """Two workloads of a few microseconds, probed and timed in no time."""
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    tiny = (
        Workload(
            "tiny linear",
            "linear",
            lambda: (nn.Linear(8, 4), (torch.randn(3, 8),)),
            dtypes=("fp32",),
            quick=True,
        ),
        Workload(
            "tiny conv",
            "conv",
            lambda: (copy.deepcopy(conv), (torch.randn(2, 3, 8, 8),)),
            dtypes=("fp32",),
            layouts=("contiguous", "channels_last"),
            quick=True,
        ),
    )
    monkeypatch.setattr(workloads, "WORKLOADS", tiny)
    real = timer.time_interleaved

    def time_interleaved(calls, budget_s):
        return real(calls, budget_s=0, pause_s=0, burst_s=0, min_rounds=2, max_rounds=2)

    monkeypatch.setattr(timer, "time_interleaved", time_interleaved)
    ceilings = roofline.Ceilings(1, {"fp32": 100.0, "bf16": 200.0}, 10.0, 1 << 20, "a test")
    monkeypatch.setattr("fmkernels.bench.run.probe", lambda threads: ceilings)


class Links(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self):
        super().__init__()
        self.tags, self.references = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href") and not value.startswith("#")
        ]


def test_bench_writes_json_csv_and_one_html_page(tiny_workloads, tmp_path):
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "csv", "html")}
    options = [part for kind, file in files.items() for part in (f"--{kind}", file)]
    result = invoke("bench", "--quick", *options)
    assert result.exit_code == 0, result.output
    assert "geometric mean" in result.output

    written = json.loads(files["json"].read_text())
    assert written["schema_version"] == SCHEMA_VERSION
    assert {"machine", "versions", "threads", "load_average"} <= set(written["environment"])
    assert written["ceilings"]["peak_gflops"]["fp32"] == 100.0
    assert [(c["workload"], c["mode"]) for c in written["cells"]] == [
        ("tiny linear", "inference"),
        ("tiny linear", "training"),
        ("tiny conv", "inference"),
        ("tiny conv", "training"),
    ]
    assert written["cells"][0]["ratio"] > 0
    assert written["cells"][0]["ratio_same_layout"] is None
    assert written["cells"][2]["ratio_same_layout"] > 0
    assert {mean["family"] for mean in written["geometric_means"]} == {"linear", "conv"}

    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 + 2 * 4  # two modes of two candidates, and of two in two layouts
    assert all(row["status"] == "ok" and float(row["median_s"]) > 0 for row in rows)

    page = files["html"].read_text()
    links = Links()
    links.feed(page)
    assert links.references == []
    assert links.tags.count("svg") == 3  # ratio bars of both modes and the roofline
    assert "tiny conv fp32 training" in page


def test_bench_refuses_to_print_the_speed_of_wrong_numbers(tiny_workloads, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "fmkernels.bench.candidates.with_fmkernels",
        lambda workload, module: Scaled(module) if workload.family == "linear" else module,
    )
    file = tmp_path / "bench.json"
    result = invoke("bench", "--quick", "--mode", "inference", "--json", file)
    assert result.exit_code == 1
    assert "FAILED: tiny linear fp32 inference" in result.output
    linear, conv = json.loads(file.read_text())["cells"]
    assert linear["failed"]
    assert not conv["failed"]
    ours = next(m for m in linear["measurements"] if m["candidate"] == "fmkernels")
    assert ours["status"] == "wrong"
    assert (ours["median_s"], ours["gflops"], linear["ratio"]) == (None, None, None)
    row = next(line for line in result.output.splitlines() if "wrong" in line)
    assert "fmkernels" in row
    assert " ms " not in row
    assert " us " not in row


class Scaled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 1.01 * self.module(x)


def test_bench_sets_the_thread_count(tiny_workloads, tmp_path):
    before = torch.get_num_threads()
    file = tmp_path / "bench.json"
    try:
        result = invoke("bench", "--quick", "--mode=inference", "--threads=1", "--json", file)
        assert result.exit_code == 0, result.output
        assert json.loads(file.read_text())["environment"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_bench_selects_by_family_and_name(tiny_workloads):
    result = invoke("bench", "--family", "conv", "--mode", "inference")
    assert result.exit_code == 0, result.output
    assert "tiny conv" in result.output
    assert "tiny linear" not in result.output


# --- demo


@pytest.fixture
def few_digits(monkeypatch):
    """Enough digits for six steps an epoch; the real ones take longer than a test should."""
    pytest.importorskip("sklearn")
    real = demo.load_digits

    def load():
        images, labels = real()
        kept = 300 + demo.TEST_DIGITS
        return images[:kept], labels[:kept]

    monkeypatch.setattr(demo, "load_digits", load)


def test_demo_shows_that_both_curves_agree(few_digits, tmp_path):
    file = tmp_path / "demo.json"
    result = invoke("demo", "--epochs", 1, "--json", file)
    assert result.exit_code == 0, result.output
    assert result.output.count("The loss curves agree") == 2
    outcomes = json.loads(file.read_text())
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert len(outcome["torch_losses"]) == len(outcome["our_losses"]) == 6
        assert outcome["early_difference"] <= outcome["early_bound"]
        assert outcome["max_difference"] <= outcome["bound"]
        assert outcome["torch_losses"][0] > outcome["torch_losses"][-1]


def test_demo_fails_when_the_curves_part(few_digits, monkeypatch):
    right = demo.replaced_copy

    def wrong(model):
        replaced = right(model)
        with torch.no_grad():
            next(replaced.parameters()).mul_(1.1)
        return replaced

    monkeypatch.setattr(demo, "replaced_copy", wrong)
    result = invoke("demo", "--epochs", 1)
    assert result.exit_code == 1
    assert "DISAGREE" in result.output


def test_a_diverged_loss_disagrees_and_is_drawn_as_such():
    nan = float("nan")
    outcome = demo.Outcome("m", (1.0, 0.5), (1.0, nan), 0.9, 0.9, 1.0, 1.0, "cpu")
    assert not outcome.agree
    assert demo.sparkline((1.0, 0.0, nan), 1.0) == "█▁?"
