"""Measures workloads: right numbers first, then everybody's time in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fmkernels.bench import candidates, peers, timer
from fmkernels.bench.candidates import Candidate, Problem, Tensors
from fmkernels.bench.environment import environment
from fmkernels.bench.gpu import timing
from fmkernels.bench.numerics import Check, check
from fmkernels.bench.results import EAGER, OURS, Cell, Measurement, Results
from fmkernels.bench.roofline import Ceilings, probe
from fmkernels.bench.workloads import DTYPES, MODES, Workload

MIN_CELL_S, QUICK_CELL_S = 4.0, 1.0


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        dtypes: dtype names; a workload that does not list one is skipped in it.
        modes: "inference", "training" or both.
        peers: names from :data:`fmkernels.bench.peers.PEERS`.
        quick: a shorter time budget per cell.
        device: "cpu" or "cuda"; there every candidate is timed as a CUDA graph.
    """

    dtypes: tuple[str, ...] = ("fp32",)
    modes: tuple[str, ...] = MODES
    peers: tuple[str, ...] = ()
    quick: bool = False
    device: str = "cpu"

    @property
    def cell_seconds(self) -> float:
        return QUICK_CELL_S if self.quick else MIN_CELL_S


def planned(workloads: Sequence[Workload], options: Options) -> list[tuple[Workload, str, str]]:
    """Every ``(workload, dtype, mode)`` that :func:`run` will measure."""
    return [
        (workload, dtype, mode)
        for workload in workloads
        for dtype in options.dtypes
        for mode in options.modes
        if dtype in workload.dtypes and mode in workload.modes
    ]


def run(
    workloads: Sequence[Workload],
    options: Options,
    progress: Callable[[Cell | None, str], None] = lambda finished, upcoming: None,
) -> Results:
    """Measure ``workloads`` with torch's current thread count.

    Args:
        progress: called with the cell just finished (None at first) and the next one's name.
    """
    surroundings = environment()  # before the probes put a load on the machine
    on_gpu = options.device == "cuda"
    if on_gpu:
        surroundings["device"] = torch.cuda.get_device_name()
    ceilings = timing.probe() if on_gpu else probe(torch.get_num_threads())
    results = Results(surroundings, ceilings, quick=options.quick)
    finished = None
    for workload, dtype, mode in planned(workloads, options):
        progress(finished, f"{workload.name} {dtype} {mode}")
        finished = measure(workload, dtype, mode, options, results.ceilings)
        results.cells.append(finished)
    progress(finished, "")
    return results


def measure(
    workload: Workload, dtype: str, mode: str, options: Options, ceilings: Ceilings
) -> Cell:
    """One cell: build all candidates, check each against float64, time those that passed."""
    cost = workload.cost(dtype, mode)
    cell = Cell(workload.name, workload.family, dtype, mode, cost.flops, cost.bytes)
    problem = Problem.build(workload, dtype, mode, options.device)
    with torch.set_grad_enabled(mode == "training"):
        oracle = problem.oracle()
        eager_tensors: list[Tensors] = []
        passed: dict[str, Candidate] = {}
        for name, layout, build in _entries(workload, options):
            measurement = Measurement(name, layout)
            cell.measurements.append(measurement)
            candidate = _attempt(measurement, lambda build=build: build(problem))
            tensors = candidate and _attempt(measurement, candidate.tensors)
            if tensors is None:
                continue
            if name == EAGER:
                eager_tensors.append(tensors)
            verdict = check(
                tensors, eager_tensors, oracle, DTYPES[dtype], corners=workload.corners
            )
            _judge(measurement, verdict)
            if name == OURS:
                measurement.backend = candidates.backends_used(candidate)
            if measurement.status == "ok":
                passed[measurement.label] = candidate
        calls = {label: candidate.call for label, candidate in passed.items()}
        clock = {}
        if options.device == "cuda":
            calls = {label: timing.graphed(call) for label, call in calls.items()}
            clock = {"clock": timing.clock}
        timings = timer.time_interleaved(calls, budget_s=options.cell_seconds, **clock)
    for measurement in cell.measurements:
        if measurement.label in timings:
            _record(measurement, timings[measurement.label], cell, ceilings)
    return cell


def _entries(workload: Workload, options: Options):
    """``(candidate, layout, builder)`` of all in a cell: eager first, it sets the tolerance."""
    for layout in workload.layouts:
        yield EAGER, layout, lambda problem, layout=layout: candidates.eager(problem, layout)
    for layout in workload.layouts:
        yield OURS, layout, lambda problem, layout=layout: candidates.ours(problem, layout)
    for name in options.peers:
        if name in peers.ATTENTION_PEERS and workload.family != "attention":
            continue
        layout = workload.layouts[-1] if name == "compile" else "contiguous"
        yield name, layout, peers.PEERS[name]


def _attempt(measurement: Measurement, action: Callable):
    """The action's result; None, with the reason in ``measurement``, if it cannot run."""
    try:
        return action()
    except peers.PeerUnavailable as error:
        measurement.status, measurement.message = "unavailable", str(error)
    except Exception as error:  # one candidate's failure must not end the run
        measurement.status = "error"
        measurement.message = f"{type(error).__name__}: {error}"[:300]
    return None


def _judge(measurement: Measurement, verdict: Check) -> None:
    measurement.error, measurement.allowed = verdict.error, verdict.allowed
    if not verdict.ok:
        measurement.status, measurement.message = "wrong", verdict.message


def _record(
    measurement: Measurement, timing: timer.Timing, cell: Cell, ceilings: Ceilings
) -> None:
    measurement.median_s, measurement.iqr_s = timing.median_s, timing.iqr_s
    measurement.rounds = len(timing.samples_s)
    measurement.gflops = cell.flops / timing.median_s / 1e9
    measurement.of_peak = measurement.gflops / ceilings.peak_gflops[cell.dtype]
    roof = ceilings.roof_gflops(cell.dtype, cell.flops, cell.bytes)
    measurement.of_roof = measurement.gflops / roof
