"""The commands of ``fmkernels``; see ``fmkernels.cli`` for the entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fmkernels
from fmkernels.bench import demo as demo_run
from fmkernels.bench import (
    html,
    memory,
    peers,
    report,
    run,
    verify,
    verify_report,
    workloads,
)
from fmkernels.bench.environment import busy_warning, load_average
from fmkernels.bench.results import EAGER, OURS, Cell
from fmkernels.bench.workloads import Workload
from fmkernels.info import Info

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Fused PyTorch layers for the CPU: what is built, is it right, how fast is it.",
)

_FAMILY_HELP = f"Comma-separated: {', '.join(workloads.FAMILIES)} or all."
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="torch.set_num_threads; default: as is.")]


@app.command()
def info(
    json_file: JsonFile = None,
) -> None:
    """Version, build, instruction set, threads, backends with reasons, torch and triton."""
    state = _state()
    table = Table(show_header=False, box=None)
    for label, text in state.rows():
        table.add_row(label, text, style=_info_style(label, text))
    _console().print(table)
    if json_file is not None:
        report.write_document(state.to_dict(), json_file)


@app.command("verify")
def verify_command(
    family: Annotated[
        str, typer.Option(help="Comma-separated: conv, linear, rnn, attention.")
    ] = "all",
    backend: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated backends; default: cpu, without native kernels reference."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Comma-separated dtypes.")] = ",".join(verify.DTYPES),
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Check every op and dtype, forward and every gradient, against float64 on this machine.

    Exits with 1 if anything is wrong, or was computed by another backend than the one named.
    """
    console = _console()
    families = _names(family, {*workloads.FAMILIES, "all"} - {"models"}, "--family")
    dtypes = _names(dtype, verify.DTYPES, "--dtype")
    state = _state()
    _check_device(device)
    default = "triton" if device == "cuda" else "cpu" if state.native else "reference"
    backends = _names(backend or default, set(fmkernels.BACKEND_NAMES) - {"auto"}, "--backend")
    if backend is None and default == "reference":
        console.print(
            f"No cpu backend: {state.native_error}. Verifying the reference backend.",
            style="bold yellow",
        )
    cases = verify.select(families)
    verdicts = []
    with _progress(console) as progress:
        task = progress.add_task("verify", total=len(cases) * len(dtypes) * len(backends))
        for verdict in verify.verify(cases, backends, dtypes, device):
            verdicts.append(verdict)
            progress.update(task, advance=1, description=f"{verdict.op} {verdict.dtype}")
    verify_report.print_verdicts(verdicts, state, console)
    if json_file is not None:
        verify_report.write_json(verdicts, state, json_file)
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def bench(
    family: Annotated[str, typer.Option(help=_FAMILY_HELP)] = "all",
    dtype: Annotated[str, typer.Option(help="Comma-separated: fp32, bf16.")] = "fp32,bf16",
    mode: Annotated[str, typer.Option(help="inference, training or both.")] = "both",
    peer_names: Annotated[
        str | None,
        typer.Option(
            "--peers",
            help="Comma-separated: " + ", ".join(("eager", *peers.PEERS)) + ". "
            "By default eager; on cuda the GPU's, too: " + ", ".join(peers.DEFAULT["cuda"]) + ".",
        ),
    ] = None,
    match: Annotated[str, typer.Option(help="Only workloads whose name contains this.")] = "",
    threads: Threads = None,
    device: Device = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer workloads, fp32, less time.")
    ] = False,
    json_file: JsonFile = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="One row per measurement.")
    ] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="One page with plots.")] = None,
) -> None:
    """PyTorch and fmkernels side by side in one run: errors, times, ratios, share of the ceiling.

    A candidate whose numbers fail against float64 gets no speed. Exits with 1 if fmkernels fails.
    """
    console = _console()
    _check_device(device)
    options = run.Options(
        device=device,
        dtypes=_names(
            "fp32" if quick and dtype == "fp32,bf16" else dtype, ("fp32", "bf16"), "--dtype"
        ),
        modes=workloads.MODES if mode == "both" else _names(mode, workloads.MODES, "--mode"),
        peers=tuple(
            name
            for name in (
                peers.DEFAULT[device]
                if peer_names is None
                else _names(peer_names, ("eager", *peers.PEERS), "--peers")
            )
            if name != "eager"
        ),
        quick=quick,
    )
    chosen = _select(family, quick=quick, match=match)
    if threads is not None:
        torch.set_num_threads(threads)
    warning = busy_warning(load_average(), _state().machine.logical_cpus)
    if warning:
        console.print(f"WARNING: {warning}", style="bold red")

    with _progress(console) as progress:
        task = progress.add_task("probing the ceilings", total=len(run.planned(chosen, options)))

        def advance(finished: Cell | None, upcoming: str) -> None:
            progress.update(task, advance=finished is not None, description=upcoming or "done")

        results = run.run(chosen, options, advance)
    report.print_results(results, console)
    for write, path in (
        (report.write_json, json_file),
        (report.write_csv, csv_file),
        (html.write_html, html_file),
    ):
        if path is not None:
            write(results, path)
            console.print(f"wrote {path}")
    if results.failures:
        raise typer.Exit(1)


