"""Writes results: tables on the terminal, JSON and CSV files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fmkernels.bench.environment import busy_warning
from fmkernels.bench.results import EAGER, OURS, Cell, Measurement, Results

_LAYOUT_NAMES = {"contiguous": "", "channels_last": " channels_last"}


def environment_lines(results: Results) -> list[str]:
    """The environment block: machine, build, thread count, load and ceilings, in a few lines."""
    env, ceilings = results.environment, results.ceilings
    machine, versions = env["machine"], env["versions"]
    native = f"ISA {env['isa']}" if env["native"] else f"NO native library ({env['native_error']})"
    peaks = ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in ceilings.peak_gflops.items())
    load = env["load_average"]
    lines = [
        f"{machine['cpu']}, {machine['logical_cpus']} logical CPUs, {' '.join(machine['flags'])}",
        f"fmkernels {env['version']}, {native}; torch {versions['torch']}, "
        f"Python {versions['Python']}; {env['time']}",
        f"{ceilings.threads} threads; load average {'unknown' if load is None else f'{load:.2f}'}",
        f"ceilings: {peaks}; memory {ceilings.read_gbs:.0f} GB/s ({ceilings.source})",
    ]
    warning = busy_warning(load, machine["logical_cpus"])
    return [*lines, f"WARNING: {warning}"] if warning else lines


def print_results(results: Results, console: Console) -> None:
    """The environment, one table per family, and the geometric means."""
    for line in environment_lines(results):
        console.print(line, style="bold red" if line.startswith("WARNING") else None, markup=False)
    for family in dict.fromkeys(cell.family for cell in results.cells):
        console.print(_family_table(family, [c for c in results.cells if c.family == family]))
    console.print(_means_table(results))
    if any(m.backend != "cpu" for m in _ours(results)):
        console.print(
            "Where the backend is not cpu alone, PyTorch's own operations took part: "
            "those ratios say little about fmkernels' kernels.",
            style="bold yellow",
        )
    for cell in results.failures:
        console.print(f"FAILED: {cell.workload} {cell.dtype} {cell.mode}", style="bold red")


def write_json(results: Results, path: Path) -> None:
    """The whole run, see :meth:`Results.to_dict`."""
    write_document(results.to_dict(), path)


def write_document(document: Any, path: Path) -> None:
    """Write nested dictionaries and lists as JSON; NaN and infinity, for which it has no word, as
    null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(document), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_csv(results: Results, path: Path) -> None:
    """One row per candidate and cell, see :meth:`Results.flat_rows`."""
    rows = list(results.flat_rows())
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits: "1.38 ms"."""
    unit, size = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)
    # "g" would turn 1234 into 1.23e+03.
    digits = ".0f" if seconds >= 99.95 * size else ".3g"
    return f"{seconds / size:{digits}} {unit}"


def ratio_text(cell: Cell) -> str:
    """ "1.23x", with the same-layout ratio behind it where there is one."""
    if cell.ratio is None:
        return "-"
    same = cell.ratio_same_layout
    return f"{cell.ratio:.2f}x" + (f" (NCHW {same:.2f}x)" if same is not None else "")


def _ours(results: Results) -> list[Measurement]:
    return [
        m
        for cell in results.cells
        for m in cell.measurements
        if m.candidate == OURS and m.median_s is not None
    ]


def _family_table(family: str, cells: list[Cell]) -> Table:
    table = Table(title=f"{family}: times are medians, ratios are against eager's faster layout")
    table.add_column("workload")
    table.add_column("candidate")
    for name in ("error", "allowed", "time", "IQR", "vs eager", "GFLOP/s", "of peak", "of roof"):
        table.add_column(name, justify="right")
    table.add_column("backend or reason", overflow="fold")
    for cell in cells:
        title = f"{cell.workload}\n{cell.dtype} {cell.mode}"
        fastest = cell.fastest(EAGER)
        for index, measurement in enumerate(cell.measurements):
            table.add_row(
                title if index == 0 else "",
                measurement.label,
                *_numbers(measurement, fastest),
                measurement.backend if measurement.status == "ok" else measurement.message,
                style=_STYLES.get(measurement.status),
                end_section=index == len(cell.measurements) - 1,
            )
    return table


_STYLES = {"wrong": "red", "error": "red", "unavailable": "dim"}


def _numbers(m: Measurement, fastest_eager: Measurement | None) -> list[str]:
    errors = ["" if value is None else f"{value:.1e}" for value in (m.error, m.allowed)]
    if m.median_s is None:
        return [*errors, "" if m.status == "ok" else m.status, "", "", "", "", ""]
    ratio = f"{fastest_eager.median_s / m.median_s:.2f}x" if fastest_eager else ""
    return [
        *errors,
        duration(m.median_s),
        f"{m.iqr_s / m.median_s:.0%}",
        ratio,
        f"{m.gflops:.0f}" if m.gflops >= 10 else f"{m.gflops:.2g}",
        f"{m.of_peak:.0%}",
        f"{m.of_roof:.0%}",
    ]


def _means_table(results: Results) -> Table:
    table = Table(title="fmkernels against PyTorch eager, each in its faster layout")
    for name in ("family", "dtype", "mode"):
        table.add_column(name)
    for name in ("geometric mean", "least", "workloads"):
        table.add_column(name, justify="right")
    for mean in results.geometric_means():
        table.add_row(
            mean["family"],
            mean["dtype"],
            mean["mode"],
            f"{mean['ratio']:.2f}x",
            f"{mean['least']:.2f}x",
            str(mean["workloads"]),
        )
    return table
