"""replace(fuse=True): what is fused and what is not, with the model's meaning unchanged."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fmkernels
from fmkernels import nn as fnn
from fmkernels._replace import steps
from fmkernels._replace.fused import FusedAway, FusedBatchNorm2d, FusedConv2d
from fmkernels.ops import _activations
from fmkernels.testing import assert_within_policy


def fused(report):
    """Path of each fused layer -> what went into it."""
    return {row.path: row.old for row in report.of("fused")}


def outcome(model, inputs):
    """Output, gradients and buffers after one step's forward and backward."""
    torch.manual_seed(3)
    inputs = inputs.clone().requires_grad_()
    output = model(inputs)
    model.zero_grad()
    if output.requires_grad:
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
    return {
        "output": output.detach(),
        "input.grad": inputs.grad,
        **{f"{name}.grad": p.grad for name, p in model.named_parameters()},
        **{name: b.clone() for name, b in model.named_buffers() if not name.startswith("_")},
    }


def assert_same(actual, expected, rtol=1e-7, atol=1e-10):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def replace_and_compare(model, inputs, expected=None, **options):
    """Replace; the result must equal a copy of the original in training and in evaluation.

    In float64: the gradient of a bias before a batch norm is zero but for rounding.

    Returns:
        The report; ``expected`` is compared with what was fused.
    """
    model, inputs = model.double(), inputs.double()
    # Running statistics and affine parameters that are not the trivial ones.
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d) and m.affine:
                m.weight.copy_(torch.linspace(0.5, -1.5, m.num_features))
                m.bias.copy_(torch.linspace(-0.5, 0.5, m.num_features))
        model.train()(inputs * 2 + 1)
    theirs = copy.deepcopy(model)
    keys = list(model.state_dict())
    report = fmkernels.replace(model, **options)
    assert list(model.state_dict()) == keys
    for mode in (True, False, True):
        theirs.train(mode)
        model.train(mode)
        assert_same(outcome(model, inputs), outcome(theirs, inputs))
    if expected is not None:
        assert fused(report) == expected
    return report


def images(size=12, batch=3, channels=3):
    return torch.randn(batch, channels, size, size)


