"""Compiles the registry's cases for chips that are not there, in parallel processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fmkernels.bench.gpu import registry

if TYPE_CHECKING:
    from fmkernels.ops._triton.launch import Launch


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration for one chip, or a case that failed (``error``).

    Attributes:
        kernel, config, arch: name the row; ``config`` is case, dtype and tile.
        resources: fields of :class:`inspect.Resources`; empty if the case failed.
        grid: of the first launch.
    """

    kernel: str
    config: str
    arch: str
    case: str
    dtype: str
    tile: str
    aligned: bool
    huge: bool
    blocks: dict[str, int]
    precision: str
    grid: tuple[int, ...]
    resources: dict[str, Any]
    seconds: float
    error: str = ""

    @property
    def key(self) -> str:
        return f"{self.kernel}.{self.config}.{self.arch}"


@dataclass(frozen=True)
class Job:
    """One case in one dtype for one chip."""

    case: str
    dtype: str
    arch: str


def jobs(
    archs: Sequence[str], dtypes: Sequence[str] = tuple(registry.DTYPES), match: str = ""
) -> list[Job]:
    """What there is to compile; ``match`` is a part of the case's name."""
    return [
        Job(name, dtype, arch)
        for name, case in registry.cases().items()
        for arch in archs
        for dtype in case.dtypes
        if dtype in dtypes and arch in case.archs and match in name
    ]


def planned(job: Job) -> list[Launch]:
    """The launches that a job would compile, found on meta tensors without compiling."""
    from fmkernels.ops._triton.launch import counted_launches

    with allow_tf32(job.dtype == "tf32"), counted_launches(job.arch) as seen:
        registry.cases()[job.case].call(registry.DTYPES[job.dtype])
    return seen


def representative(wanted: Sequence[Job]) -> list[Job]:
    """A part of the jobs that launches, for each chip, every kernel that all of them launch.

    Chosen greedily: always the job that adds most kernels, of equals the first.
    """
    launched = {job: {(job.arch, launch.kernel) for launch in planned(job)} for job in wanted}
    missing = set().union(*launched.values())
    chosen = []
    while missing:
        best = max(wanted, key=lambda job: len(launched[job] & missing))
        chosen.append(best)
        missing -= launched[best]
    return chosen


def uncovered(archs: Sequence[str]) -> list[str]:
    """Launch configurations in a kernel's table that no case launches."""
    used = {
        # By identity: equal tiles of two cases of a table are two things to compile.
        (launch.kernel, job.arch, id(launch.config))
        for job in jobs(archs)
        for launch in planned(job)
    }
    return [
        f"{name} {arch} {case}: {config.name} is in the table, and no case compiles it"
        for name, kernel in registry.kernels().items()
        for arch in archs
        for case, config in kernel.tables.get(arch, {}).items()
        if (name, arch, id(config)) not in used
    ]


def sweep(
    wanted: Sequence[Job],
    *,
    workers: int = 2,
    kernel: str = "",
    dump: Path | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Compile every job.

    Args:
        workers: processes.
        kernel: keep only kernels whose name contains this.
        dump: folder for the code objects, ``<kernel>.<config>.<arch>.cubin``.
        on_row: called with each row as it comes.
    """
    from fmkernels.bench.gpu import stand_in  # noqa: F401 - here once, not in every process

    rows: dict[str, Row] = {}
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        futures = {pool.submit(_isolated, job, kernel, dump): job for job in wanted}
        for future in as_completed(futures):
            for row in future.result():
                if row.key not in rows:
                    rows[row.key] = row
                    on_row(row)
    return sorted(rows.values(), key=lambda row: row.key)


def _isolated(job: Job, kernel: str, dump: Path | None) -> list[Row]:
    """Run a job in a process of its own.

    What was compiled for one chip must not be found by the next job, and a compiler that dies
    takes one job with it.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_send, args=(sender, job, kernel, dump))
    process.start()
    sender.close()
    try:
        rows = receiver.recv()
    except EOFError:
        process.join()
        rows = [_failure(job, f"the compiler's process died with {process.exitcode}", 0.0)]
    process.join()
    return rows


def _send(sender: Any, job: Job, kernel: str, dump: Path | None) -> None:
    sender.send(compile_job(job, kernel, dump))
    sender.close()


def compile_job(job: Job, kernel: str = "", dump: Path | None = None) -> list[Row]:
    """Compile one job in this process, which must not have compiled for another chip before."""
    from fmkernels.bench.gpu import inspect
    from fmkernels.bench.gpu.stand_in import stand_in
    from fmkernels.ops._triton.launch import observed_launches

    case = registry.cases()[job.case]
    start = time.perf_counter()
    try:
        with stand_in(job.arch), allow_tf32(job.dtype == "tf32"), observed_launches() as seen:
            case.call(registry.DTYPES[job.dtype])
    except Exception as error:  # noqa: BLE001 - whatever the compiler throws is a row of the table
        return [_failure(job, _chain(error), time.perf_counter() - start)]
    rows: dict[tuple[str, str], Row] = {}
    compiled_before = set()
    for launch in seen:
        if kernel not in launch.kernel or launch.compiled.hash in compiled_before:
            continue
        compiled_before.add(launch.compiled.hash)
        name = f"{job.case.replace('.', '_')}-{job.dtype}-{launch.config.name}"
        if (launch.kernel, name) in rows:  # the same tile with other constants
            name += f"-{len(rows)}"
        resources = inspect.inspect(launch.compiled, job.arch)
        row = Row(
            kernel=launch.kernel,
            config=name,
            arch=job.arch,
            case=job.case,
            dtype=job.dtype,
            tile=launch.config.name,
            aligned=case.aligned,
            huge=case.huge,
            blocks=dict(launch.config.blocks),
            precision=launch.constants.get("PRECISION", ""),
            grid=launch.grid,
            resources=asdict(resources),
            seconds=round(time.perf_counter() - start, 2),
        )
        rows[launch.kernel, name] = row
        if dump is not None:
            code, ending = inspect.binary(launch.compiled)
            (dump / f"{row.key}.{ending}").write_bytes(code)
    return list(rows.values())


@contextlib.contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """torch's flags for tf32 in matrix products and convolutions."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = conv.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def _failure(job: Job, error: str, seconds: float) -> Row:
    case = registry.cases()[job.case]
    return Row(
        kernel="-",
        config=f"{job.case.replace('.', '_')}-{job.dtype}",
        arch=job.arch,
        case=job.case,
        dtype=job.dtype,
        tile="",
        aligned=case.aligned,
        huge=case.huge,
        blocks={},
        precision="",
        grid=(),
        resources={},
        seconds=round(seconds, 2),
        error=error,
    )


def _chain(error: BaseException | None) -> str:
    """The last line of each exception that led to this one, the cause first."""
    parts = []
    while error is not None:
        text = f"{type(error).__name__}: {error}".strip().splitlines()
        parts.append(" ".join([text[0], *text[-1:]][: len(text)]))
        error = error.__cause__
    return " <- ".join(reversed(parts))[:600]
