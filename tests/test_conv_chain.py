"""conv_chain: frozen convolutions in a row as one op; band by band where that pays."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import fmkernels
from fmkernels import _native, testing
from fmkernels import nn as fnn
from fmkernels._dispatch import clear_decisions, last_decisions
from fmkernels._replace import sequential
from fmkernels.ops.conv import quick, reference
from fmkernels.ops.conv.autograd import pack_conv_weight
from fmkernels.ops.conv.geometry import ConvOptions, conv_shape, pooled_shape

pytestmark = pytest.mark.skipif(
    not _native.HAS_NATIVE,
    reason="chains are native kernels, which are not built",
)

FORMATS = [torch.contiguous_format, torch.channels_last]


def conv(
    kernel: int | tuple[int, int],
    out: int,
    *,
    stride: int = 1,
    padding: Sequence[int] | None = None,
    dilation: int = 1,
    groups: int = 1,
    mode: str = "zeros",
    activation: str | None = "relu",
    pool: str | None = None,
    window: tuple[int, ...] = (),
    affine: str = "bias scale shift",
):
    """A layer: out channels, kernel, options, and which vectors it has."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    if padding is None:
        padding = [dilation * (k // 2) for k in kernel for _ in range(2)]
    options = ConvOptions(
        (stride,) * 2, tuple(padding), (dilation,) * 2, groups, False, mode, activation, pool,
        window,
    )  # fmt: skip
    return out, kernel, options, affine.split()


def inverted_residual(wide: int, out: int, kernel: int = 3, **depthwise):
    return (
        conv(1, wide, activation="relu6"),
        conv(kernel, wide, groups=wide, activation="relu6", **depthwise),
        conv(1, out, activation=None),
    )


# name -> shape of the input, layers. Sizes are such that what lies between the layers does not
# stay in the cache, in float32 at least, unless the name says so.
CHAINS = {
    "inverted residual": ((2, 16, 37, 41), inverted_residual(96, 16)),
    "stride 2": ((2, 16, 37, 40), inverted_residual(96, 24, stride=2)),
    "5x5": ((1, 24, 50, 30), inverted_residual(144, 24, 5)),
    "7x7 stride 2": ((1, 24, 51, 31), inverted_residual(144, 40, 7, stride=2)),
    "few channels in a vector": ((3, 12, 40, 44), inverted_residual(40, 20)),
    "odd channels": ((2, 7, 61, 43), inverted_residual(51, 9)),
    "uneven padding": (
        (2, 16, 40, 40),
        (conv(1, 64), conv((3, 2), 64, padding=(2, 0, 0, 1), groups=64), conv(1, 32)),
    ),
    "padding beyond the kernel": (
        (1, 16, 40, 40),
        (conv(1, 96), conv(3, 96, padding=(4, 5, 3, 6)), conv((5, 1), 8, padding=(4, 4, 0, 0))),
    ),
    "dilation": ((2, 16, 41, 40), (conv(1, 64), conv(3, 64, dilation=4, groups=64), conv(1, 16))),
    "strides above the kernel": (
        (2, 32, 64, 64),
        (conv(1, 48), conv(2, 48, stride=3, padding=(0, 0, 0, 0)), conv(3, 96, stride=2)),
    ),
    "groups": ((2, 32, 36, 36), (conv(1, 64), conv(3, 64, groups=8), conv(1, 48, groups=2))),
    "all of an image under each row": (
        (2, 16, 33, 40), (conv(1, 64), conv((33, 1), 64, padding=(16, 16, 0, 0)), conv(1, 8)),
    ),
    "depthwise first and last": (
        (2, 64, 40, 40), (conv(3, 64, groups=64), conv(1, 96), conv(3, 96, groups=96)),
    ),
    "many layers": ((1, 16, 60, 60), tuple(conv(3, 24, activation="silu") for _ in range(11))),
    "Winograd and a pool": (
        (2, 64, 30, 30),
        (
            conv(1, 64),
            conv(3, 64),
            conv(1, 128),
            conv(3, 64, stride=2, pool="max", window=(2, 2, 2, 2, 0, 0)),
        ),
    ),
    "pool in the middle": (
        (2, 16, 60, 60),
        (conv(3, 32), conv(3, 48, pool="avg", window=(3, 3, 2, 2, 1, 1)), conv(1, 96), conv(1, 8)),
    ),
    "other paddings": (
        (2, 16, 40, 40),
        (conv(3, 64, mode="reflect"), conv(3, 64, mode="circular", groups=64), conv(1, 16)),
    ),
    "small images": ((2, 32, 7, 7), inverted_residual(192, 32)),
    "a pixel": ((1, 32, 1, 1), inverted_residual(48, 32)),
    "no images": ((0, 16, 40, 40), inverted_residual(96, 16)),
    "bare": ((2, 16, 40, 40), tuple(conv(3, 48, activation=None, affine="") for _ in range(3))),
}  # fmt: skip


def in_a_row(layers):
    """What each of so many layers reads: the output of the one before."""
    return tuple((i, -1) for i in range(len(layers)))


class Problem:
    """Operands of a chain in one dtype and layout."""

    def __init__(self, name, dtype, memory_format):
        shape, described = CHAINS[name]
        self.input = testing.normal(*shape, dtype=dtype).to(memory_format=memory_format)
        self.layers = []
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        size = shape
        for out, kernel, options, affine in described:
            channels = size[1] // options.groups
            std = (channels * kernel[0] * kernel[1]) ** -0.5
            weight = testing.normal(out, channels, *kernel, dtype=dtype, std=std)
            vectors = {
                "bias": testing.normal(out, dtype=dtype),
                "scale": testing.normal(out, dtype=wide) + 1.5,
                "shift": testing.normal(out, dtype=wide),
            }
            given = [vectors[v] if v in affine else None for v in ("bias", "scale", "shift")]
            packed = pack_conv_weight(weight, options, "cpu")
            self.layers.append(quick.Layer(weight, *given, packed, options, None))
            image = torch.empty(size, device="meta")
            size = pooled_shape(conv_shape(image, weight, options), options.window)
        self.residual = None
        if described[-1][2].pool is None:
            self.residual = testing.normal(*size, dtype=dtype).to(memory_format=memory_format)

    def chain(self, reads=None):
        reads = in_a_row(self.layers) if reads is None else reads
        return self.call(quick.Chain(self.layers, reads))

    def call(self, chain):
        output = chain(self.input, self.residual)
        assert output is not None, "the call was not taken as an everyday one"
        return output

    def by_reference(self, convert=lambda tensor: tensor):
        image = convert(self.input)
        for layer in self.layers:
            weight, bias, scale, shift = (None if t is None else convert(t) for t in layer[:4])
            last = layer is self.layers[-1]
            residual = convert(self.residual) if last and self.residual is not None else None
            image = reference.conv_forward(
                image, weight, bias, scale, shift, residual, None, *layer.options, False, False
            )[0]
        return image

    def layer_by_layer(self):
        image = self.input
        for layer in self.layers:
            weight, bias, scale, shift, packed, options, backend = layer
            residual = self.residual if layer is self.layers[-1] else None
            image = quick.conv(
                image, weight, bias, scale, shift, residual, packed, options, backend
            )
        return image


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", CHAINS)
def test_against_float64(name, memory_format, no_grad):
    problem = Problem(name, torch.float32, memory_format)
    chain = quick.Chain(problem.layers, in_a_row(problem.layers))
    for _ in ("first call", "kept"):
        actual = problem.call(chain)
        testing.assert_within_policy(
            "output", actual, problem.by_reference(), problem.by_reference(torch.Tensor.double)
        )
        if actual.numel():
            assert actual.is_contiguous(memory_format=memory_format)


def test_a_kept_chain_takes_any_image(no_grad):
    """Other sizes, layouts and residuals, and a bias in other memory."""
    problem = Problem("inverted residual", torch.float32, torch.channels_last)
    chain = quick.Chain(problem.layers, in_a_row(problem.layers))
    problem.call(chain)
    for shape in ((1, 16, 9, 30), (3, 16, 37, 41), (1, 16, 9, 30)):
        for memory_format in FORMATS:
            problem.input = testing.normal(*shape).to(memory_format=memory_format)
            problem.residual = testing.normal(*shape).to(memory_format=memory_format)
            problem.layers[0].bias.data = testing.normal(96)
            testing.assert_within_policy(
                "output",
                problem.call(chain),
                problem.by_reference(),
                problem.by_reference(torch.Tensor.double),
            )
    problem.residual = problem.residual[:, :, 1:]
    assert chain(problem.input, problem.residual) is None
    problem.layers[0].bias.data = testing.normal(95)
    assert chain(problem.input, None) is None


def test_a_kept_chain_is_dropped_with_its_owner(no_grad):
    problem = Problem("inverted residual", torch.float32, torch.channels_last)
    chain = quick.Chain(problem.layers, in_a_row(problem.layers))
    problem.call(chain)
    number = chain._kept
    run = torch.ops.fmkernels.conv_chain_run
    testing.assert_within_policy(
        "output",
        run(problem.input, number, problem.residual),
        problem.by_reference(),
        problem.by_reference(torch.Tensor.double),
    )
    del chain
    with pytest.raises(RuntimeError, match=f"{number} is not kept"):
        run(problem.input, number, problem.residual)
    torch.ops.fmkernels.conv_chain_drop(number)  # no harm


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name", ["inverted residual", "stride 2", "odd channels", "Winograd and a pool"]
)
def test_other_dtypes_give_what_single_layers_give(name, dtype, memory_format, no_grad):
    """Images between the layers are rounded as if they were outputs."""
    problem = Problem(name, dtype, memory_format)
    testing.assert_within_policy(
        "output",
        problem.chain(),
        problem.layer_by_layer(),
        problem.layer_by_layer().double(),
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["inverted residual", "stride 2", "7x7 stride 2", "dilation"])
def test_nothing_is_read_that_was_not_computed(name, memory_format, no_grad):
    """Whatever the buffers between the layers held before, the result is the same."""
    problem = Problem(name, torch.float32, memory_format)
    expected = problem.chain()
    clean = problem.input
    problem.input = torch.full_like(clean, float("nan"))
    problem.chain()
    problem.input = clean
    assert torch.equal(problem.chain(), expected)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("name", "banded"),
    [
        ("inverted residual", True),
        ("stride 2", True),
        ("7x7 stride 2", True),
        ("few channels in a vector", True),
        ("odd channels", True),
        ("uneven padding", True),
        ("dilation", True),
        ("groups", True),
        ("depthwise first and last", True),
        ("small images", False),
    ],
)
def test_images_between_the_layers_are_not_held(name, banded, memory_format, no_grad):
    """Bands are computed where images are large: nothing but the output is allocated then."""
    problem = Problem(name, torch.float32, memory_format)
    problem.chain()
    with torch.profiler.profile(profile_memory=True) as profile:
        output = problem.chain()
    events = profile.profiler.kineto_results.events()
    memory = [e.nbytes() for e in events if e.name() == "[memory]"]
    allocated = sum(size for size in memory if size > 0)
    assert allocated >= output.nbytes, "what the profiler saw is not the output"
    assert (allocated == output.nbytes) == banded


