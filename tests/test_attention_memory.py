"""No matrix of weights: the memory that attention takes grows with S, not with its square."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fmkernels import testing
from fmkernels.ops.attention.backends import SDPA
from fmkernels.ops.attention.schema import Options

pytestmark = pytest.mark.skipif(
    "cpu" not in testing.available_backends(SDPA, torch.zeros(1, 1, 1, 1), Options()),
    reason="needs the native library",
)

PROGRAM = """
import resource, sys, torch
import fmkernels.functional as FF
import fmkernels.ops.attention.reference
torch.set_num_threads(2)
length, options = int(sys.argv[1]), eval(sys.argv[2])
def step(length):
    tensors = [torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)]
    sinks = torch.zeros(1, requires_grad=True)
    output = FF.scaled_dot_product_attention(
        *tensors, **options, is_causal=True, sinks=sinks, backend="cpu"
    )
    output.sum().backward()
step(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(length)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("options", ["{}", "{'dropout_p': 0.1, 'softcap': 5.0}"])
def test_a_training_step_of_16384_positions(options):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "16384", options],
        capture_output=True,
        text=True,
        check=True,
    )
    kilobytes = int(run.stdout)
    # Thirty rows of 16 floats per position; the weights alone would be 1 GB.
    assert kilobytes * 1024 < 30 * 16384 * 16 * 4, f"{kilobytes} KB"
