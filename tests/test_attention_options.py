"""Windows, softcap, ALiBi, sinks, dropout and gradients of masks: alone and together."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels._attention_oracle import attend, dropout_factors
from fmkernels.ops import _dropout
from fmkernels.ops.attention.backends import SDPA
from fmkernels.ops.attention.schema import Options

BACKENDS = testing.available_backends(SDPA, torch.zeros(1, 1, 1, 1), Options())
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

# batch, query heads, key heads, queries, keys, D, Dv
SHAPES = {
    "small": (2, 4, 2, 13, 17, 16, 24),
    "tall": (1, 2, 2, 150, 40, 20, 16),
    "wide": (1, 2, 1, 30, 330, 16, 16),
    "decode": (2, 4, 2, 2, 70, 32, 32),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make(shape, dtype=torch.float32, **tensors):
    batch, heads, shared, queries, keys, width, value_width = shape
    return {
        "query": testing.normal(batch, heads, queries, width, dtype=dtype),
        "key": testing.normal(batch, shared, keys, width, dtype=dtype),
        "value": testing.normal(batch, shared, keys, value_width, dtype=dtype),
        **tensors,
    }


def check(backend, arguments, **options):
    grouped = arguments["query"].size(1) != arguments["key"].size(1)

    def ours(**tensors):
        return FF.scaled_dot_product_attention(
            **tensors, **options, enable_gqa=grouped, backend=backend
        )

    def exact(**tensors):
        return attend(**tensors, **options)

    testing.compare(ours, exact, arguments)


WINDOWS = [(3, 0), (-1, 2), (5, -1), (4, 7), (1, 10**6), (200, 3)]


@backends
@shapes
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_window(backend, shape, window):
    check(backend, make(shape), window=window)


@backends
@shapes
def test_window_of_one_key(backend, shape):
    """Forward alone: a weight of exactly 1 has a gradient of rounding errors."""
    arguments = make(shape)
    output = FF.scaled_dot_product_attention(
        **arguments, window=(0, 0), enable_gqa=True, backend=backend
    )
    common = min(shape[3:5])
    values = arguments["value"].repeat_interleave(shape[1] // shape[2], dim=1)[:, :, :common]
    torch.testing.assert_close(output[:, :, :common], values)
    assert (output[:, :, common:] == 0).all()


@backends
@shapes
@dtypes
def test_causal_window(backend, shape, dtype):
    check(backend, make(shape, dtype), window=(9, 3), is_causal=True)


@backends
@shapes
@dtypes
def test_softcap(backend, shape, dtype):
    arguments = make(shape, dtype)
    arguments["query"] = arguments["query"] * 3
    check(backend, arguments, softcap=1.5)


@backends
@shapes
@dtypes
@pytest.mark.parametrize("by_batch", [False, True])
def test_alibi(backend, shape, dtype, by_batch):
    batch, heads = shape[:2]
    slopes = torch.rand((batch, heads) if by_batch else (heads,)) / 4
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check(backend, make(shape, dtype, alibi_slopes=slopes.to(wide)))


@backends
@shapes
@dtypes
def test_sinks(backend, shape, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sinks = testing.normal(shape[1], dtype=wide) * 2
    check(backend, make(shape, dtype, sinks=sinks), is_causal=True)


@backends
def test_infinite_and_huge_sinks(backend):
    """A sink of -inf is none, one of 1e4 takes all the weight."""
    arguments = make(SHAPES["small"])
    arguments["sinks"] = torch.tensor([float("-inf"), 1e4, -1e4, 0.0])
    check(backend, arguments)


MASK_SHAPES = [(2, 4, 13, 17), (2, 1, 13, 17), (1, 4, 13, 17), (13, 17), (2, 1, 1, 17), (4, 1, 17)]


@backends
@dtypes
@pytest.mark.parametrize("mask_shape", MASK_SHAPES, ids=str)
def test_gradient_of_a_mask(backend, dtype, mask_shape):
    mask = testing.normal(*mask_shape, dtype=dtype)
    check(backend, make(SHAPES["small"], dtype, attn_mask=mask))


@backends
@pytest.mark.parametrize("mask_shape", [(13, 1), (2, 1, 13, 1), (1, 1)], ids=str)
def test_a_mask_that_shifts_whole_rows_has_no_gradient(backend, mask_shape):
    arguments = make(SHAPES["small"], torch.float64, attn_mask=torch.zeros(mask_shape).double())
    arguments["attn_mask"].requires_grad_()
    output = FF.scaled_dot_product_attention(**arguments, enable_gqa=True, backend=backend)
    (grad,) = torch.autograd.grad(output.square().sum(), arguments["attn_mask"])
    assert grad.shape == mask_shape and grad.abs().max() < 1e-13


@backends
@shapes
def test_gradient_of_a_mask_with_hidden_keys(backend, shape):
    batch, heads, _, queries, keys, *_ = shape
    mask = testing.normal(batch, heads, queries, keys)
    mask[mask > 0.8] = float("-inf")
    mask[0, 1, queries // 2] = float("-inf")
    check(backend, make(shape, attn_mask=mask), window=(30, 11))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=testing.dtype_name)
def test_float32_mask_on_half_precision(backend, dtype):
    check(backend, make(SHAPES["small"], dtype, attn_mask=testing.normal(2, 1, 13, 17)))


OPTIONS = {
    "mask": {"attn_mask"},
    "bool": {"bool"},
    "alibi": {"alibi_slopes"},
    "sinks": {"sinks"},
    "softcap": {"softcap"},
    "window": {"window"},
    "causal": {"is_causal"},
    "scale": {"scale"},
    "dropout": {"dropout"},
}


def combination(names, shape, dtype):
    """Tensors and options by name."""
    batch, heads, _, queries, keys, *_ = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors, options = {}, {}
    if "mask" in names:
        tensors["attn_mask"] = testing.normal(batch, 1, queries, keys, dtype=dtype)
    if "bool" in names:
        tensors["attn_mask"] = torch.rand(1, heads, queries, keys) > 0.3
    if "alibi" in names:
        tensors["alibi_slopes"] = torch.rand(heads, dtype=wide) / 4
    if "sinks" in names:
        tensors["sinks"] = testing.normal(heads, dtype=wide)
    if "softcap" in names:
        options["softcap"] = 2.0
    if "window" in names:
        options["window"] = (11, 6)
    if "causal" in names:
        options["is_causal"] = True
    if "scale" in names:
        options["scale"] = -0.3
    return tensors, options


PAIRS = [
    pair
    for pair in itertools.combinations(OPTIONS, 2)
    if not ({"mask", "bool"} <= set(pair) or ("causal" in pair and {"mask", "bool"} & set(pair)))
]
ALL_BUT = [
    ("mask", "alibi", "sinks", "softcap", "window", "scale", "dropout"),
    ("bool", "alibi", "sinks", "softcap", "window", "dropout"),
    ("alibi", "sinks", "softcap", "window", "causal", "scale", "dropout"),
]
combinations = pytest.mark.parametrize("names", PAIRS + ALL_BUT, ids="-".join)


def check_combination(backend, names, shape, dtype):
    tensors, options = combination(names, shape, dtype)
    arguments = make(shape, dtype, **tensors)
    own, exact_options = dict(options), dict(options)
    if "dropout" in names:
        own["dropout_p"] = 0.3
        torch.manual_seed(11)
        seed = _dropout.new_seed(torch.device("cpu"))
        sizes = (*shape[:2], *shape[3:5])
        exact_options["factors"] = dropout_factors(seed, 0.3, sizes)
    grouped = shape[1] != shape[2]

    def ours(**given):
        torch.manual_seed(11)
        return FF.scaled_dot_product_attention(
            **given, **own, enable_gqa=grouped, return_lse=True, backend=backend
        )

    def exact(**given):
        return attend(**given, **exact_options, return_lse=True)

    testing.compare(ours, exact, arguments)


@backends
@combinations
def test_combinations(backend, names):
    check_combination(backend, names, SHAPES["small"], torch.float32)


@backends
@pytest.mark.parametrize("names", ALL_BUT, ids="-".join)
@shapes
@dtypes
def test_everything_at_once(backend, names, shape, dtype):
    if "window" in names and shape is SHAPES["tall"]:
        pytest.skip("rows without any key have no finite lse to compare")
    check_combination(backend, names, shape, dtype)


@backends
@pytest.mark.parametrize("names", ALL_BUT, ids="-".join)
def test_gradcheck(backend, names):
    shape = (2, 2, 1, 4, 5, 3, 2)
    tensors, options = combination(names, shape, torch.float64)
    if "dropout" in names:
        options["dropout_p"] = 0.3
    arguments = make(shape, torch.float64, **tensors)
    names = [n for n, t in arguments.items() if t.is_floating_point()]
    fixed = {n: t for n, t in arguments.items() if n not in names}

    def function(*leaves):
        torch.manual_seed(4)
        given = dict(zip(names, leaves, strict=True)) | fixed
        return FF.scaled_dot_product_attention(
            **given, **options, enable_gqa=True, return_lse=True, backend=backend
        )

    leaves = [arguments[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(function, leaves)


@backends
@pytest.mark.parametrize("needed", ["attn_mask", "alibi_slopes", "sinks"])
def test_gradient_of_one_option_alone(backend, needed):
    shape = SHAPES["small"]
    tensors, options = combination(("mask", "alibi", "sinks", "softcap"), shape, torch.float64)
    arguments = make(shape, torch.float64, **tensors)
    arguments[needed].requires_grad_()
    output = FF.scaled_dot_product_attention(
        **arguments, **options, enable_gqa=True, backend=backend
    )
    (grad,) = torch.autograd.grad(output.square().sum(), arguments[needed])
    (wanted,) = torch.autograd.grad(
        attend(**arguments, **options).square().sum(), arguments[needed]
    )
    torch.testing.assert_close(grad, wanted)


@backends
@pytest.mark.parametrize("queries", [4, 60])
def test_rows_without_keys_give_their_sink(backend, queries):
    """The window leaves the last queries without keys."""
    arguments = make((1, 2, 2, queries + 20, 20, 8, 8), torch.float64)
    arguments["sinks"] = torch.tensor([0.5, -1.0], dtype=torch.float64)
    for t in arguments.values():
        t.requires_grad_()
    output, lse = FF.scaled_dot_product_attention(
        **arguments, window=(2, 0), return_lse=True, backend=backend
    )
    assert (output[:, :, 22:] == 0).all()
    assert (lse[:, 0, 22:] == 0.5).all() and (lse[:, 1, 22:] == -1.0).all()
    grads = torch.autograd.grad((output.square().sum(), lse.sum()), list(arguments.values()))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, 22:] == 0).all()


# --- dropout


def test_philox_known_answers():
    """The first vectors of the Random123 distribution's test of philox4x32-10."""
    zero = torch.zeros(1, dtype=torch.int64)
    ones = torch.full((1,), 0xFFFFFFFF)
    assert [w.item() for w in _dropout.words(zero, (zero,) * 4)] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]
    assert [w.item() for w in _dropout.words(zero - 1, (ones,) * 4)] == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]