@pytest.mark.parametrize("name", ["inverted residual", "stride 2", "few channels in a vector"])
def test_any_number_of_threads_gives_the_same(name, no_grad):
    problem = Problem(name, torch.float32, torch.channels_last)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outputs.append(problem.chain())
    finally:
        torch.set_num_threads(before)
    for output in outputs[1:]:
        testing.assert_within_policy("output", output, outputs[0], outputs[0].double())


def test_exact_calls(no_grad):
    problem = Problem("Winograd and a pool", torch.float32, torch.channels_last)
    with fmkernels.precision("exact"):
        actual = problem.chain()
    exact = problem.by_reference(torch.Tensor.double)
    testing.assert_within_policy("output", actual, problem.by_reference(), exact)
    assert not torch.equal(actual, problem.chain())


def test_the_op_itself(no_grad):
    """Its fake, and what it refuses."""
    problem = Problem("pool in the middle", torch.float32, torch.channels_last)
    weights = [layer.weight for layer in problem.layers]
    vectors = [v for layer in problem.layers for v in layer[1:5]]
    options = quick.chain_text([x.options for x in problem.layers], in_a_row(weights))
    arguments = (problem.input, weights, vectors, problem.residual, options)
    torch.library.opcheck(torch.ops.fmkernels.conv_chain.default, arguments)
    op = torch.ops.fmkernels.conv_chain

    def reading(*reads):
        return quick.chain_text([x.options for x in problem.layers], reads)

    with pytest.raises(RuntimeError, match="weights"):
        op(problem.input, weights[:2], vectors, None, options)
    with pytest.raises(RuntimeError, match="channels"):
        op(problem.input[:, :8], weights, vectors, None, options)
    with pytest.raises(RuntimeError, match="residual"):
        op(problem.input, weights, vectors, problem.residual[:, :, 1:], options)
    with pytest.raises(RuntimeError, match="scale"):
        wrong = [*vectors[:1], vectors[1][1:], *vectors[2:]]
        op(problem.input, weights, wrong, None, options)
    with pytest.raises(RuntimeError, match="after it"):
        op(problem.input, weights, vectors, None, reading((1, -1), (1, -1), (2, -1), (3, -1)))
    with pytest.raises(RuntimeError, match="residual of layer 1"):
        op(problem.input, weights, vectors, None, reading((0, -1), (1, 0), (2, -1), (3, -1)))
    with pytest.raises(RuntimeError, match="fewer fields"):
        op(problem.input, weights, vectors, None, options + ";")
    with pytest.raises(RuntimeError, match="more fields"):
        op(problem.input, weights, vectors, None, options.rpartition(";")[0])
    with pytest.raises(RuntimeError, match="packed"):
        wrong = [*vectors[:3], vectors[7], *vectors[4:]]
        op(problem.input, weights, wrong, None, options)
    twice = Problem("bare", torch.float32, torch.channels_last)
    with pytest.raises(AssertionError, match="everyday"):
        twice.chain(((0, -1), (1, -1), (2, 1)))
    twice.residual = None
    assert twice.chain(((0, -1), (1, -1), (2, 1))).shape == (2, 48, 40, 40)


