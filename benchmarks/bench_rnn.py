"""LSTM sequences and cells, PyTorch eager and fmkernels.

    pytest benchmarks/bench_rnn.py --benchmark-group-by=group --benchmark-json=rnn.json

Select with ``-k "fp32 and inference"``. The candidates of a workload run one after the other here,
which is good for tracking one of them over time; for ratios between them use ``fmkernels bench``,
which interleaves them.
"""

FAMILY = "rnn"


def test_rnn(benchmark, prepared):
    prepared.time(benchmark)