def test_philox_statistics():
    rows = torch.arange(400)[:, None]
    kept = _dropout.kept(torch.tensor([123456789123]), 0.25, rows, torch.arange(1001)).double()
    deviation = math.sqrt(0.25 * 0.75 / kept.numel())
    assert abs(kept.mean().item() - 0.75) < 5 * deviation
    assert abs(torch.corrcoef(kept[:50]).fill_diagonal_(0).mean().item()) < 0.01


@backends
@dtypes
@shapes
def test_dropout(backend, dtype, shape):
    check_combination(backend, ("dropout",), shape, dtype)


@backends
def test_dropout_follows_the_seed(backend):
    query = testing.normal(2, 2, 20, 16)

    def attention(seed):
        torch.manual_seed(seed)
        return [
            FF.scaled_dot_product_attention(query, query, query, dropout_p=0.4, backend=backend)
            for _ in range(2)
        ]

    (first, second), (again, _), (other, _) = attention(1), attention(1), attention(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(first, other)


@backends
def test_dropping_everything_gives_zeros(backend):
    arguments = make(SHAPES["small"])
    for t in arguments.values():
        t.requires_grad_()
    output = FF.scaled_dot_product_attention(
        **arguments, dropout_p=1.0, enable_gqa=True, backend=backend
    )
    assert (output == 0).all()
    for grad in torch.autograd.grad(output.sum(), list(arguments.values())):
        assert (grad == 0).all()


@backends
def test_the_mean_over_seeds_is_attention_without_dropout(backend):
    # Each row 8 times in 2 heads, dropped apart: 16 samples of each call, for calls are slow where
    # they are interpreted.
    row = testing.normal(1, 1, 8, 16)
    query, key = row.repeat(1, 2, 8, 1), row.expand(1, 2, 8, 16)
    torch.manual_seed(0)
    outputs = torch.stack(
        [
            FF.scaled_dot_product_attention(query, key, key, dropout_p=0.3, backend=backend)
            for _ in range(190)
        ]
    )
    mean = outputs.unflatten(3, (8, 8)).mean(dim=(0, 2, 3))
    expected = F.scaled_dot_product_attention(row, row, row)[0]
    assert (mean - expected).abs().max() < 0.1
