"""GPU kernels compiled without a GPU: the gates, and that they can fail.

The whole registry is compiled by ``python benchmarks/gpu_static.py``; here one kernel for two
chips.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from fmkernels.ops._triton import support  # noqa: E402

pytestmark = [
    pytest.mark.compile_only,
    pytest.mark.skipif(support.INTERPRETING, reason="nothing is compiled under the interpreter"),
    pytest.mark.skipif(not support.TRITON.ok, reason=support.TRITON.reason),
]

if support.TRITON.ok:
    from fmkernels.bench.gpu import gates, registry, sweep
    from fmkernels.bench.gpu.inspect import CHIPS

ROOT = Path(__file__).resolve().parent.parent

GOOD = {
    "registers": 128,
    "spills": 0,
    "stack": 0,
    "shared": 98304,
    "tensor_memory": 0,
    "matrix": {"HGMMA": 4},
    "occupancy": 0.25,
    "blocks": 2,
    "load_bits": {128: 8, 32: 2},
    "loop_load_bits": {128: 4, 32: 1},
    "offsets32": 0,
    "traps": False,
}


def make_row(**changes):
    fields = {
        "kernel": "gemm_fwd_kernel",
        "config": "linear_gelu-bf16-128x128x64-w8-s3",
        "arch": "sm_90",
        "case": "linear.gelu",
        "dtype": "bf16",
        "tile": "128x128x64-w8-s3",
        "aligned": True,
        "huge": False,
        "blocks": {"BLOCK_M": 128},
        "precision": "ieee",
        "grid": (1,),
        "resources": GOOD,
        "seconds": 1.0,
    }
    # "blocks" is a field of both: the tile's sizes, and how many blocks fit a multiprocessor.
    found = {k: v for k, v in changes.items() if k in GOOD and (k, type(v)) != ("blocks", dict)}
    fields.update({k: v for k, v in changes.items() if k not in found})
    return sweep.Row(**fields | {"resources": {**GOOD, **found}})


def test_a_good_kernel_passes():
    assert gates.problems(make_row()) == []
    assert gates.problems(make_row(matrix={"HMMA": 4}, blocks={"BLOCK_M": 16})) == []
    assert gates.problems(make_row(spills=4, aligned=False)) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"spills": 2}, "spill"),
        ({"shared": 262144}, "shared memory"),
        ({"tensor_memory": 576}, "tensor memory"),
        ({"traps": True}, "trap"),
        ({"blocks": 0}, "not one block"),
        ({"matrix": {}}, "no HGMMA"),
        ({"matrix": {"HMMA": 64}}, "no HGMMA"),
        ({"offsets32": 3, "huge": True}, "32-bit offsets"),
        ({"kernel": "unheard_of_kernel"}, "not declared"),
        ({"error": "CompilationError: ..."}, "CompilationError"),
    ],
)
def test_each_gate_can_fail(changes, reason):
    row = make_row(**changes)
    assert any(reason in problem for problem in gates.problems(row)), gates.problems(row)


def test_regressions_against_the_baseline(tmp_path):
    path = tmp_path / "baseline.json"
    row = make_row()
    gates.write_baseline(path, "3.7.0", [row])
    gates.write_baseline(path, "3.8.0", [make_row(registers=200)])
    assert set(json.loads(path.read_text())) == {"3.7.0", "3.8.0"}
    baseline = gates.read_baseline(path, "3.7.0")
    assert gates.read_baseline(path, "3.9.0") is None
    assert gates.regressions(row, baseline) == []
    assert gates.regressions(make_row(registers=136), baseline) == []
    for worse in ({"registers": 160}, {"spills": 1}, {"shared": 98305}):
        assert gates.regressions(make_row(**worse), baseline)
    assert gates.regressions(make_row(config="new"), baseline) == []
    gates.write_baseline(path, "3.7.0", [make_row(config="new")])
    assert len(gates.read_baseline(path, "3.7.0")) == 2
    gates.write_baseline(path, "3.7.0", [row], whole=True)
    assert list(gates.read_baseline(path, "3.7.0")) == [row.key]


@pytest.mark.parametrize(
    ("loads", "worse"),
    [
        ({128: 4, 32: 1}, False),
        ({128: 8, 32: 2}, False),
        ({128: 2, 32: 1}, False),
        ({128: 4, 32: 2}, False),
        ({128: 2}, False),
        ({128: 2, 64: 4, 32: 1}, True),
        ({64: 8, 32: 1}, True),
        ({128: 4, 16: 2}, True),
        ({}, False),
    ],
    ids=str,
)
def test_loads_in_loops_that_get_narrower_are_a_regression(tmp_path, loads, worse):
    path = tmp_path / "baseline.json"
    unaligned = {"config": "unaligned", "aligned": False}
    gates.write_baseline(path, "3.7.0", [make_row(), make_row(**unaligned)])
    baseline = gates.read_baseline(path, "3.7.0")
    found = gates.regressions(make_row(loop_load_bits=loads), baseline)
    assert ["loads in loops" in reason for reason in found] == [True] * worse
    assert gates.regressions(make_row(loop_load_bits=loads, **unaligned), baseline) == []


def test_loads_in_loops_are_told_from_others():
    from fmkernels.bench.gpu import inspect

    code = """
    LDG.E.64 R2, desc[UR4][R2.64] ;
