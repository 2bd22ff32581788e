"""The bounds that csrc/cpu/vmath.h states, scanned on every ISA that this processor runs."""

from __future__ import annotations

import pytest
import torch

from fmkernels import _native
from fmkernels.ops import _activations

lab = _native.lab()
pytestmark = pytest.mark.skipif(lab is None, reason="needs the compiled module fmkernels._lab")

ISAS = _native.build_info().get("isas_supported", [])
POINTS = 1_000_000
ORDER = _activations.CHOICES  # also the order of csrc/core/types.h


def evaluate(name: str, x: torch.Tensor, isa: str) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    lab.math(name, x.data_ptr(), y.data_ptr(), x.numel(), isa)
    return y


def ulp_error(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Distance to the exact (float64) value in units of the last place of its float32 rounding."""
    magnitude = exact.abs().clamp(min=2.0**-126)
    ulp = torch.exp2(torch.floor(torch.log2(magnitude)) - 23)
    return (actual.double() - exact).abs() / ulp


def scan(low: float, high: float) -> torch.Tensor:
    """Evenly spaced points, and as many spaced evenly in the exponent on either side of zero."""
    even = torch.linspace(low, high, POINTS, dtype=torch.float64)
    tiny = torch.exp2(torch.linspace(-126, 0, POINTS // 4, dtype=torch.float64))
    return (
        torch.cat([even, (tiny * abs(low)), -(tiny * abs(low)), tiny * abs(high)])
        .float()
        .clamp(min(low, high), max(low, high))
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "bound"),
    [
        ("exp", torch.exp, -87.3, 88.7, 2.0),
        ("exp2_nonpositive", torch.exp2, -126.0, 0.0, 3.0),
        ("exp2_nonpositive_coarse", torch.exp2, -126.0, 0.0, 52.0),
        ("tanh", torch.tanh, -20.0, 20.0, 3.0),
        ("sigmoid", torch.sigmoid, -87.0, 90.0, 4.0),
        ("erf", torch.erf, -6.0, 6.0, 3.0),
        ("expm1", torch.expm1, -30.0, 88.7, 2.0),
    ],
)
def test_ulp_bound(isa, name, exact, low, high, bound):
    x = scan(low, high)
    error = ulp_error(evaluate(name, x, isa), exact(x.double()))
    worst = error.argmax()
    assert error[worst] <= bound, f"{error[worst]:.2f} ulp at {x[worst].item()!r}"


@pytest.mark.parametrize("isa", ISAS)
def test_special_values(isa):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 200.0, -200.0, 88.8, -103.0, -110.0])
    expected = {
        "exp": torch.exp(x.double()).float(),
        "expm1": torch.expm1(x.double()).float(),
        "tanh": torch.tanh(x),
        "sigmoid": torch.sigmoid(x.double()).float(),
        "erf": torch.erf(x),
    }
    for name, value in expected.items():
        actual = evaluate(name, x, isa)
        torch.testing.assert_close(actual, value, rtol=1e-6, atol=2e-38, equal_nan=True, msg=name)
    x = torch.tensor([-inf, nan, 0.0, -149.0, -160.0])
    actual = evaluate("exp2_nonpositive", x, isa)
    torch.testing.assert_close(
        actual, torch.exp2(x.double()).float(), rtol=1e-6, atol=2e-45, equal_nan=True
    )
    assert actual[0] == 0, "a masked logit must weigh exactly nothing"


@pytest.mark.parametrize("isa", ISAS)
def test_exp_underflows_gradually(isa):
    x = torch.linspace(-103.9, -87.4, 10_000)
    exact = torch.exp(x.double())
    actual = evaluate("exp", x, isa).double()
    assert ((actual - exact).abs() <= 2 * 2.0**-149).all()


def apply(name: str | None, derivative: bool, x: torch.Tensor, isa: str) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    dtype = "f64" if x.dtype == torch.float64 else "f32"
    lab.activation(
        ORDER.index(name), derivative, dtype, x.data_ptr(), y.data_ptr(), x.numel(), isa
    )
    return y


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ORDER)
def test_activations_and_their_derivatives(isa, dtype, name):
    """Against torch's own activations in float64."""
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([0.0, -3.0, 3.0, 6.0])]).to(
        dtype
    )
    exact = _activations.apply(name, x.double())
    gradient = _activations.apply_backward(name, torch.ones_like(exact), x.double(), exact)
    # The absolute part covers the cancellation in the tails of gelu: 4e-7 |x|.
    bound = 4e-7 if dtype == torch.float32 else 1e-15
    allowed = bound * (1 + x.double().abs())
    assert ((apply(name, False, x, isa).double() - exact).abs() <= allowed).all()
    derivative = apply(name, True, x, isa).double()
    kink = torch.isclose(gradient, derivative, rtol=0, atol=1e-3)
    assert kink.all(), f"derivative is wrong at {x[~kink][:5].tolist()}"
    assert ((derivative - gradient).abs() <= 4 * allowed).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ORDER)
def test_activations_keep_nan(isa, name):
    x = torch.tensor([float("nan")] * 20)
    assert apply(name, False, x, isa).isnan().all()
