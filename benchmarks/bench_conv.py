"""Convolutions and blocks of them, PyTorch eager and fmkernels.

    pytest benchmarks/bench_conv.py --benchmark-group-by=group --benchmark-json=conv.json

Select with ``-k "fp32 and inference"``. The candidates of a workload run one after the other here,
which is good for tracking one of them over time; for ratios between them use ``fmkernels bench``,
which interleaves them.
"""

FAMILY = "conv"


def test_conv(benchmark, prepared):
    prepared.time(benchmark)
