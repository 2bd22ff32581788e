"""The reference architectures, PyTorch eager and fmkernels.

    pytest benchmarks/bench_models.py --benchmark-group-by=group --benchmark-json=models.json

Select with ``-k "fp32 and inference"``. The candidates of a workload run one after the other here,
which is good for tracking one of them over time; for ratios between them use ``fmkernels bench``,
which interleaves them.
"""

FAMILY = "models"


def test_models(benchmark, prepared):
    prepared.time(benchmark)
