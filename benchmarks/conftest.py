"""Turns the workloads of ``fmkernels.bench.workloads`` into parameters of the benchmarks.

A benchmark module states its ``FAMILY``; its test takes the fixture ``prepared``, whose parameters
are every workload of the family, in every dtype and mode, for PyTorch eager and for fmkernels, in
every layout. The numbers are checked against float64 before anything is timed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from fmkernels.bench import candidates, numerics, run, workloads
from fmkernels.bench.candidates import Candidate, Problem, Tensors
from fmkernels.bench.workloads import Cost, Workload

BUILDERS = {"eager": candidates.eager, "fmkernels": candidates.ours}


@dataclass(frozen=True)
class Prepared:
    """A candidate whose numbers are right, ready to be timed."""

    candidate: Candidate
    workload: Workload
    dtype: str
    mode: str
    cost: Cost
    check: numerics.Check
    backend: str

    def time(self, benchmark) -> None:
        """Time it under pytest-benchmark, grouped with the other candidates of its workload."""
        benchmark.group = f"{self.workload.name} {self.dtype} {self.mode}"
        benchmark.extra_info.update(
            flops=self.cost.flops,
            bytes=self.cost.bytes,
            error=self.check.error,
            allowed_error=self.check.allowed,
            dtype=self.dtype,
            mode=self.mode,
            candidate=self.candidate.name,
            layout=self.candidate.layout,
            backend=self.backend,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        with torch.set_grad_enabled(self.mode == "training"):
            benchmark(self.candidate.call)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "prepared" not in metafunc.fixturenames:
        return
    options = run.Options(dtypes=("fp32", "bf16"))
    cases = [
        pytest.param(
            (workload, dtype, mode, name, layout),
            id=f"{workload.name}-{dtype}-{mode}-{name}-{layout}",
        )
        for workload, dtype, mode in run.planned(
            workloads.select((metafunc.module.FAMILY,)), options
        )
        for name in BUILDERS
        for layout in workload.layouts
    ]
    metafunc.parametrize("prepared", cases, indirect=True)


@pytest.fixture
def prepared(request: pytest.FixtureRequest) -> Prepared:
    workload, dtype, mode, name, layout = request.param
    problem, eager, oracle = _problem(workload, dtype, mode)
    with torch.set_grad_enabled(mode == "training"):
        candidate = BUILDERS[name](problem, layout)
        verdict = numerics.check(
            candidate.tensors(),
            eager,
            oracle,
            workloads.DTYPES[dtype],
            corners=workload.corners,
        )
        if not verdict.ok:
            pytest.fail(f"not timed, its numbers are wrong: {verdict.message}")
        backend = candidates.backends_used(candidate) if name == "fmkernels" else ""
    cost = workload.cost(dtype, mode)
    return Prepared(candidate, workload, dtype, mode, cost, verdict, backend)


# The candidates of a workload come one after the other and share its float64 oracle.
@functools.lru_cache(maxsize=1)
def _problem(workload: Workload, dtype: str, mode: str) -> tuple[Problem, list[Tensors], Tensors]:
    problem = Problem.build(workload, dtype, mode)
    with torch.set_grad_enabled(mode == "training"):
        eager = [candidates.eager(problem, layout).tensors() for layout in workload.layouts]
        return problem, eager, problem.oracle()