class TestSequential:
    def test_whole_chain(self):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        replace_and_compare(model, images(), {"0": "Conv2d + BatchNorm2d + ReLU + MaxPool2d"})
        assert [type(m) for m in model] == [FusedConv2d, FusedBatchNorm2d, FusedAway, FusedAway]
        assert isinstance(model[0], nn.Conv2d)
        assert isinstance(model[1], nn.BatchNorm2d)
        assert all("fused into 0" in repr(m) for m in model[1:])

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ([nn.BatchNorm2d(4)], "Conv2d + BatchNorm2d"),
            ([nn.ReLU()], "Conv2d + ReLU"),
            ([nn.MaxPool2d(3, 2, 1)], "Conv2d + MaxPool2d"),
            ([nn.BatchNorm2d(4), nn.MaxPool2d(2)], "Conv2d + BatchNorm2d + MaxPool2d"),
            ([nn.SiLU(), nn.MaxPool2d((2, 2), (1, 2))], "Conv2d + SiLU + MaxPool2d"),
            ([nn.MaxPool2d(2), nn.ReLU()], "Conv2d + MaxPool2d + ReLU"),
            ([nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU6()],
             "Conv2d + BatchNorm2d + MaxPool2d + ReLU6"),
            ([nn.ReLU(), nn.AvgPool2d(2)], "Conv2d + ReLU + AvgPool2d"),
            ([nn.BatchNorm2d(4), nn.Hardswish(), nn.AvgPool2d(3, 2, 1)],
             "Conv2d + BatchNorm2d + Hardswish + AvgPool2d"),
            ([nn.AvgPool2d(2, count_include_pad=False)], "Conv2d + AvgPool2d"),
            ([nn.BatchNorm2d(4, affine=False)], "Conv2d + BatchNorm2d"),
            ([nn.BatchNorm2d(4, momentum=None)], "Conv2d + BatchNorm2d"),
            ([nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()],
             "Conv2d + BatchNorm2d + ReLU"),
            # Only the beginning of these is a chain.
            ([nn.ReLU(), nn.BatchNorm2d(4)], "Conv2d + ReLU"),
            ([nn.ReLU(), nn.Tanh()], "Conv2d + ReLU"),
            ([nn.MaxPool2d(2), nn.Tanh()], "Conv2d + MaxPool2d"),
            ([nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU()], "Conv2d + BatchNorm2d"),
            ([nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)], "Conv2d + ReLU"),
            ([nn.ReLU(), nn.MaxPool2d(2, dilation=2)], "Conv2d + ReLU"),
            ([nn.ReLU(), nn.MaxPool2d(4)], "Conv2d + ReLU"),
            ([nn.AvgPool2d(2), nn.ReLU()], "Conv2d + AvgPool2d"),
            ([nn.ReLU(), nn.AvgPool2d(4)], "Conv2d + ReLU"),
            ([nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)], "Conv2d + ReLU"),
            ([nn.ReLU(), nn.AvgPool2d(2, divisor_override=3)], "Conv2d + ReLU"),
            ([nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)], "Conv2d + ReLU"),
            # And these are none.
            ([nn.Identity(), nn.ReLU()], None),
            ([nn.InstanceNorm2d(4), nn.ReLU()], None),
        ],
    )  # fmt: skip
    def test_what_follows_a_convolution(self, layers, expected):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), *layers)
        expected = {} if expected is None else {"0": expected}
        replace_and_compare(model, images(11), expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"bias": False},
            {"groups": 3},
            {"padding": "same", "padding_mode": "reflect"},
            {"dilation": 2, "padding": (2, 1)},
        ],
    )
    def test_kinds_of_convolution(self, options):
        model = nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.BatchNorm2d(6), nn.ReLU6())
        report = replace_and_compare(model, images())
        assert len(fused(report)) == 1

    def test_linear_and_activation(self):
        model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3), nn.Dropout(0.0))
        replace_and_compare(model, torch.randn(6, 5), {"0": "Linear + GELU"})
        assert model[0].activation == "gelu"
        assert isinstance(model[1], FusedAway)

    def test_batch_norm_of_another_dtype_is_left_alone(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).bfloat16()
        model[1].float()
        assert fused(fmkernels.replace(model)) == {}

    def test_activation_used_twice_is_left_alone(self):
        relu = nn.ReLU()
        model = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu)
        replace_and_compare(model, images(), {})

    def test_chains_do_not_leave_their_container(self):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU())
        inner = copy.deepcopy(model[0])
        inputs = images()
        replace_and_compare(model, inputs, {"0.0": "Conv2d + BatchNorm2d"})
        inputs = inputs.double()
        inner.double().load_state_dict(model[0].state_dict())
        torch.testing.assert_close(model[0].eval()(inputs), inner.eval()(inputs))

    def test_mobilenet_block(self):
        class ConvNormActivation(nn.Sequential):
            def __init__(self, i, o, kernel, stride=1, groups=1):
                padding = (kernel - 1) // 2
                super().__init__(
                    nn.Conv2d(i, o, kernel, stride, padding, groups=groups, bias=False),
                    nn.BatchNorm2d(o),
                    nn.ReLU6(inplace=True),
                )

        class InvertedResidual(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.conv = nn.Sequential(
                    ConvNormActivation(channels, 12, 1),
                    ConvNormActivation(12, 12, 3, groups=12),
                    nn.Conv2d(12, channels, 1, bias=False),
                    nn.BatchNorm2d(channels),
                )

            def forward(self, x):
                return x + self.conv(x)

        model = nn.Sequential(ConvNormActivation(3, 6, 3, stride=2), InvertedResidual(6))
        whole = "Conv2d + BatchNorm2d + ReLU6"
        replace_and_compare(
            model,
            images(),
            {
                "0.0": whole,
                "1.conv.0.0": whole,
                "1.conv.1.0": whole,
                "1.conv.2": "Conv2d + BatchNorm2d + add",
            },
        )

    def test_without_fusing(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        replace_and_compare(model, images(), {}, fuse=False)
        assert [type(m) for m in model] == [fnn.Conv2d, nn.BatchNorm2d, nn.ReLU]

    def test_channels_last(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        report = replace_and_compare(
            model.to(memory_format=torch.channels_last),
            images().to(memory_format=torch.channels_last),
        )
        assert len(fused(report)) == 1
        output = model.eval()(images().double().to(memory_format=torch.channels_last))
        assert output.is_contiguous(memory_format=torch.channels_last)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "mish": nn.Mish(),
}
CALLS = {
    "relu": [F.relu, torch.relu, torch.relu_, lambda x: F.relu(x, inplace=True),
             lambda x: x.relu(), lambda x: x.relu_()],
    "relu6": [F.relu6],
    "leaky_relu": [F.leaky_relu, lambda x: F.leaky_relu(x, 0.01)],
    "elu": [F.elu, lambda x: F.elu(x, alpha=1.0)],
    "gelu": [F.gelu],
    "gelu_tanh": [lambda x: F.gelu(x, approximate="tanh")],
    "silu": [F.silu, lambda x: F.silu(x, True)],
    "sigmoid": [torch.sigmoid, lambda x: x.sigmoid()],
    "tanh": [torch.tanh, lambda x: x.tanh_()],
    "hardswish": [F.hardswish],
    "hardsigmoid": [F.hardsigmoid],
    "mish": [F.mish],
}  # fmt: skip
OTHERS = [
    nn.LeakyReLU(0.2),
    nn.ELU(0.5),
    nn.Hardtanh(),
    nn.PReLU(),
    nn.Softplus(),
    nn.Softmax(1),
]
OTHER_CALLS = [
    lambda x: F.leaky_relu(x, 0.2),
    lambda x: F.elu(x, alpha=0.5),
    lambda x: F.hardtanh(x),
    lambda x: F.softmax(x, 1),
    lambda x: x.abs(),
]


class Calling(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x):
        return self.call(self.layer(x))


class TestActivations:
    def test_every_name_is_covered(self):
        assert set(ACTIVATIONS) == set(CALLS) == set(_activations.NAMES)

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_modules(self, name):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), ACTIVATIONS[name], nn.Conv2d(4, 2, 1))
        replace_and_compare(model, images())
        assert model[0].activation == name

    def test_hardtanh_from_0_to_6_is_relu6(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Hardtanh(0, 6))
        replace_and_compare(model, torch.randn(2, 3) * 9)
        assert model[0].activation == "relu6"

    @pytest.mark.parametrize("module", OTHERS, ids=repr)
    def test_modules_with_other_parameters_are_left_alone(self, module):
        replace_and_compare(nn.Sequential(nn.Conv2d(3, 4, 3), module), images(), {})

    @pytest.mark.parametrize(
        ("name", "call"), [(name, call) for name, calls in CALLS.items() for call in calls]
    )
    @pytest.mark.parametrize(
        "layer", [nn.Conv2d(3, 4, 3), nn.Linear(12, 4)], ids=["conv", "linear"]
    )
    def test_calls(self, layer, name, call):
        model = Calling(copy.deepcopy(layer), call)
        report = replace_and_compare(model, images())
        assert list(fused(report)) == ["layer"]
        assert model.layer.activation == name

    @pytest.mark.parametrize("call", OTHER_CALLS)
    def test_calls_with_other_parameters_are_left_alone(self, call):
        replace_and_compare(Calling(nn.Conv2d(3, 4, 3), call), images(), {})

    @pytest.mark.parametrize(
        ("call", "is_fused"),
        [
            (lambda x: F.max_pool2d(x, 2), True),
            (lambda x: F.max_pool2d(x, (3, 3), stride=1, padding=1), True),
            (lambda x: torch.max_pool2d(x, 2), True),
            (lambda x: F.max_pool2d(F.relu(x), 2), True),
            (lambda x: F.relu(F.max_pool2d(x, 2)), True),
            (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], False),
            (lambda x: F.max_pool2d(x, 2, ceil_mode=True), False),
            (lambda x: F.max_pool2d(x, (2, 3)), False),
            (lambda x: F.avg_pool2d(x, 2), True),
            (lambda x: F.avg_pool2d(F.relu(x), 3, stride=2, padding=1), True),
            (lambda x: F.avg_pool2d(x, 2, divisor_override=1), False),
            (lambda x: F.relu(F.avg_pool2d(x, 2)) + 0, True),
            (lambda x: F.max_pool2d(x, 2) + x.mean(), False),
        ],
    )
    def test_pooling_calls(self, call, is_fused):
        report = replace_and_compare(Calling(nn.Conv2d(3, 4, 3), call), images(11))
        assert bool(fused(report)) == is_fused

    @pytest.mark.parametrize("name", steps.COMMUTES_WITH_MAX_POOL)
    def test_pooling_commutes_with(self, name):
        """Outputs, gradients and NaN are equal bit by bit, ties included."""
        values = torch.tensor([-1.0, -0.0, 0.0, 0.5, 6.0, 7.0, float("nan")])
        x = values[torch.randint(7, (64, 1, 6, 6))]
        weight = torch.randn(64, 1, 3, 3)
        results = []
        for function in (
            lambda t: F.max_pool2d(_activations.FORWARD[name](t), 2),
            lambda t: _activations.FORWARD[name](F.max_pool2d(t, 2)),
        ):
            t = x.clone().requires_grad_()
            output = function(t)
            (gradient,) = torch.autograd.grad((output * weight).sum(), t)
            results.append((output, gradient))
        (a, grad_a), (b, grad_b) = results
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
        number = ~F.interpolate(a.isnan().float(), scale_factor=2).bool()
        assert torch.equal(grad_a[number], grad_b[number])


