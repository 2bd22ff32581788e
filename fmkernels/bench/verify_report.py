"""Shows and writes the verdicts of ``fmkernels verify``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fmkernels.bench.report import write_document
from fmkernels.bench.verify import Verdict
from fmkernels.info import Info

SCHEMA_VERSION = 1
_SHOWN = 30  # failures printed in full


def print_verdicts(verdicts: list[Verdict], state: Info, console: Console) -> None:
    """A table with one row per op, dtype and backend, then every failure in full."""
    isa = state.isa or "no native kernels"
    table = Table(
        title=f"fmkernels {state.version} on {state.machine.cpu} ({isa}) against float64"
    )
    for name in ("family", "op", "dtype", "backend"):
        table.add_column(name)
    for name in ("passed", "worst error", "of allowed"):
        table.add_column(name, justify="right")
    table.add_column("worst case", overflow="fold")
    table.add_column("ops that ran", overflow="fold")
    previous = None
    for (family, op, dtype, backend), group in _groups(verdicts).items():
        worst = max(group, key=_badness)
        passed = sum(verdict.ok for verdict in group)
        ops = dict.fromkeys(name for verdict in group for name in verdict.ops)
        if previous not in (None, (family, op)):
            table.add_section()
        previous = (family, op)
        table.add_row(
            family,
            op,
            dtype,
            backend,
            f"{passed}/{len(group)}",
            "-" if worst.error is None else f"{worst.error:.1e}",
            "-" if worst.error is None else f"{_badness(worst):.0%}",
            f"{worst.case}: {worst.worst}" if worst.worst else worst.case,
            ", ".join(ops) or "none (PyTorch operations)",
            style=None if passed == len(group) else "red",
        )
    console.print(table)
    failures = [verdict for verdict in verdicts if not verdict.ok]
    for verdict in failures[:_SHOWN]:
        console.print(
            f"FAILED {verdict.op} {verdict.dtype} on {verdict.backend}, {verdict.case}: "
            f"{verdict.message}",
            style="red",
            markup=False,
        )
    if len(failures) > _SHOWN:
        console.print(f"... and {len(failures) - _SHOWN} more (--json writes all)", style="red")
    summary = f"{len(verdicts) - len(failures)} of {len(verdicts)} cases passed"
    console.print(summary, style="bold red" if failures else "bold green")


def write_json(verdicts: list[Verdict], state: Info, path: Path) -> None:
    """All verdicts, with what they were obtained on."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "ok": all(verdict.ok for verdict in verdicts),
        "info": state.to_dict(),
        "verdicts": [verdict.to_dict() for verdict in verdicts],
    }
    write_document(document, path)


def _groups(verdicts: list[Verdict]) -> dict[tuple[str, str, str, str], list[Verdict]]:
    groups: dict[tuple[str, str, str, str], list[Verdict]] = {}
    for verdict in verdicts:
        key = (verdict.family, verdict.op, verdict.dtype, verdict.backend)
        groups.setdefault(key, []).append(verdict)
    return groups


def _badness(verdict: Verdict) -> float:
    """Error as a share of what is allowed; a case without numbers is the worst."""
    if verdict.error is None:
        return float("inf")
    if verdict.error == 0:
        return 0.0
    return verdict.error / verdict.allowed if verdict.allowed else float("inf")
