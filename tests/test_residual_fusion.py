"""replace(): sums with a residual become part of the layer that computes one of their operands."""

from __future__ import annotations

import copy
import io
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fmkernels
from fmkernels._replace.fused import FusedAway, FusedConv2d, FusedLinear


def fused(report):
    """Path of each fused layer -> what went into it."""
    return {row.path: row.old for row in report.of("fused")}


def sums(report):
    """Path of each layer that took a sum -> what went into it."""
    return {path: old for path, old in fused(report).items() if "add" in old.split(" + ")}


def outcome(model, *inputs):
    """Output, gradients of inputs and parameters, and buffers, after a forward and a backward."""
    torch.manual_seed(3)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    # A model may write into what it is given; a leaf that requires a gradient must not be.
    outputs = model(*(tensor * 1 for tensor in inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    model.zero_grad()
    loss = sum(
        (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs
    )
    loss.backward()
    results = {
        **{f"output {i}": o.detach().clone() for i, o in enumerate(outputs)},
        **{f"input {i}.grad": t.grad for i, t in enumerate(inputs)},
        **{f"{name}.grad": p.grad for name, p in model.named_parameters()},
        **{name: b.clone() for name, b in model.named_buffers()},
    }
    return {name.replace("_orig_mod.", ""): value for name, value in results.items()}


def assert_same(actual, expected, rtol=1e-7, atol=1e-10):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def randomise(model):
    """Statistics and affine parameters that are not the trivial ones."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(torch.linspace(0.5, -1.5, m.num_features))
                m.bias.copy_(torch.linspace(-0.5, 0.5, m.num_features))
                m.running_mean.copy_(torch.linspace(-0.2, 0.3, m.num_features))
                m.running_var.copy_(torch.linspace(0.5, 2, m.num_features))
    return model


def replace_and_compare(model, *inputs, expected=None):
    """Replace; in training and in evaluation the model must equal a copy of the original."""
    model, inputs = randomise(model).double(), [tensor.double() for tensor in inputs]
    theirs = copy.deepcopy(model)
    keys = list(model.state_dict())
    report = fmkernels.replace(model)
    assert list(model.state_dict()) == keys
    if expected is not None:
        assert sums(report) == expected
    for mode in (True, False, True):
        theirs.train(mode)
        model.train(mode)
        assert_same(outcome(model, *inputs), outcome(theirs, *inputs))
    return report


def images(size=6, batch=3, channels=4):
    return torch.randn(batch, channels, size, size)


def conv_norm(i, o, kernel=3, stride=1):
    return [nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o)]


class BasicBlock(nn.Module):
    """torchvision's: He et al., arXiv:1512.03385, figure 5 left."""

    def __init__(self, i=4, o=4, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(i, o, 3, stride)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_norm(o, o)
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(*conv_norm(i, o, 1, stride))

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """The same, figure 5 right, with a module for each call and the shortcut first."""

    def __init__(self, i=4, o=8, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            *conv_norm(i, 3, 1), nn.ReLU(), *conv_norm(3, 3, 3, stride), nn.ReLU(inplace=True),
            *conv_norm(3, o, 1),
        )  # fmt: skip
        changed = stride != 1 or i != o
        self.shortcut = nn.Sequential(*(conv_norm(i, o, 1, stride) if changed else []))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.shortcut(x) + self.body(x))


class PreActivation(nn.Module):
    """He et al., arXiv:1603.05027: the sum comes last, behind a convolution without a norm."""

    def __init__(self, channels=4):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + x


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 4), nn.ReLU())
        self.layers = nn.Sequential(
            BasicBlock(), BasicBlock(4, 6, 2), Bottleneck(6, 8), Bottleneck(8, 8)
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


WHOLE = "Conv2d + BatchNorm2d + add + ReLU"
RESNET = {
    "layers.0.conv2": WHOLE,
    "layers.1.conv2": WHOLE,
    "layers.2.body.6": WHOLE,
    "layers.3.body.6": WHOLE,
}


class Summing(nn.Module):
    """One convolution and norm, and a forward that is given."""

    def __init__(self, call, *, inner=False, kernel=3):
        super().__init__()
        if inner:
            self.body = nn.Sequential(*conv_norm(4, 4, kernel))
        else:
            self.conv, self.bn = conv_norm(4, 4, kernel)
        self.call = call

    def forward(self, x, y):
        return self.call(self.bn(self.conv(x)), y)


class SummingBody(Summing):
    def __init__(self, call):
        super().__init__(call, inner=True)

    def forward(self, x, y):
        return self.call(self.body(x), y)


class Same(Summing):
    """With an identity between the norm and the sum."""

    def __init__(self):
        super().__init__(None)
        self.same = nn.Identity()

    def forward(self, x, y):
        return F.relu(self.same(self.bn(self.conv(x))) + y)


def in_place(a, b):
    a += b
    return a


SUMS = {
    "a + b": operator.add,
    "b + a": lambda a, b: b + a,
    "a += b": in_place,
    "torch.add": torch.add,
    "torch.add swapped": lambda a, b: torch.add(b, a),
    "torch.add other=": lambda a, b: torch.add(a, other=b, alpha=1),
    "a.add": lambda a, b: a.add(b),
    "b.add": lambda a, b: b.add(a, alpha=1),
    "a.add_": lambda a, b: a.add_(b),
}
OTHER_SUMS = {
    "alpha": lambda a, b: torch.add(a, b, alpha=2),
    "method alpha": lambda a, b: a.add(b, alpha=-1),
    "minus": lambda a, b: a - b,
    "twice the same": lambda a, b: a + a,
    "used twice": lambda a, b: (a + b) * a,
    "into the residual": lambda a, b: in_place(b, a),
    "into the residual, add_": lambda a, b: b.add_(a),
    "behind an activation": lambda a, b: F.relu(a) + b,
    "number": lambda a, b: (a + 2) * b,
}


class TestSums:
    @pytest.mark.parametrize("kind", [Summing, SummingBody])
    @pytest.mark.parametrize("activation", [None, F.relu, F.silu, F.hardswish, torch.tanh])
    @pytest.mark.parametrize("name", SUMS)
    def test_forms(self, kind, name, activation):
        def call(a, b):
            total = SUMS[name](a, b)
            return total if activation is None else activation(total)

        head = "conv" if kind is Summing else "body.0"
        ending = "" if activation is None else f" + {activation.__name__}"
        expected = {head: f"Conv2d + BatchNorm2d + add{ending}"}
        replace_and_compare(kind(call), images(), images(), expected=expected)

    @pytest.mark.parametrize("kind", [Summing, SummingBody])
    @pytest.mark.parametrize("name", OTHER_SUMS)
    def test_left_alone(self, kind, name):
        replace_and_compare(kind(OTHER_SUMS[name]), images(), images(), expected={})

    @pytest.mark.parametrize("kind", [Summing, SummingBody])
    def test_with_pools(self, kind):
        for pool in (F.max_pool2d, F.avg_pool2d):
            model = kind(lambda a, b, pool=pool: pool(F.relu(a + b), 2))
            report = replace_and_compare(model, images(), images())
            assert list(sums(report).values()) == [
                f"Conv2d + BatchNorm2d + add + relu + {pool.__name__}"
            ]

    def test_first_of_two_sums(self):
        model = Summing(lambda a, b: F.relu((a + b) + 2 * b))
        replace_and_compare(
            model, images(), images(), expected={"conv": "Conv2d + BatchNorm2d + add"}
        )

    @pytest.mark.parametrize("operand", [0, 1])
    def test_residual_used_elsewhere(self, operand):
        def call(a, b):
            total = F.relu(a + b) if operand == 0 else F.relu(b + a)
            return total, b * 2, torch.sigmoid(b)

        report = replace_and_compare(Summing(call), images(), images())
        assert list(sums(report)) == ["conv"]

    def test_residual_computed_from_the_convolution(self):
        model = Summing(lambda a, b: F.relu(a + torch.sigmoid(a)) + b)
        replace_and_compare(model, images(), images(), expected={})

    @pytest.mark.parametrize(
        "shape", [(3, 4, 1, 1), (4, 1, 1), (1, 4, 6, 6), (6,), (2, 3, 4, 6, 6)]
    )
    @pytest.mark.parametrize("name", ["a + b", "b + a"])
    def test_broadcast(self, name, shape):
        """Fused in the plan, and summed by torch when the shapes turn out to differ."""
        model = Summing(lambda a, b: F.relu(SUMS[name](a, b)))
        report = replace_and_compare(model, images(), torch.randn(shape))
        assert list(sums(report)) == ["conv"]

    def test_broadcast_of_the_layer(self):
        model = Summing(lambda a, b: F.avg_pool2d(F.relu(a + b), 2), kernel=6)
        model.conv.padding = (0, 0)
        replace_and_compare(model, images(), images())

    def test_in_place_sum_is_not_broadcast(self):
        model = Summing(in_place, kernel=6)
        model.conv.padding = (0, 0)
        fmkernels.replace(model)
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            model(images(), images())

    @pytest.mark.parametrize("name", ["a + b", "a += b"])
    @pytest.mark.parametrize("training", [True, False])
    def test_promotion(self, name, training):
        model = randomise(Summing(lambda a, b: F.relu(SUMS[name](a, b)))).train(training)
        theirs, x = copy.deepcopy(model), images()
        fmkernels.replace(model)
        for other in (images().double(), images().bfloat16(), images().long(), images() > 0):
            actual, expected = model(x, other), theirs(x, other)
            assert actual.dtype is expected.dtype
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    def test_numbers(self):
        model, x = randomise(Summing(operator.add)).eval(), images()
        theirs = copy.deepcopy(model)
        fmkernels.replace(model)
        for other in (2, 0.5, torch.tensor(3.0), torch.tensor(2)):
            torch.testing.assert_close(model(x, other), theirs(x, other), rtol=1e-5, atol=1e-5)
        with pytest.raises(TypeError):
            model(x, "one")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("training", [True, False])
    def test_autocast(self, training, dtype):
        model = randomise(Summing(lambda a, b: F.relu(a + b))).train(training)
        theirs, x, y = copy.deepcopy(model), images(), images().to(dtype)
        fmkernels.replace(model)
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = model(x, y), theirs(x, y)
        assert actual.dtype is expected.dtype
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=5e-2)

    @pytest.mark.parametrize("activation", [F.relu, lambda total: total])
    @pytest.mark.parametrize("training", [True, False])
    def test_output_is_not_the_residual(self, training, activation):
        model = Summing(lambda a, b: activation(a + b)).train(training)
        assert sums(fmkernels.replace(model))
        x, y = images(), images()
        before = y.clone()
        with torch.no_grad():
            output = model(x, y)
            output.zero_()
        assert torch.equal(y, before)
        assert output.data_ptr() != y.data_ptr()

    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("layouts", [(0, 0), (0, 1), (1, 0), (1, 1)])
    def test_layouts(self, layouts, kernel):
        formats = (torch.contiguous_format, torch.channels_last)
        x, y = (images(8).to(memory_format=formats[i]) for i in layouts)
        model = Summing(lambda a, b: F.relu(a + b), kernel=kernel).to(
            memory_format=formats[layouts[0]]
        )
        replace_and_compare(model, x, y)
        output = model.eval()(x.double(), y.double())
        assert output.is_contiguous(memory_format=formats[layouts[0]])

    def test_strided_residual(self):
        model = Summing(lambda a, b: F.relu(a + b))
        replace_and_compare(model, images(), images(12)[:, :, ::2, ::2])
        replace_and_compare(model, images(), torch.randn(1, 4, 6, 6).expand(3, -1, -1, -1))

    def test_unbatched_and_empty(self):
        model = randomise(Summing(lambda a, b: F.relu(in_place(a, b)))).eval()
        model.bn = nn.Identity()
        theirs = copy.deepcopy(model)
        assert sums(fmkernels.replace(model)) == {"conv": "Conv2d + add + relu"}
        for x in (images()[0], images()[:0]):
            for y in (x, x[..., :1, :]):
                torch.testing.assert_close(model(x, y), theirs(x, y), rtol=1e-5, atol=1e-5)

    def test_without_norm(self):
        for bias in (True, False):
            model = Summing(lambda a, b: F.gelu(a + b))
            model.conv, model.bn = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.Identity()
            replace_and_compare(
                model, images(), images(), expected={"conv": "Conv2d + add + gelu"}
            )
            assert type(model.conv) is FusedConv2d

    def test_linear(self):
        class Feed(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Linear(4, 7), nn.Linear(7, 4)

            def forward(self, x, y):
                return torch.tanh(y + self.down(F.relu(self.up(x))))

        model = Feed()
        for y in (torch.randn(5, 3, 4), torch.randn(4), torch.randn(2, 1, 1, 4)):
            expected = {"down": "Linear + add + tanh"}
            replace_and_compare(copy.deepcopy(model), torch.randn(5, 3, 4), y, expected=expected)
        fmkernels.replace(model)
        assert type(model.down) is FusedLinear

    def test_computed_weight(self):
        """Of torch.nn.utils.parametrizations: neither norm nor sum is fused, and all works."""
        model = Summing(lambda a, b: F.relu(a + b))
        model.conv = nn.utils.parametrizations.weight_norm(model.conv)
        replace_and_compare(model, images(), images(), expected={})

    def test_batch_norm_of_another_dtype(self):
        model = Summing(lambda a, b: F.relu(a + b)).bfloat16()
        model.bn.float()
        assert sums(fmkernels.replace(model)) == {}


class TestBranches:
    def test_residual_networks(self):
        for block in (BasicBlock(), BasicBlock(4, 6, 2), Bottleneck(), Bottleneck(4, 4)):
            report = replace_and_compare(block, images())
            assert list(sums(report).values()) == [WHOLE]
        replace_and_compare(ResNet(), images(channels=3), expected=RESNET)

    def test_pre_activation(self):
        expected = {"conv2": "Conv2d + add"}
        replace_and_compare(PreActivation(), images(), expected=expected)
        replace_and_compare(
            nn.Sequential(PreActivation(), PreActivation()),
            images(),
            expected={"0.conv2": "Conv2d + add", "1.conv2": "Conv2d + add"},
        )

    def test_of_two_convolutions_the_larger_kernel_takes_the_sum(self):
        class Two(nn.Module):
            def __init__(self, call):
                super().__init__()
                self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
                self.call = call

            def forward(self, x):
                return self.call(self.one(x), self.three(x))

        for call in (operator.add, SUMS["b + a"]):
            replace_and_compare(Two(call), images(), expected={"three": "Conv2d + add"})

    def test_the_written_operand_takes_the_sum(self):
        class Into(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

            def forward(self, x):
                out = self.one(x)
                out += self.three(x)
                return out

        replace_and_compare(Into(), images(), expected={"one": "Conv2d + add"})

    def test_writing_into_a_parameter_or_an_input_stays(self):
        class Into(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(4, 4, 1)
                self.register_buffer("total", torch.zeros(3, 4, 6, 6))

            def forward(self, x):
                self.total += self.conv(x).detach()
                return self.total * x

        report = fmkernels.replace(model := Into())
        assert sums(report) == {}
        x = images()
        expected = F.conv2d(x, model.conv.weight, model.conv.bias)
        torch.testing.assert_close(model(x) / x, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.total, expected, rtol=1e-4, atol=1e-4)

    def test_three_levels(self):
        class Conv(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = conv_norm(4, 4)
                self.act = nn.Identity()

            def forward(self, residual):
                return self.act(self.norm(self.conv(residual)))

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Sequential(
                    nn.Conv2d(4, 4, 1), nn.Sequential(Conv(), nn.Identity()), nn.Identity()
                )

            def forward(self, x):
                return F.relu(x + self.body(x))

        model = Outer()
        path = "body.1.0.conv"
        expected = {path: "Conv2d + BatchNorm2d + add + relu"}
        replace_and_compare(model, images(), expected=expected)
        # Called by somebody else, the modules inside return what they did.
        x = images().double()
        model.eval()
        theirs = Outer().double().eval()
        theirs.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.body(x), theirs.body(x))
        torch.testing.assert_close(model.body[1](x), theirs.body[1](x))
        torch.testing.assert_close(model.body[1][0](x), theirs.body[1][0](x))

    def test_body_that_ends_in_something_else(self):
        for last in (nn.ReLU(), nn.AvgPool2d(1), PreActivation(), nn.Conv2d(4, 4, 1)):
            model = SummingBody(lambda a, b: F.relu(a + b))
            model.body.append(last)
            expected = {"body.2": "Conv2d + add + relu"} if isinstance(last, nn.Conv2d) else {}
            if isinstance(last, PreActivation):
                expected = {"body.2.conv2": "Conv2d + add"}
            replace_and_compare(model, images(), images(), expected=expected)

    @pytest.mark.parametrize("where", ["body", "body.1", "body.2", "conv", "bn", "same"])
    def test_hooks(self, where):
        model = SummingBody(lambda a, b: F.relu(a + b)) if "body" in where else Same()
        if "body" in where:
            model.body.append(nn.Identity())
        seen = []
        model.get_submodule(where).register_forward_hook(lambda m, args, out: seen.append(out))
        report = replace_and_compare(model, images(), images())
        assert sums(report) == {}
        for ours, theirs in zip(seen[::2], seen[1::2], strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_identities_are_passed_over(self):
        expected = {"conv": "Conv2d + BatchNorm2d + add + relu"}
        replace_and_compare(Same(), images(), images(), expected=expected)

    def test_body_in_two_places_or_called_twice(self):
        model = SummingBody(lambda a, b: F.relu(a + b))
        both = nn.ModuleDict({"a": model, "b": SummingBody(operator.add)})
        both.b.body = model.body
        assert sums(fmkernels.replace(both)) == {}

        class Twice(SummingBody):
            def forward(self, x, y):
                return F.relu(self.body(self.body(x)) + y)

        replace_and_compare(Twice(None), images(), images(), expected={})

    def test_scripted(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = torch.jit.script(nn.Sequential(*conv_norm(4, 4)))

            def forward(self, x, y):
                return F.relu(self.body(x) + y)

        assert sums(fmkernels.replace(Outer())) == {}


class Ordered(nn.Module):
    """The residual is computed between the convolution and the sum."""

    def __init__(self, body, shortcut, first):
        super().__init__()
        # Copies: pytest gives the same modules to several tests.
        self.body, self.shortcut = copy.deepcopy(body), copy.deepcopy(shortcut)
        self.first = first

    def forward(self, x):
        out = self.body(x)
        if self.first is not None:
            x = self.first(x)
        identity = self.shortcut(x)
        out += identity
        return F.relu(out)


class Doubling(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def body(*first):
    return nn.Sequential(*first, *conv_norm(4, 4))


class TestOrder:
    @pytest.mark.parametrize("shortcut", [
        nn.Identity(), nn.Sequential(), nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(4, 4, 1)),
    ])  # fmt: skip
    @pytest.mark.parametrize("first", [None, F.sigmoid, lambda x: x[:, :], lambda x: x + 1])
    def test_later_than_what_changes_nothing(self, shortcut, first):
        model = Ordered(body(), shortcut, first)
        report = replace_and_compare(model, images())
        assert list(sums(report)) == ["body.0"]

    @pytest.mark.parametrize(
        ("layers", "shortcut", "first"),
        [
            (body(), nn.Identity(), lambda x: x.relu_()),
            (body(), nn.Identity(), lambda x: F.relu(x, True)),
            (body(), nn.Identity(), lambda x: F.relu(x, inplace=True)),
            (body(), nn.Identity(), lambda x: in_place(x, 1)),
            (body(), nn.Identity(), lambda x: torch.sigmoid_(x)),
            (body(), nn.ReLU(inplace=True), None),
            (body(), nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), None),
            (body(), Doubling(), None),
            (body(), nn.Dropout(), None),
            (body(nn.ReLU(inplace=True)), nn.Identity(), None),
            (body(nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))), nn.Identity(), None),
            (body(Doubling()), nn.Identity(), None),
        ],
    )
    def test_not_later_than_what_may_matter(self, layers, shortcut, first):
        """Else the layer would see what was written after it ran.

        Without gradients, which torch refuses too where an operand of a product was overwritten.
        """
        model, x = randomise(Ordered(layers, shortcut, first)).eval(), images()
        theirs = copy.deepcopy(model)
        assert sums(fmkernels.replace(model)) == {}
        with torch.no_grad():
            actual, expected = model(x.clone()), theirs(x.clone())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    def test_body_that_writes_into_the_residual(self):
        """With nothing in between it runs at the same time as before."""

        class Writing(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = body(nn.ReLU(inplace=True))

            def forward(self, x):
                return x + self.body(x)

        expected = {"body.1": "Conv2d + BatchNorm2d + add"}
        replace_and_compare(Writing(), images(), expected=expected)


class OptionalArgument(BasicBlock):
    def forward(self, x, scale=None):
        return F.relu(self.bn2(self.conv2(x)) + x)


class DifferentInTraining(BasicBlock):
    def forward(self, x):
        out = self.bn2(self.conv2(x))
        return F.relu(out + x) if self.training else F.relu(out)


class InHelper(BasicBlock):
    def residual(self, x):
        return F.relu(self.bn2(self.conv2(x)) + x)

    def forward(self, x):
        return self.residual(x) * 2


class Star(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_norm(4, 4)

    def forward(self, *xs):
        return self.bn(self.conv(xs[0]))


class InnerStar(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Star()

    def forward(self, x):
        return F.relu(self.inner(x) + x)


class TestForwards:
    @pytest.mark.parametrize(
        ("build", "reason"),
        [
            (OptionalArgument, "not fused with add in the model: its forward has optional"),
            (DifferentInTraining, "differs between training and evaluation"),
            (InHelper, ""),
            (InnerStar, ""),
        ],
    )
    def test_not_rewritten(self, build, reason):
        model = build()
        report = replace_and_compare(model, images(), expected={})
        assert any(reason in row.reason for row in report.rows)
        assert type(model) is build

    @pytest.mark.parametrize("build", [Summing, SummingBody])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_none_is_no_residual_to_leave_out(self, frozen, build):
        """As the sum itself would, the layer refuses it."""
        model = build(lambda a, b: F.relu(a + b)).eval()
        report = fmkernels.replace(model, freeze=frozen)
        assert sums(report)
        with torch.no_grad(), pytest.raises(TypeError, match="NoneType"):
            model(images(), None)

    def test_changed_sequential_raises(self):
        model = SummingBody(lambda a, b: F.relu(a + b)).eval()
        report = fmkernels.replace(model)
        model.body.append(nn.Sigmoid())
        model.body(images())
        with pytest.raises(RuntimeError, match="had the members 0, 1 when .* has changed since"):
            model(images(), images())
        report.undo()
        model(images(), images())

    def test_undo(self):
        model, x = randomise(ResNet()).eval(), images(channels=3)
        modules = list(model.named_modules())
        kinds = [type(m) for _, m in modules]
        expected = model(x)
        report = fmkernels.replace(model)
        assert sums(report) == RESNET
        assert type(model.layers[3].act) is FusedAway
        report.undo()
        assert list(model.named_modules()) == modules
        assert [type(m) for _, m in modules] == kinds
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_copies(self, way):
        model, x = randomise(ResNet()), images(channels=3)
        fmkernels.replace(model)
        if way == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
        assert copied.layers[3].body[6].norm is copied.layers[3].body[7]
        for training in (True, False):
            expected = outcome(model.train(training), x)
            assert_same(outcome(copied.train(training), x), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        torch.testing.assert_close(copied(x), expected["output 0"])

    def test_state_dict_both_ways(self):
        model, theirs, x = ResNet(), randomise(ResNet()).eval(), images(channels=3)
        fmkernels.replace(model)
        model.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(model.eval()(x), theirs(x), rtol=1e-4, atol=1e-5)
        fresh = ResNet().eval()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(fresh(x), theirs(x))

    def test_frozen(self):
        model, x = randomise(ResNet()).eval(), images(channels=3)
        theirs = copy.deepcopy(model)
        report = fmkernels.replace(model, freeze=True, example_inputs=x)
        assert sums(report) == RESNET
        assert all(row.error < 1e-5 for row in report.rows)
        for _ in range(2):
            torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
            with torch.no_grad():  # a change is noticed
                for trained in (model, theirs):
                    trained.layers[0].bn2.weight.mul_(2)
                    trained.layers[3].body[6].weight.add_(0.1)

    def test_wrong_residual_shows_in_the_errors(self, monkeypatch):
        right = FusedConv2d.forward
        monkeypatch.setattr(
            FusedConv2d,
            "forward",
            lambda self, x, y=None: right(self, x, None if y is None else y * 1.1),
        )
        report = fmkernels.replace(randomise(BasicBlock()), example_inputs=images())
        rows = {row.path: row for row in report.rows}
        assert rows["conv1"].error < 1e-6
        assert rows["conv2"].error > 1e-3
        assert report.error > 1e-3

    def test_frozen_batch_norm_in_training(self):
        model, x = randomise(ResNet()).double(), images(channels=3).double()
        theirs = copy.deepcopy(model)
        fmkernels.replace(model)
        for m in (model, theirs):
            for norm in m.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.eval()
        assert_same(outcome(model, x), outcome(theirs, x))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("build", [
        lambda: BasicBlock(4, 6, 2),
        lambda: Bottleneck(4, 4),
        PreActivation,
    ])  # fmt: skip
    def test_compile(self, build, training):
        torch.compiler.reset()
        model, x = randomise(build()).train(training), images()
        assert sums(fmkernels.replace(model))
        expected = outcome(copy.deepcopy(model), x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(outcome(compiled, x), expected, 1e-4, 1e-5)

    def test_compiled_broadcast(self):
        torch.compiler.reset()
        model, x = randomise(Summing(lambda a, b: F.relu(a + b))).eval(), images()
        fmkernels.replace(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for y in (images(), images()[:, :, :1], images().double()):
            torch.testing.assert_close(compiled(x, y), model(x, y))

    def test_replaced_twice_and_traced(self):
        model, x = randomise(ResNet()).eval(), images(channels=3)
        fmkernels.replace(model)
        expected = model(x)
        assert fused(fmkernels.replace(model)) == {}
        assert torch.equal(model(x), expected)

    def test_five_training_steps(self):
        model, x, labels = randomise(ResNet()), images(channels=3, batch=8), torch.arange(8) % 5
        theirs = copy.deepcopy(model)
        fmkernels.replace(model)
        losses = []
        for trainee in (theirs, model):
            optimizer = torch.optim.SGD(trainee.parameters(), lr=0.05, momentum=0.9)
            losses.append([])
            for _ in range(5):
                loss = F.cross_entropy(trainee(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def distance(results, exact):
    """Of the outputs, and of all gradients together: single ones may be sums that cancel."""
    outputs = [name for name in exact if name.startswith("output")]
    grads = [name for name in exact if name.endswith(".grad")]
    return [
        float(
            sum((results[n].double() - exact[n]).square().sum() for n in names).sqrt()
            / sum(exact[n].square().sum() for n in names).sqrt()
        )
        for names in (outputs, grads)
    ]


class TestAgainstFloat64:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("channels", [8, 32])
    def test_float32(self, channels, training, channels_last):
        """Twice as far from float64 as torch, and Winograd's 1e-5, at most."""
        model = nn.Sequential(
            BasicBlock(channels, channels), Bottleneck(channels, channels, 1),
            PreActivation(channels), BasicBlock(channels, 2 * channels, 2),
        )  # fmt: skip
        x = images(12, 4, channels)
        if channels_last:
            x, model = (t.to(memory_format=torch.channels_last) for t in (x, model))
        model = randomise(model).train(training)
        exact = outcome(copy.deepcopy(model).double(), x.double())
        theirs = outcome(copy.deepcopy(model), x)
        assert len(sums(fmkernels.replace(model))) == 4
        pairs = zip(distance(outcome(model, x), exact), distance(theirs, exact), strict=True)
        for ours, of_torch in pairs:
            assert ours <= 2 * of_torch + 2e-5

    @pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
    def test_resnet_of_transformers(self, layer_type):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type=layer_type
        )

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = transformers.ResNetModel(config)

            def forward(self, x):
                return self.net(x)[0]

        report = replace_and_compare(Model(), torch.randn(2, 3, 32, 32))
        last = 1 if layer_type == "basic" else 2
        assert sums(report) == {
            f"net.encoder.stages.{stage}.layers.{i}.layer.{last}.convolution": WHOLE
            for stage, i in ((0, 0), (0, 1), (1, 0))
        }