class ResidualBlock(nn.Module):
    """As in ResNet: one ReLU module for two calls, an in-place sum, an optional shortcut."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(ResidualBlock(4, 4), ResidualBlock(4, 6, 2))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        x = self.layers(x).mean((2, 3))
        return self.fc(x)


RESNET = {
    "conv1": "Conv2d + BatchNorm2d + ReLU + MaxPool2d",
    "layers.0.conv1": "Conv2d + BatchNorm2d + ReLU",
    "layers.0.conv2": "Conv2d + BatchNorm2d + add + ReLU",
    "layers.1.conv1": "Conv2d + BatchNorm2d + ReLU",
    "layers.1.conv2": "Conv2d + BatchNorm2d + add + ReLU",
    "layers.1.downsample.0": "Conv2d + BatchNorm2d",
}


class Tutorial(nn.Module):
    """The network of many a first lesson: functional ReLU, one pooling module for two calls."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(4, 5, 3)
        self.fc1 = nn.Linear(20, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        return self.fc2(x)


TUTORIAL = {
    "conv1": "Conv2d + relu + MaxPool2d",
    "conv2": "Conv2d + max_pool2d + relu",
    "fc1": "Linear + relu",
}


class TestTraced:
    def test_residual_network(self):
        replace_and_compare(ResNet(), images(), RESNET)

    def test_tutorial_network(self):
        model = Tutorial()
        replace_and_compare(model, images(14), TUTORIAL)
        assert isinstance(model, Tutorial)
        assert repr(model).startswith("Tutorial(\n")

    def test_errors_are_measured_over_the_whole_chain(self):
        for model, size in ((ResNet(), 12), (Tutorial(), 14)):
            report = fmkernels.replace(model, example_inputs=images(size))
            assert all(row.error is not None and row.error < 1e-5 for row in report.rows)
            assert report.error < 1e-5

    def test_modules_in_containers_that_are_not_called(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in range(2))
                self.rest = nn.ModuleDict({"norm": nn.BatchNorm2d(4), "act": nn.Sigmoid()})

            def forward(self, x):
                a = self.rest["act"](self.rest["norm"](self.convs[0](x)))
                return a * self.convs[1](x)

        model = Branches()
        replace_and_compare(model, images(), {"convs.0": "Conv2d + BatchNorm2d + Sigmoid"})
        assert type(model) is Branches

    def test_a_value_used_twice_ends_the_chain(self):
        class Dense(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)
                self.norm = nn.BatchNorm2d(3)
                self.act = nn.ReLU()

            def forward(self, x):
                y = self.norm(self.conv(x))
                return torch.cat([self.act(y), y], 1)

        replace_and_compare(Dense(), images(), {"conv": "Conv2d + BatchNorm2d"})

    def test_layer_called_twice_is_not_fused(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, x):
                return torch.sigmoid(self.conv(F.relu(self.conv(x))))

        replace_and_compare(Twice(), images(), {})

    def test_a_frozen_batch_norm_stays_frozen(self):
        """norm.eval() inside a model in training, found by isinstance, as detectors do."""
        model = ResNet().train()
        model(images())
        theirs = copy.deepcopy(model)
        fmkernels.replace(model)
        for m in (model, theirs):
            for norm in m.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.eval()
        inputs = images().double()
        assert_same(outcome(model.double(), inputs), outcome(theirs.double(), inputs))

    def test_five_training_steps(self):
        for model, size in ((ResNet(), 12), (Tutorial(), 14)):
            theirs = copy.deepcopy(model)
            fmkernels.replace(model)
            inputs, labels = images(size, 8), torch.arange(8) % 3
            losses = []
            for trainee in (theirs, model):
                torch.manual_seed(5)
                optimizer = torch.optim.SGD(trainee.parameters(), lr=0.05, momentum=0.9)
                losses.append([])
                for _ in range(5):
                    loss = F.cross_entropy(trainee(inputs), labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses[-1].append(loss.item())
            assert losses[1] == pytest.approx(losses[0], rel=1e-3)

    def test_undo(self):
        for model, size in ((ResNet(), 12), (Tutorial(), 14)):
            modules = list(model.named_modules())
            kinds = [type(m) for _, m in modules]
            expected = model.eval()(inputs := images(size))
            report = fmkernels.replace(model)
            model.train()(inputs)
            model.eval()
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.reset_running_stats()
            report.undo()
            assert list(model.named_modules()) == modules
            assert [type(m) for _, m in modules] == kinds
            torch.testing.assert_close(model(inputs), expected)

    def test_deepcopy_refers_to_the_copied_batch_norm(self):
        model = ResNet().eval()
        fmkernels.replace(model)
        copied = copy.deepcopy(model)
        assert copied.conv1.norm is copied.bn1
        assert model.conv1.norm is model.bn1
        inputs = images()
        expected = model(inputs)
        copied.train()(images())
        torch.testing.assert_close(model(inputs), expected)

    @pytest.mark.parametrize("build", [ResNet, Tutorial])
    def test_pickle(self, build):
        model = build().eval()
        size = 12 if build is ResNet else 14
        fmkernels.replace(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        inputs = images(size)
        torch.testing.assert_close(loaded(inputs), model(inputs))
        assert_same(outcome(loaded.train(), inputs), outcome(model.train(), inputs))
        if build is ResNet:
            assert loaded.conv1.norm is loaded.bn1

    @pytest.mark.parametrize("build", [ResNet, Tutorial])
    def test_load_state_dict_and_dtype(self, build):
        inputs = images(12 if build is ResNet else 14)
        trained, model = build().train(), build()
        trained(inputs)
        fmkernels.replace(model)
        model.load_state_dict(trained.state_dict())
        torch.testing.assert_close(model.eval()(inputs), trained.eval()(inputs))
        trained.load_state_dict(model.state_dict())
        inputs = inputs.double()
        assert_same(outcome(model.double(), inputs), outcome(trained.double(), inputs))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, dtype):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        model(images(batch=8) * 2 + 1)
        model = model.to(dtype).eval()
        inputs = images().to(dtype)
        theirs = model(inputs)
        oracle = copy.deepcopy(model).double()(inputs.double())
        fmkernels.replace(model)
        assert_within_policy("output", model(inputs), theirs, oracle)

    @pytest.mark.parametrize("training", [True, False])
    def test_compile(self, training):
        torch.compiler.reset()
        for model, inputs in (
            (ResidualBlock(3, 3), images(6)),
            (Calling(nn.Linear(3, 2), torch.tanh), torch.ones(2, 3)),
        ):
            report = fmkernels.replace(model.train(training))
            assert fused(report)
            expected = copy.deepcopy(model)(inputs)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(inputs), expected, rtol=1e-4, atol=1e-5)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)


