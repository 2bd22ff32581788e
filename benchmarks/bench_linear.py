"""Fully connected layers, PyTorch eager and fmkernels.

    pytest benchmarks/bench_linear.py --benchmark-group-by=group --benchmark-json=linear.json

Select with ``-k "fp32 and inference"``. The candidates of a workload run one after the other here,
which is good for tracking one of them over time; for ratios between them use ``fmkernels bench``,
which interleaves them.
"""

FAMILY = "linear"


def test_linear(benchmark, prepared):
    prepared.time(benchmark)
