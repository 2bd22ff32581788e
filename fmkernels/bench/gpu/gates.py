"""Judges compiled kernels: do they fit the chip, keep to registers, use its matrix units."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fmkernels.bench.gpu import registry
from fmkernels.bench.gpu.inspect import CHIPS, TENSOR_MEMORY_COLUMNS
from fmkernels.bench.gpu.sweep import Row

# A newer point release of the compiler may shift a kernel by this many registers.
REGISTER_SLACK = 8
_MATRIX_NAMES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "gfx942": "MFMA"}


def expected_matrix(kernel: registry.Kernel, row: Row) -> str:
    """The matrix instruction that has to be there, "" for none."""
    if not kernel.matrix:
        return ""
    if row.arch == "gfx942":
        return "MFMA"
    if row.dtype == "fp64":
        return "HMMA" if row.arch in ("sm_80", "sm_90") else ""
    if row.precision == "ieee" and row.dtype == "fp32":
        return ""  # float32 products without tf32 are FFMA on NVIDIA
    if row.blocks.get(kernel.m_block, 64) < 64:
        return "HMMA"  # too few rows for wgmma and tcgen05
    return _MATRIX_NAMES[row.arch]


def problems(row: Row) -> list[str]:
    """What is wrong with a compiled kernel, whatever the baseline says."""
    if row.error:
        return [row.error]
    kernel = registry.kernels().get(row.kernel)
    if kernel is None:
        return ["is not declared in the registry"]
    found = row.resources
    wrong = []
    if found["shared"] > CHIPS[row.arch].shared:
        wrong.append(
            f"{found['shared']} B of shared memory, the chip has {CHIPS[row.arch].shared}"
        )
    if found["tensor_memory"] > TENSOR_MEMORY_COLUMNS:
        wrong.append(f"{found['tensor_memory']} columns of tensor memory")
    if found["traps"]:
        wrong.append("the compiler emitted a trap")
    if found["blocks"] < 1:
        wrong.append("not one block fits a multiprocessor")
    if found["spills"] and row.aligned and not row.huge:
        wrong.append(f"{found['spills']} spill instructions")
    expected = expected_matrix(kernel, row)
    if expected and not found["matrix"].get(expected):
        wrong.append(f"no {expected} instruction, found {found['matrix'] or 'none'}")
    if row.huge and found["offsets32"]:
        wrong.append(f"{found['offsets32']} address computations with 32-bit offsets")
    return wrong


def baseline_entry(row: Row) -> dict[str, Any]:
    """What the committed baseline keeps of a row."""
    kept = ("registers", "spills", "shared", "tensor_memory")
    entry = {name: row.resources[name] for name in kept}
    if row.aligned:
        entry["loop_load_bits"] = row.resources["loop_load_bits"]
    return entry


def regressions(row: Row, baseline: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How a row is worse than the baseline's; a row that is not recorded cannot be."""
    before = baseline.get(row.key)
    if row.error or before is None:
        return []
    found = row.resources
    worse = [
        f"{name} {found[name]}, was {before[name]}"
        for name, slack in (("spills", 0), ("shared", 0), ("tensor_memory", 0))
        if found[name] > before[name] + slack
    ]
    if found["registers"] > before["registers"] + REGISTER_SLACK:
        worse.append(f"registers {found['registers']}, was {before['registers']}")
    if "loop_load_bits" in before and narrower(found["loop_load_bits"], before["loop_load_bits"]):
        worse.append(
            f"loads in loops {found['loop_load_bits']}, were {before['loop_load_bits']} "
            "(bits: count)"
        )
    return worse


def narrower(found: Mapping[Any, int], before: Mapping[Any, int]) -> bool:
    """Whether of two counts by width the first has fewer wide ones and in return more narrow ones.

    So a loop that is unrolled less, or reads one scalar more, is not narrower.
    """
    found, before = (
        {int(bits): count for bits, count in counts.items()} for counts in (found, before)
    )

    def split(counts: Mapping[int, int], width: int) -> tuple[int, int]:
        wide = sum(count for bits, count in counts.items() if bits >= width)
        return wide, sum(counts.values()) - wide

    pairs = ((split(found, width), split(before, width)) for width in {*found, *before})
    return any(wide < wide_0 and narrow > narrow_0 for (wide, narrow), (wide_0, narrow_0) in pairs)


def read_baseline(path: Path, triton_version: str) -> dict[str, dict[str, Any]] | None:
    """The rows recorded for a version of triton; None if there are none."""
    if not path.exists():
        return None
    return json.loads(path.read_text()).get(triton_version)


def write_baseline(
    path: Path, triton_version: str, rows: Iterable[Row], whole: bool = False
) -> None:
    """Record the rows of one version of triton, one row per line.

    Args:
        whole: these are all rows there are: others of this version are dropped.
    """
    versions = json.loads(path.read_text()) if path.exists() else {}
    recorded = {} if whole else versions.get(triton_version, {})
    new = {row.key: baseline_entry(row) for row in rows if not row.error}
    versions[triton_version] = recorded | new
    blocks = []
    for version in sorted(versions):
        lines = [
            f"  {json.dumps(key)}: {json.dumps(entry)}"
            for key, entry in sorted(versions[version].items())
        ]
        blocks.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