@app.command("memory")
def memory_command(
    family: Annotated[str, typer.Option(help=_FAMILY_HELP)] = "all",
    dtype: Annotated[str, typer.Option(help="Comma-separated: fp32, bf16.")] = "fp32",
    mode: Annotated[str, typer.Option(help="inference, training or both.")] = "both",
    match: Annotated[str, typer.Option(help="Only workloads whose name contains this.")] = "",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Memory that a call needs, PyTorch's beside fmkernels', each in a process of its own.

    Exits with 1 if fmkernels needs more anywhere.
    """
    console = _console()
    modes = workloads.MODES if mode == "both" else _names(mode, workloads.MODES, "--mode")
    dtypes = _names(dtype, ("fp32", "bf16"), "--dtype")
    chosen = _select(family, match=match)
    if threads is not None:
        torch.set_num_threads(threads)
    table = Table("workload", "eager", "fmkernels", "to eager", title="memory of a call")
    peaks = []
    with _progress(console) as progress:
        task = progress.add_task("memory", total=len(chosen) * len(dtypes) * len(modes))
        for one_mode in modes:
            for peak in memory.measure(chosen, dtypes, one_mode):
                peaks.append(peak)
                progress.update(task, advance=1, description=peak.workload)
                table.add_row(
                    f"{peak.workload} {peak.dtype} {peak.mode}",
                    *[f"{peak.bytes[name] / 1e6:.1f} MB" for name in (EAGER, OURS)],
                    f"{peak.ratio:.2f}x",
                    style="bold red" if peak.ratio > 1 else None,
                )
    console.print(table)
    if json_file is not None:
        report.write_document([peak.to_dict() for peak in peaks], json_file)
    if any(peak.ratio > 1 for peak in peaks):
        raise typer.Exit(1)


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the digits.")] = 6,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Train a CNN and an LSTM on real digits, with torch.nn and with replaced layers, and compare.

    Exits with 1 if the loss curves part by more than the stated bounds.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        outcomes = demo_run.run(epochs)
    except ImportError as error:
        _console().print(f"{error}; pip install 'fmkernels[bench]'", style="bold red")
        raise typer.Exit(2) from error
    demo_run.print_outcomes(outcomes, _console())
    if json_file is not None:
        report.write_document([outcome.to_dict() for outcome in outcomes], json_file)
    if not all(outcome.agree for outcome in outcomes):
        raise typer.Exit(1)


def _state() -> Info:
    try:
        return fmkernels.info()
    except RuntimeError as error:  # FMKERNELS_ISA asks for a path that does not exist here
        _console().print(str(error), style="bold red", markup=False)
        raise typer.Exit(2) from error


def _select(family: str, *, match: str, quick: bool = False) -> list[Workload]:
    names = _names(family, {*workloads.FAMILIES, "all"}, "--family")
    try:
        return workloads.select(names, quick=quick, match=match)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {device!r}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch finds no GPU here")


def _console() -> Console:
    # Made for each command, not once: stdout may have been redirected since. Off a terminal rich
    # would wrap at 80 columns, which breaks tables that are piped to a file.
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _names(text: str, allowed, option: str) -> tuple[str, ...]:
    """The comma-separated names in ``text``; refuses those that are not allowed."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise typer.BadParameter(f"{option} {text!r}: choose from {', '.join(sorted(allowed))}")
    return names


def _info_style(label: str, text: str) -> str | None:
    return "bold yellow" if label == "native library" and text.startswith("not") else None
