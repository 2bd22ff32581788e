"""The GEMM micro-kernel, tile by tile: integer operands make every result exact, so the
tolerance is zero. Every ISA that this processor runs is tested in the one process."""

from __future__ import annotations

import pytest
import torch

from fmkernels import _native

lab = _native.lab()
pytestmark = pytest.mark.skipif(lab is None, reason="needs the compiled module fmkernels._lab")

ISAS = _native.build_info().get("isas_supported", [])
DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}


def integers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small integers, sparse enough that sums stay exact in every storage type (|sum| < 256)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, shape, generator=generator)
    kept = torch.rand(shape, generator=generator) < 8 / max(shape[-1], 8)
    return (values * kept).to(dtype)


def run(dtype: str, a, b, *, a_reduction_major=False, b_transposed=False, isa: str):
    """C = A B through the kernel; `a` and `b` as stored (transposed where the flag says so)."""
    m = a.shape[1] if a_reduction_major else a.shape[0]
    k = a.shape[0] if a_reduction_major else a.shape[1]
    n = b.shape[0] if b_transposed else b.shape[1]
    guard = 7.0  # the elements after C must survive
    storage = torch.full((m * n + 64,), guard, dtype=DTYPES[dtype])
    storage[: m * n] = float("nan")
    lab.gemm(
        dtype,
        m,
        n,
        k,
        a.data_ptr(),
        a.stride(0),
        a_reduction_major,
        b.data_ptr(),
        b.stride(0),
        b_transposed,
        storage.data_ptr(),
        isa,
    )
    assert torch.all(storage[m * n :] == guard), "the kernel wrote past the end of C"
    return storage[: m * n].view(m, n)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_and_tail(dtype, isa):
    """Every tile height with every panel width, and widths that leave a tail of lanes."""
    torch_dtype = DTYPES[dtype]
    lanes = lab.lanes(isa)
    widths = sorted({1, lanes - 1, lanes, lanes + 1, 2 * lanes, 3 * lanes - 1, 4 * lanes + 3})
    for n in widths:
        for m in range(1, 2 * lab.tile_rows(1, isa) + 2):
            k = 1 + (m * 7 + n) % 37
            a = integers(m, k, dtype=torch_dtype, seed=m)
            b = integers(n, k, dtype=torch_dtype, seed=n)
            expected = (a.double() @ b.double().t()).to(torch_dtype)
            actual = run(dtype, a, b, b_transposed=True, isa=isa)
            assert torch.equal(actual, expected), f"m={m} n={n} k={k}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a_reduction_major", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("k", [1, 2, 15, 64, 1281, 3001])
def test_operand_orders_and_cut_reductions(dtype, isa, a_reduction_major, b_transposed, k):
    """All four operand orders; the long reductions pass through the accumulator scratch."""
    torch_dtype = DTYPES[dtype]
    m, n = 29, 67
    a = integers(m, k, dtype=torch_dtype, seed=1)
    b = integers(n, k, dtype=torch_dtype, seed=2)
    expected = (a.double() @ b.double().t()).to(torch_dtype)
    actual = run(
        dtype,
        a.t().contiguous() if a_reduction_major else a,
        b if b_transposed else b.t().contiguous(),
        a_reduction_major=a_reduction_major,
        b_transposed=b_transposed,
        isa=isa,
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype, isa):
    """Leading dimensions larger than the rows: what lies between them is NaN and not read."""
    torch_dtype = DTYPES[dtype]
    m, n, k = 17, 33, 21
    a = torch.full((m, k + 5), float("nan"), dtype=torch_dtype)
    b = torch.full((n, k + 3), float("nan"), dtype=torch_dtype)
    a[:, :k] = integers(m, k, dtype=torch_dtype, seed=3)
    b[:, :k] = integers(n, k, dtype=torch_dtype, seed=4)
    a, b = a[:, :k], b[:, :k]
    expected = (a.double() @ b.double().t()).to(torch_dtype)
    assert torch.equal(run(dtype, a, b, b_transposed=True, isa=isa), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_to_storage(isa):
    """Sums that 16 bits cannot hold round to nearest even, as torch's conversion does."""
    generator = torch.Generator().manual_seed(0)
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        a = torch.randint(-60, 61, (40, 12), generator=generator).to(torch_dtype)
        b = torch.randint(-60, 61, (50, 12), generator=generator).to(torch_dtype)
        expected = (a.double() @ b.double().t()).to(torch_dtype)  # sums < 2^24: exact in fp32
        assert torch.equal(run(dtype, a, b, b_transposed=True, isa=isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_where_they_belong(dtype, isa):
    torch_dtype = DTYPES[dtype]
    a = torch.ones(9, 5, dtype=torch_dtype)
    b = torch.ones(20, 5, dtype=torch_dtype)
    a[2, 4] = float("nan")
    a[5, 0] = float("inf")
    b[7, 3] = float("nan")
    actual = run(dtype, a, b, b_transposed=True, isa=isa)
    expected = a.double() @ b.double().t()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
