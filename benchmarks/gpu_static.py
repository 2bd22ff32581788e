"""Compile every GPU kernel for four chips, without a GPU, and judge what the compiler produced.

    python benchmarks/gpu_static.py [--json FILE] [--dump DIR] [--arch sm_90] [--match linear]
    python benchmarks/gpu_static.py --subset      as in CI: every kernel, not every configuration

Prints one row per Triton kernel, configuration and chip: registers, spill instructions, shared and
tensor memory, matrix instructions, occupancy, widths of the global loads, 32-bit offsets. Exits
with 1 if a kernel does not fit, spills with aligned strides, lacks its matrix instruction, or is
worse than the committed baseline of this version of triton: more registers, spills or memory, or
narrower loads in a loop. Nothing is executed and nothing is timed.

    python benchmarks/gpu_static.py --cuda

does the same for the CUDA C++ kernels (cuda_static.py), where nvcc is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import triton

from fmkernels.bench.gpu import gates, registry, sweep
from fmkernels.bench.gpu.inspect import CHIPS

sys.path.append(str(Path(__file__).resolve().parent))  # not there under PYTHONSAFEPATH=1
import cuda_static  # noqa: E402

BASELINE = Path(__file__).with_name("gpu_baseline.json")


def main() -> int:
    options = _options()
    if options.cuda:
        return cuda_static.main(options.match)
    if options.dump is not None:
        options.dump.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    wanted = sweep.jobs(options.arch, options.dtype, options.match)
    if options.subset:
        wanted = sweep.representative(wanted)
    rows = sweep.sweep(
        wanted,
        workers=options.workers,
        kernel=options.kernel,
        dump=options.dump,
        on_row=lambda row: print(line(row), flush=True),
    )
    chosen = (options.match, options.kernel, options.dtype, options.arch)
    whole = chosen == ("", "", list(registry.DTYPES), list(CHIPS)) and not options.subset
    baseline = gates.read_baseline(BASELINE, triton.__version__)
    wrong = {row.key: gates.problems(row) for row in rows}
    if options.write_baseline:
        gates.write_baseline(BASELINE, triton.__version__, rows, whole)
    elif baseline is None:
        print(f"no baseline for triton {triton.__version__}: only the absolute gates apply")
    else:
        for row in rows:
            wrong[row.key] += gates.regressions(row, baseline)
        new = sum(row.key not in baseline for row in rows)
        if new:
            print(f"{new} rows are not in the baseline: record them with --write-baseline")
    if whole or options.subset:
        wrong["tables"] = sweep.uncovered(options.arch)
    if options.json is not None:
        document = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    failed = {key: reasons for key, reasons in wrong.items() if reasons}
    print(
        f"\n{len(rows)} kernels of {len(wanted)} jobs, {len(failed)} of them with problems, "
        f"{time.perf_counter() - start:.0f} s, triton {triton.__version__}"
    )
    for key, reasons in failed.items():
        for reason in reasons:
            print(f"FAIL {key}: {reason}")
    return 1 if failed or not rows else 0


def line(row: sweep.Row) -> str:
    name = f"{row.kernel} {row.config} {row.arch}"
    if row.error:
        return f"{name:<90} ERROR {row.error.splitlines()[0][:120]}"
    found = row.resources
    matrix = " ".join(f"{kind}:{count}" for kind, count in found["matrix"].items()) or "-"
    loads, in_loops = (
        " ".join(f"{bits}b:{count}" for bits, count in found[name].items()) or "-"
        for name in ("load_bits", "loop_load_bits")
    )
    return (
        f"{name:<90} reg {found['registers']:>3} spill {found['spills']:>3} "
        f"smem {found['shared']:>6} tmem {found['tensor_memory']:>3} "
        f"occ {found['occupancy']:>4.0%} "
        f"{matrix:<10} loads {loads:<24} in loops {in_loops:<16} "
        f"o32 {found['offsets32']:>2} {row.seconds:>5.1f} s"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", action="store_true", help="the CUDA C++ kernels instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to FILE")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write every code object to DIR")
    parser.add_argument("--arch", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument(
        "--dtype", nargs="+", choices=list(registry.DTYPES), default=list(registry.DTYPES)
    )
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--subset", action="store_true", help="of each chip only enough cases for every kernel"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write-baseline", action="store_true", help=f"record in {BASELINE.name}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