def graph_of(name):
    """The layers of a graph, and what they read."""
    c = {"activation": "relu"}
    return {
        # y = f(x); z = g(y) + y; u = h(z) + x; v = k(u) + z
        "long-lived values": (
            [conv(3, 24, **c), conv(1, 24, **c), conv(1, 16, **c), conv(3, 24, **c)],
            ((0, -1), (1, 1), (2, 0), (3, 2)),
        ),
        # Two branches, and a value that is read three times.
        "branches": (
            [conv(1, 40, **c), conv(3, 40, **c), conv(1, 40, **c), conv(3, 40, **c)],
            ((0, -1), (1, 1), (0, 2), (3, 1)),
        ),
        "a value that nobody reads": (
            [conv(1, 40, **c), conv(3, 20, **c), conv(1, 16, **c), conv(3, 16, **c)],
            ((0, -1), (1, -1), (1, 0), (3, 3)),
        ),
        # The expanded image between the second and third is the only one that goes band by band.
        "bands inside": (
            [conv(1, 16, **c), *inverted_residual(96, 16), conv(1, 16, **c)],
            ((0, 0), (1, -1), (2, -1), (3, 1), (4, 1)),
        ),
    }[name]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "name", ["long-lived values", "branches", "a value that nobody reads", "bands inside"]
)
def test_graphs(name, memory_format, no_grad):
    """Layers that read more than the one before; what they read is still there."""
    layers, reads = graph_of(name)
    x = testing.normal(2, 16, 37, 41).to(memory_format=memory_format)
    values, plain, exact, ours = [tuple(x.shape)], [x], [x.double()], []
    for (out, kernel, options, _), (source, added) in zip(layers, reads, strict=True):
        channels = values[source][1] // options.groups
        weight = testing.normal(out, channels, *kernel, std=(channels * 9) ** -0.5)
        packed = pack_conv_weight(weight, options, "cpu")
        ours.append(quick.Layer(weight, None, None, None, packed, options, None))
        for known in (plain, exact):
            residual = None if added < 0 else known[added]
            known.append(
                reference.conv_forward(
                    known[source], weight.to(x.dtype if known is plain else torch.float64), None,
                    None, None, residual, None, *options, False, False,
                )[0]
            )  # fmt: skip
        values.append(tuple(plain[-1].shape))
    actual = quick.Chain(ours, reads)(x, None)
    testing.assert_within_policy("output", actual, plain[-1], exact[-1])


