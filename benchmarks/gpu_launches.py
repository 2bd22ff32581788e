"""Launches and bytes of each layer on a GPU, against PyTorch's own operators; needs no GPU.

    python benchmarks/gpu_launches.py

Exits with 1 if a layer takes more launches than the goal beside it in launches.py.

Counted on meta tensors, in bfloat16. The times are a MODEL (roofline of an H100's data sheet plus
an assumed cost per launch), not a measurement: see fmkernels/bench/gpu/launches.py.
"""

from __future__ import annotations

import sys

from fmkernels.bench.gpu import launches


def main() -> int:
    print(__doc__.strip().splitlines()[-2].strip(), __doc__.strip().splitlines()[-1].strip())
    print()
    heads = ("layer", "pass", "launches, PyTorch", "ours", "MB, PyTorch", "ours")
    print(f"| {' | '.join(heads)} | MODEL us, PyTorch | ours |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    missed = []
    for layer in launches.LAYERS:
        row = launches.count(layer)
        missed += launches.missed_goals(row)
        for index, name in enumerate(("forward", "backward")):
            theirs = row.theirs[index]
            ours = row.ours[index] if row.ours else None
            cells = [
                row.layer,
                name,
                f">= {theirs.launches}",
                str(ours.launches) if ours else row.error,
                f"{theirs.bytes / 1e6:.0f}",
                f"{ours.bytes / 1e6:.0f}" if ours else "",
                f"{theirs.model_s * 1e6:.0f}",
                f"{ours.model_s * 1e6:.0f}" if ours else "",
            ]
            print(f"| {' | '.join(cells)} |")
    for reason in missed:
        print(f"FAIL {reason}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