.L_x_0:
    LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64], P0 ;
.L_x_1:
    LDG.E.U16 R3, desc[UR4][R2.64] ;
    @P1 BRA `(.L_x_1) ;
    @P0 BRA `(.L_x_2) ;
    LDG.E R5, desc[UR4][R2.64] ;
    BRA.U UP0, `(.L_x_0) ;
.L_x_2:
    LDG.E.64 R2, desc[UR4][R2.64] ;
"""
    assert inspect._nvidia_loads(code) == {16: 1, 32: 1, 64: 2, 128: 1}
    assert inspect._nvidia_loads(inspect._loops(code)) == {16: 1, 32: 1, 128: 1}
    code = """
	global_load_dwordx2 v[0:1], v2, s[0:1]
.LBB0_2:                                ; %loop
	buffer_load_dwordx4 v[4:7], v2, s[8:11], 0 offen
	s_cbranch_scc1 .LBB0_2
	s_branch .LBB0_3
.LBB0_3:
	global_load_ushort v3, v2, s[0:1]
"""
    assert inspect._amd_loads(code) == {16: 1, 64: 1, 128: 1}
    assert inspect._amd_loads(inspect._loops(code)) == {128: 1}


def test_every_case_is_named_once_and_every_kernel_declared():
    cases = [case.name for name in registry.FAMILIES for case in registry.family(name)[1]]
    assert cases and registry.kernels()
    for name in registry.FAMILIES:
        names = [case.name for case in registry.family(name)[1]]
        assert len(names) == len(set(names)), name


def test_every_configuration_is_compiled_by_a_case(monkeypatch):
    assert sweep.uncovered(list(CHIPS)) == []
    kept = [case for name, case in registry.cases().items() if name != "linear.rows_8"]
    monkeypatch.setattr(registry, "cases", lambda: {f"linear.{case.name}": case for case in kept})
    assert any("gemm_fwd_kernel sm_80 tiny" in missing for missing in sweep.uncovered(["sm_80"]))


def test_the_subset_for_ci_has_every_kernel():
    wanted = sweep.jobs(list(CHIPS), ["bf16"])
    chosen = sweep.representative(wanted)
    launched = {(launch.kernel, job.arch) for job in chosen for launch in sweep.planned(job)}
    assert launched == {(name, arch) for name in registry.kernels() for arch in CHIPS}
    assert len(chosen) < len(wanted) / 4


@pytest.fixture
def baseline():
    rows = gates.read_baseline(ROOT / "benchmarks" / "gpu_baseline.json", triton.__version__)
    if rows is None:
        pytest.skip(
            f"gpu_baseline.json has no rows of triton {triton.__version__}: "
            "python benchmarks/gpu_static.py --write-baseline records them"
        )
    return rows


def test_the_baseline_has_every_kernel_configuration_and_dtype(baseline):
    """Of each family and chip that it has at all."""
    recorded = {tuple(key.split(".")) for key in baseline}
    parts = {(config.split("_")[0], arch) for _, config, arch in recorded}
    for job in sweep.jobs(list(CHIPS)):
        if (job.case.split(".")[0], job.arch) in parts:
            for launch in sweep.planned(job):
                config = f"{job.case.replace('.', '_')}-{job.dtype}-{launch.config.name}"
                assert (launch.kernel, config, job.arch) in recorded, (launch.kernel, job)


def test_the_baseline_keeps_to_the_gates(baseline):
    for key, row in baseline.items():
        config, arch = key.split(".")[1:]
        case = registry.cases()[config.split("-")[0].replace("_", ".", 1)]
        assert row["shared"] <= CHIPS[arch].shared and row["tensor_memory"] <= 512, key
        assert not (row["spills"] and case.aligned and not case.huge), key


@pytest.fixture(scope="module", params=["sm_90", "gfx942"])
def compiled(request, tmp_path_factory):
    """The row of a kernel, and the folder with its code object."""
    dump = tmp_path_factory.mktemp("code")
    wanted = sweep.jobs([request.param], ["bf16"], "linear.rows_64")
    (row,) = sweep.sweep(wanted, workers=1, kernel="gemm_fwd", dump=dump)
    return row, dump


def test_a_kernel_is_compiled_and_passes(compiled):
    row, dump = compiled
    assert gates.problems(row) == []
    assert row.resources["matrix"] and max(row.resources["loop_load_bits"]) == 128
    ending = "hsaco" if row.arch == "gfx942" else "cubin"
    assert (dump / f"{row.key}.{ending}").stat().st_size > 1000


def test_a_kernel_is_no_worse_than_recorded(compiled, baseline):
    row, _ = compiled
    assert row.key in baseline
    assert gates.regressions(row, baseline) == []


def test_what_does_not_compile_is_a_row(monkeypatch):
    def fails(dtype):
        raise ValueError("no such kernel")

    case = registry.Case("broken", fails)
    monkeypatch.setattr(registry, "cases", lambda: {"linear.broken": case})
    (row,) = sweep.compile_job(sweep.Job("linear.broken", "bf16", "sm_80"))
    assert row.error == "ValueError: no such kernel" and gates.problems(row)
