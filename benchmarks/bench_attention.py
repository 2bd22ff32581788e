"""Attention and the Transformer encoder layer, PyTorch eager and fmkernels.

    pytest benchmarks/bench_attention.py --benchmark-group-by=group --benchmark-json=attention.json

Select with ``-k "fp32 and inference"``. The candidates of a workload run one after the other here,
which is good for tracking one of them over time; for ratios between them use ``fmkernels bench``,
which interleaves them.
"""

FAMILY = "attention"


def test_attention(benchmark, prepared):
    prepared.time(benchmark)