class DataDependent(Base):
    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return x if x.sum() > 0 else -x


class OptionalArgument(Base):
    def forward(self, x, scale=None):
        x = F.relu(self.norm(self.conv(x)))
        return x if scale is None else x * scale


class OptionalBranch(Base):
    def forward(self, x, skip_norm=None):
        x = self.conv(x)
        return F.relu(self.norm(x) if skip_norm is None else x)


class Randomly(Base):
    def forward(self, x):
        x = F.relu(self.conv(x))
        return x if torch.rand(()) > 2 else self.norm(x)


class WithoutGradient(Base):
    def forward(self, x):
        with torch.no_grad():
            x = F.relu(self.conv(x))
        return self.norm(x)


class Remembering(Base):
    def forward(self, x):
        self.last = F.relu(self.conv(x))
        return self.norm(self.last)


class MakingTensors(Base):
    def forward(self, x):
        return F.relu(self.conv(x)) + self.norm(x) * torch.ones(1)


class Configured(Base):
    def __init__(self):
        super().__init__()
        self.config = {"slope": 0.01}

    def forward(self, x):
        return self.norm(F.leaky_relu(self.conv(x), self.config["slope"]))


class ReadingAChildsMode(Base):
    def forward(self, x):
        x = F.relu(self.conv(x))
        return F.dropout(x, 0.0, self.norm.training)