# --- layers ---


class Block(nn.Module):
    """An inverted residual."""

    def __init__(self, channels=16, wide=96, out=16):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x):
        return x + self.body(x)


class NestedBlock(Block):
    """The same with Sequentials inside, as torchvision has them."""

    def __init__(self):
        super().__init__()
        body = list(self.body)
        self.body = nn.Sequential(
            nn.Sequential(*body[:3]), nn.Sequential(*body[3:6]), *body[6:], nn.Identity()
        )


@pytest.fixture
def chains(monkeypatch):
    """The number of layers in each chain that was called."""
    called = []
    original = quick.Chain.__call__

    def call(self, *operands):
        output = original(self, *operands)
        if output is not None:
            called.append(len(self._layers))
        return output

    monkeypatch.setattr(quick.Chain, "__call__", call)
    return called


def randomised(model):
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                m.weight.uniform_(0.5, 2)
                m.bias.normal_()
    return model.eval()


def frozen(model):
    model = copy.deepcopy(model)
    report = fmkernels.replace(model, freeze=True)
    return report.model


INPUT = (2, 16, 40, 40)


@pytest.mark.parametrize("kind", [Block, NestedBlock])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_blocks_of_a_model(kind, memory_format, chains, no_grad):
    model = randomised(nn.Sequential(kind(), kind())).to(memory_format=memory_format)
    x = torch.randn(INPUT).to(memory_format=memory_format)
    ours = frozen(model)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == [6]