class DifferentInTraining(Base):
    def forward(self, x):
        x = self.conv(x)
        return torch.tanh(x) if self.training else torch.sigmoid(x)


class InHelper(Base):
    def features(self, x):
        return torch.sigmoid(self.norm(self.conv(x)))

    def forward(self, x):
        return self.features(x) * 2


UNTOUCHED_FORWARDS = {
    DataDependent: ({}, "cannot trace the model: symbolically traced variables"),
    OptionalArgument: ({"conv": "Conv2d + BatchNorm2d"}, "optional arguments"),
    OptionalBranch: ({}, ""),
    Randomly: ({}, "draws from torch's random numbers"),
    WithoutGradient: ({}, "switches gradients or autocast"),
    Remembering: ({}, ""),
    MakingTensors: ({}, "makes a constant tensor"),
    Configured: ({}, "reads config (dict), which a trace would freeze"),
    ReadingAChildsMode: ({}, "reads norm.training"),
    DifferentInTraining: ({}, "differs between training and evaluation"),
    InHelper: ({"conv": "Conv2d + BatchNorm2d"}, ""),
}


class TestForwardsThatKeepTheirMeaning:
    @pytest.mark.parametrize("build", UNTOUCHED_FORWARDS, ids=lambda kind: kind.__name__)
    def test_forward_is_not_rewritten(self, build):
        expected, reason = UNTOUCHED_FORWARDS[build]
        model = build()
        report = replace_and_compare(model, images(), expected)
        assert type(model) is build
        assert reason in report.rows[0].reason

    def test_optional_arguments_still_count(self):
        inputs, scale = images(), torch.rand(3, 1, 1)
        for model in (OptionalArgument(), OptionalBranch()):
            model.eval()
            expected = model(inputs), model(inputs, scale)
            fmkernels.replace(model)
            torch.testing.assert_close((model(inputs), model(inputs, scale)), expected)

    def test_helper_methods_may_be_called_directly(self):
        model = InHelper().eval()
        inputs = images()
        expected = model.features(inputs)
        fmkernels.replace(model)
        torch.testing.assert_close(model.features(inputs), expected)

    def test_changed_attribute_raises(self):
        class Scaled(Base):
            def __init__(self):
                super().__init__()
                self.factor = 2.0

            def forward(self, x):
                return F.relu(self.conv(x)) * self.factor

        model = Scaled()
        report = replace_and_compare(model, images(), {"conv": "Conv2d + relu"})
        model.factor = 3.0
        with pytest.raises(RuntimeError, match="Scaled.factor was 2.0 when .* undo"):
            model(images().double())
        report.undo()
        model(images().double())

    def test_in_place_arithmetic_stays_in_place(self):
        class InPlace(Base):
            def forward(self, x):
                y = F.relu(self.conv(x))
                z = self.norm(x)
                same = z
                z += y
                z *= 2
                return z + same

        replace_and_compare(InPlace(), images(), {"conv": "Conv2d + relu"})

    def test_keyword_and_positional_calls(self):
        class Named(Base):
            def forward(self, input, other):
                return F.relu(self.conv(input)) + other

        model, inputs = Named(), images()
        expected = model(inputs, other=inputs)
        assert fused(fmkernels.replace(model)) == {"conv": "Conv2d + relu"}
        torch.testing.assert_close(model(input=inputs, other=inputs), expected)
        torch.testing.assert_close(model(inputs, inputs), expected)

    def test_layers_of_a_sequential_called_one_by_one(self):
        """As a perceptual loss does: it keeps the values between the layers."""

        class Taps(nn.Module):
            def __init__(self):
                super().__init__()
                self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

            def forward(self, x):
                taps = []
                for layer in self.features:
                    x = layer(x)
                    taps.append(x.mean())
                return torch.stack(taps)

        replace_and_compare(Taps(), images(), {})

    def test_slices_of_a_sequential(self):
        class Slices(nn.Module):
            def __init__(self):
                super().__init__()
                self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

            def forward(self, x):
                x = self.features[:1](x)
                return self.features[1:](x - x.mean())

        replace_and_compare(Slices(), images(), {})

    def test_sequential_inside_a_module_that_cannot_be_traced(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
                self.head = nn.Linear(4, 2)

            def forward(self, x):
                x = self.body(x).mean((2, 3))
                if x.sum() > 0:
                    x = x * 2
                return torch.tanh(self.head(x))

        report = replace_and_compare(Outer(), images(), {"body.0": "Conv2d + ReLU"})
        assert "torch.fx cannot trace the model" in report.rows[1].reason

    def test_tracing_leaves_no_trace(self):
        model = Remembering()
        model.counter = 0
        before = {name: dict(vars(m)) for name, m in model.named_modules()}
        random_state = torch.get_rng_state()
        report = fmkernels.replace(model, families=("linear", "conv"))
        report.undo()
        assert {name: dict(vars(m)) for name, m in model.named_modules()} == before
        assert torch.equal(torch.get_rng_state(), random_state)
        assert "__getattribute__" not in vars(nn.Module)

    def test_graph_module_keeps_its_class(self):
        model = torch.fx.symbolic_trace(Tutorial())
        report = fmkernels.replace(model)
        assert fused(report) == {}
        assert "GraphModule" in report.rows[0].reason
        assert model(images(14)).shape == (3, 3)

    def test_replaced_model_can_be_traced_again(self):
        model = Tutorial().eval()
        fmkernels.replace(model)
        inputs = images(14)

        class Leaves(torch.fx.Tracer):
            def is_leaf_module(self, m, name):
                return True

        graph = Leaves().trace(model)
        traced = torch.fx.GraphModule(model, graph)
        torch.testing.assert_close(traced(inputs), model(inputs))