def test_convolutions_in_a_row(chains, no_grad):
    """Of plain layers, of blocks, with what is no convolution in between."""
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2),
        nn.Dropout(),
        nn.Conv2d(32, 48, 1),
        nn.MaxPool2d(2),
        nn.Conv2d(48, 48, 3, padding="same", padding_mode="reflect"),
        nn.GELU(),
        nn.Conv2d(48, 16, 1),
        nn.Softmax(1),
        nn.Conv2d(16, 16, 1),
    ).eval()
    x = torch.randn(INPUT)
    ours = frozen(model)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == [2, 3]


class Residual(nn.Module):
    """As torchvision's, with a branch where the shape changes."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Plain(nn.Module):
    """No residual; its own forward stays."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(24, 24, 3, groups=24)
        self.second = nn.Conv2d(24, 16, 1)
        self.scale = 1

    def forward(self, x):
        return self.second(self.first(x))


class Sum(Block):
    """More than convolutions."""

    def forward(self, x):
        return (x + self.body(x)).sin()


def test_whole_stacks(chains, no_grad):
    """One call through modules of several kinds, up to what is no convolution."""
    model = randomised(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            nn.Sequential(Residual(16, 16), Residual(16, 24, 2)),
            Plain(),
            NestedBlock(),
            Sum(),
            Block(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
    )
    x = torch.randn(2, 3, 60, 60)
    ours = frozen(model)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == [1 + 2 + 3 + 2 + 3, 3, 3]
    chains.clear()
    loaded = pickle.loads(pickle.dumps(ours))
    torch.testing.assert_close(copy.deepcopy(loaded)(x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == [11, 3, 3]
    fmkernels.unfreeze(ours)
    chains.clear()
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == []


def test_a_module_that_has_changed_is_called(chains, no_grad):
    """What its forward read, or its training flag."""

    class Chooses(Plain):
        def forward(self, x):
            return self.second(self.first(x)) if self.scale == 1 else self.first(x)

    model = nn.Sequential(nn.Conv2d(3, 24, 3), Chooses(), nn.ReLU()).eval()
    ours = frozen(model)
    x = torch.randn(1, 3, 20, 20)
    ours(x)
    assert chains == [3]
    model[1].scale = ours[1].scale = 2
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    ours[1].scale = 1
    ours[1].train()
    chains.clear()
    ours(x)
    assert chains == []


def test_a_forward_of_its_own_that_is_convolutions_alone(chains, no_grad):
    """The model itself, called with everything by position; by name it is called as it is."""
    model = randomised(Residual(16, 24))
    ours = frozen(model)
    x = torch.randn(INPUT)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == [3]
    torch.testing.assert_close(ours(x=x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == [3]
    for wrong in ((), (x, x), (x, None)):
        with pytest.raises(TypeError):
            ours(*wrong)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_and_training_go_layer_by_layer(training, chains):
    model = randomised(Block()).train(training)
    ours = frozen(model)
    x = torch.randn(INPUT)
    results = []
    for m in (ours, model):
        m.zero_grad()
        given = x.clone().requires_grad_()
        m(given).square().sum().backward()
        results.append([given.grad, *(p.grad for p in m.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-2)
    assert chains == []
    with torch.no_grad():
        ours(x)
    assert chains == ([] if training else [3])


def test_what_is_not_frozen_goes_layer_by_layer(chains, no_grad):
    model = randomised(Block())
    ours = frozen(model)
    x = torch.randn(INPUT)
    fmkernels.unfreeze(ours)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == []
    fmkernels.freeze(ours)
    ours(x)
    assert chains == [3]


def test_a_changed_weight_is_noticed(no_grad):
    model = randomised(Block())
    ours = frozen(model)
    x = torch.randn(INPUT)
    ours(x)
    for m in (model, ours):
        m.body[0].weight.mul_(2)
        m.body[7].running_mean.add_(1)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)


def test_hooks_are_called(chains, no_grad):
    """On a convolution, on what was fused into one, on a Sequential inside; for all modules."""
    x = torch.randn(INPUT)
    model = randomised(NestedBlock())
    expected = model(x)
    for path in ("body.0", "body.1.0", "body.1.1", "body.2"):
        ours, seen = frozen(model), []
        handle = ours.get_submodule(path).register_forward_hook(lambda *_, s=seen: s.append(1))
        chains.clear()
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
        assert seen == [1], path
        assert 3 not in chains
        handle.remove()
        ours(x)
        assert chains[-1] == 3
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        ours(x)
    finally:
        handle.remove()
    assert ours.body[2] in seen


@pytest.mark.parametrize(
    "residual", [3.5, torch.ones(40), torch.ones(2, 16, 40, 40, dtype=torch.float64)]
)
def test_sums_that_kernels_cannot_add(residual, no_grad):
    class Model(Block):
        def forward(self, x, other):
            return self.body(x) + other

    model = randomised(Model())
    x = torch.randn(INPUT)
    actual, expected = frozen(model)(x, residual), model(x, residual)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_backends_autocast_and_odd_inputs(chains, no_grad):
    model = randomised(Block())
    ours = frozen(model)
    x = torch.randn(INPUT)
    with fmkernels.use_backend("reference"):
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x).float(), model(x).float(), rtol=0.1, atol=0.3)
    strided = torch.randn(2, 16, 40, 80)[..., ::2]
    torch.testing.assert_close(ours(strided), model(strided), rtol=1e-4, atol=1e-4)
    assert chains == []
    with pytest.raises(ValueError, match="input"):
        ours(torch.randn(2, 15, 40, 40))


def test_unbatched_images(no_grad):
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    x = torch.randn(INPUT[1:])
    torch.testing.assert_close(frozen(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_each_layer_is_in_the_log(no_grad):
    ours = frozen(randomised(Block()))
    x = torch.randn(INPUT)
    ours(x)
    clear_decisions()
    ours(x)
    assert [(d.op, d.chosen) for d in last_decisions()] == [("conv2d", "cpu")] * 3


def test_copies_and_undoing(chains, no_grad):
    model = randomised(nn.Sequential(Block(), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    expected_keys = list(model.state_dict())
    x = torch.randn(INPUT)
    expected = model(x)
    report = fmkernels.replace(model, freeze=True)
    assert list(model.state_dict()) == expected_keys
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert isinstance(other, nn.Sequential)
        chains.clear()
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
        assert chains == [5]
    report.undo()
    assert type(model) is nn.Sequential
    assert type(model[0].body) is nn.Sequential
    chains.clear()
    assert torch.equal(model(x), expected)
    assert chains == []


def test_members_may_be_exchanged(chains, no_grad):
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU()).eval()
    ours = frozen(model)
    x = torch.randn(INPUT)
    ours(x)
    ours[2] = nn.Identity()
    model[2] = nn.Identity()
    model.append(nn.Tanh())
    ours.append(nn.Tanh())
    chains.clear()
    # What was fused into the layer that is gone is gone with it.
    del model[3]
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == []


def test_subclasses_of_our_layers_are_called(chains, no_grad):
    class Doubled(fnn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Same(fnn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), Doubled(16, 16, 1), Same(16, 16, 1),
        fnn.ConvBlock2d(16, 16, 1, norm="batch"),
    ).eval()  # fmt: skip
    x = torch.randn(INPUT)
    with fmkernels.use_backend("reference"):
        expected = model(x)
    ours = frozen(model)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    assert chains == [2, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "convert", [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(1))]
)
def test_members_in_torchscript(convert, chains, no_grad):
    """Whose classes have no forward to look at."""
    pair = [nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3)]
    model = nn.Sequential(*pair, convert(nn.Tanh()), *copy.deepcopy(pair)).eval()
    x = torch.randn(INPUT)
    torch.testing.assert_close(frozen(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert chains == [2, 2]


def test_replacing_again(no_grad):
    """A Sequential that runs chains is still one whose members are known by their position."""
    model = nn.Sequential(
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Linear(40, 30), nn.ReLU()
    ).eval()
    x = torch.randn(INPUT)
    expected = model(x)
    first = fmkernels.replace(model, families=["conv"])
    second = fmkernels.replace(model, families=["linear"])
    assert [row.old for row in second.of("fused")] == ["Linear + ReLU"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    second.undo()
    first.undo()
    assert type(model) is nn.Sequential
    assert torch.equal(model(x), expected)


def test_compiled(no_grad):
    model = randomised(Block())
    ours = frozen(model)
    x = torch.randn(INPUT)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced(chains, no_grad):
    """A trace has a scope for each module, so it sees each called."""
    model = nn.Sequential(nn.Conv2d(16, 64, 1), nn.ReLU6(), nn.Conv2d(64, 16, 3)).eval()
    ours = frozen(model)
    x = torch.randn(INPUT)
    ours(x)
    chains.clear()
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert chains == []
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


def test_only_sequentials_with_convolutions_in_a_row_are_changed():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Softmax(1), nn.Conv2d(4, 4, 1)),
        nn.Softmax(1),
        nn.Sequential(fnn.Conv2d(4, 4, 1), nn.Linear(4, 4)),
    )
    fmkernels.replace(model)
    assert sequential.forward_of(model) is not None
    assert [sequential.forward_of(child) for child in model] == [None] * 4


def test_a_forward_of_ones_own_keeps_it():
    model = nn.Sequential(Plain(), nn.Conv2d(16, 4, 1))
    own = type(model[0]).forward
    fmkernels.replace(model)
    assert type(model[0]).forward is own
    assert isinstance(model[0], Plain)
