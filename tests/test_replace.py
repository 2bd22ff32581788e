"""replace(): which layers change, that results and training do not, the report, undo."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fmkernels
from fmkernels import nn as fnn


def rows_of(report):
    return {row.path: row for row in report.rows}


def statuses(report):
    return {row.path: row.status for row in report.rows}


def modules_of(model):
    return [(name, m) for name, m in model.named_modules(remove_duplicate=False)]


def gradients(model, inputs, seed):
    torch.manual_seed(seed)
    output = model(inputs)
    model.zero_grad()
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


class Basic(nn.Module):
    """LSTM, attention, GRU and a kind of layer that has no counterpart."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.mix = nn.Bilinear(16, 16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        x, _ = self.gru(x)
        x = x + self.mix(x, x)
        return self.head(x[:, -1])


@pytest.fixture
def basic():
    return Basic(), torch.randn(2, 5, 6)


class TestLayers:
    def test_status_of_every_layer(self, basic):
        model, inputs = basic
        expected = model.eval()(inputs)
        report = fmkernels.replace(model)
        assert statuses(report) == {
            "lstm": "replaced",
            "attention": "replaced",
            "attention.out_proj": "replaced",
            "gru": "replaced",
            "mix": "kept",
            "head": "replaced",
        }
        assert [type(m) for m in (model.lstm, model.attention, model.gru, model.head)] == [
            fnn.LSTM,
            fnn.MultiheadAttention,
            fnn.GRU,
            fnn.Linear,
        ]
        assert rows_of(report)["mix"].reason == "fmkernels has no Bilinear layer"
        assert rows_of(report)["attention.out_proj"].reason == "part of attention"
        assert report.model is model
        torch.testing.assert_close(model(inputs), expected)

    @pytest.mark.parametrize(
        ("family", "changed"),
        [
            ("conv", []),
            ("rnn", ["lstm", "gru"]),
            ("attention", ["attention"]),
            ("linear", ["head"]),
        ],
    )
    def test_families(self, basic, family, changed):
        model, inputs = basic
        expected = model.eval()(inputs)
        report = fmkernels.replace(model, families=(family,))
        assert [row.path for row in report.rows if row.status == "replaced"] == changed
        ours = [name for name, m in model.named_children() if isinstance(m, _our_classes())]
        assert ours == changed
        torch.testing.assert_close(model(inputs), expected)

    @pytest.mark.parametrize("kind", ["Conv2d", "Conv1d", "Linear", "LSTM", "LSTMCell"])
    def test_model_that_is_a_layer(self, kind):
        arguments = {"Conv2d": (3, 4, 3), "Conv1d": (3, 4, 3)}.get(kind, (3, 4))
        shape = {"Conv2d": (1, 3, 5, 5), "Conv1d": (1, 3, 5), "LSTM": (2, 1, 3)}.get(kind, (2, 3))
        layer = getattr(nn, kind)(*arguments)
        inputs = torch.randn(shape)
        report = fmkernels.replace(layer, example_inputs=inputs)
        assert type(report.model) is getattr(fnn, kind)
        assert report.rows[0].path == ""
        assert report.error < 1e-6
        assert all(
            a is b for a, b in zip(report.model.parameters(), layer.parameters(), strict=True)
        )
        assert report.undo() is layer
        assert report.model is layer

    @pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_transformer_layers(self, kind, norm_first):
        layer = getattr(nn, kind)(16, 4, 32, batch_first=True, norm_first=norm_first)
        model = nn.ModuleDict({"layer": layer}).eval()
        inputs = [torch.randn(2, 5, 16) for _ in range(1 + ("Decoder" in kind))]
        expected = layer(*inputs)
        report = fmkernels.replace(model)
        assert type(model.layer) is getattr(fnn, kind)
        assert {"layer", "layer.self_attn", "layer.linear1"} <= set(statuses(report))
        assert set(statuses(report).values()) == {"replaced"}
        torch.testing.assert_close(model.layer(*inputs), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_transformer_with_a_padding_mask(self):
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 2).eval()
        inputs = torch.randn(2, 5, 16)
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with torch.no_grad():
            expected = model(inputs, src_key_padding_mask=mask)
            fmkernels.replace(model)
            actual = model(inputs, src_key_padding_mask=mask)
        torch.testing.assert_close(actual[~mask], expected[~mask], rtol=1e-4, atol=1e-5)

    def test_attention_inside_a_layer_that_is_kept(self):
        class Special(nn.TransformerEncoderLayer):
            def forward(self, src):
                return super().forward(src) * 2

        model = nn.Sequential(Special(16, 4, 32, batch_first=True)).eval()
        inputs = torch.randn(2, 5, 16)
        expected = model(inputs)
        report = fmkernels.replace(model)
        assert statuses(report)["0"] == "kept"
        assert statuses(report)["0.self_attn"] == "replaced"
        torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)

    def test_layers_already_replaced_are_left_alone(self, basic):
        model, inputs = basic
        fmkernels.replace(model)
        modules = modules_of(model)
        report = fmkernels.replace(model)
        assert modules_of(model) == modules
        assert rows_of(report)["lstm"].reason == "already an fmkernels layer"
        assert report.of("replaced") == []

    def test_module_in_two_places(self):
        shared = nn.Linear(4, 4)
        model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
        report = fmkernels.replace(model)
        assert type(model[0]) is fnn.Linear
        assert model[2][0] is model[0]
        assert rows_of(report)["2.0"].reason == "same module as 0"
        report.undo()
        assert model[0] is shared
        assert model[2][0] is shared

    def test_block_in_two_places(self):
        block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        model = nn.ModuleDict({"a": block, "b": block})
        report = fmkernels.replace(model)
        assert [row.status for row in report.rows] == ["fused", "fused"]
        assert model.a[0] is model.b[0]

    def test_attributes_set_from_outside_are_carried_over(self):
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].note = "mine"
        fmkernels.replace(model)
        assert model[0].note == "mine"

    def test_frozen_parameters_stay_frozen(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        fmkernels.replace(model)
        assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]

    def test_dtype_and_device_follow(self, basic):
        model, inputs = basic
        fmkernels.replace(model.double())
        model.eval()
        assert model(inputs.double()).dtype is torch.float64


def _our_classes():
    return tuple(kind for name in fnn.__all__ if isinstance(kind := getattr(fnn, name), type))


class ShiftedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class NamedConv(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 1)


class ConvWithHelper(nn.Conv2d):
    def norm_of_weight(self):
        return self.weight.norm()


def _pruned():
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


def _instance_forward():
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x * 2
    return layer


def _with_state_hook():
    layer = nn.Linear(3, 3)
    layer.register_state_dict_post_hook(lambda *args: None)
    return layer


def _lora():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.complex64))
    return layer


KEPT = {
    "overridden forward": (lambda: ShiftedConv(3, 3, 1), "class ShiftedConv defines forward"),
    "more methods": (lambda: ConvWithHelper(3, 3, 1), "ConvWithHelper defines norm_of_weight"),
    "instance forward": (_instance_forward, "forward is overridden on the instance"),
    "state_dict hook": (_with_state_hook, "state_dict hooks"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
        "its weight is computed by a parametrization",
    ),
    "spectral norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
        "computed before each call",
    ),
    "pruned": (_pruned, "computed before each call"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "not initialised yet"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), "its weight is on the meta device"),
    "complex": (_lora, "its weight is complex64"),
    "TorchScript": (lambda: torch.jit.script(nn.Linear(3, 3)), "TorchScript"),
    "quantization": (
        lambda: torch.ao.nn.qat.Linear(3, 3, qconfig=torch.ao.quantization.default_qconfig),
        "quantized",
    ),
    "bilinear": (lambda: nn.Bilinear(3, 3, 1), "no Bilinear layer"),
}


class TestKept:
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("case", KEPT)
    def test_kept_with_a_reason(self, case):
        build, reason = KEPT[case]
        layer = build()
        model = nn.ModuleList([layer])
        report = fmkernels.replace(model)
        (row,) = report.rows
        assert row.status == "kept"
        assert reason in row.reason
        assert row.new == row.old == type(layer).__name__
        assert row.backend == ""
        assert model[0] is layer

    def test_weight_norm_by_hook_is_kept_and_works(self):
        with pytest.warns(FutureWarning):
            layer = nn.utils.weight_norm(nn.Linear(3, 3))
        model = nn.Sequential(layer, nn.ReLU())
        report = fmkernels.replace(model)
        assert rows_of(report)["0"].status == "kept"
        assert model(torch.randn(2, 3)).shape == (2, 3)

    def test_subclass_that_only_has_a_constructor_is_replaced(self):
        model = nn.Sequential(NamedConv(3))
        inputs = torch.randn(1, 3, 4, 4)
        expected = model(inputs)
        report = fmkernels.replace(model)
        assert rows_of(report)["0"].status == "replaced"
        torch.testing.assert_close(model(inputs), expected)

    def test_part_of_an_attention_layer_that_is_special(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        layer.linear1.forward = lambda x: torch.zeros(*x.shape[:-1], 16)
        report = fmkernels.replace(nn.Sequential(layer))
        row = rows_of(report)["0"]
        assert (row.status, row.reason) == (
            "kept",
            "its linear1: its forward is overridden on the instance",
        )

    def test_strict(self, basic):
        model, _ = basic
        modules = modules_of(model)
        with pytest.raises(fmkernels.UnsupportedError) as error:
            fmkernels.replace(model, strict=True)
        assert "1 layer of Basic cannot be replaced" in str(error.value)
        assert "mix (Bilinear): fmkernels has no Bilinear layer" in str(error.value)
        assert modules_of(model) == modules

    def test_strict_minds_only_the_families_asked_for(self, basic):
        model, _ = basic
        fmkernels.replace(model, strict=True, families=["rnn", "attention"])
        fmkernels.replace(model, strict=True, families=["rnn", "attention"])

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
            ({"families": "conv"}, TypeError, "families must be a sequence of names"),
            ({"families": ("conv", "pool")}, ValueError, "families must be among .* got 'pool'"),
        ],
    )
    def test_bad_arguments(self, arguments, error, message):
        arguments = {"model": nn.Linear(2, 2), **arguments}
        with pytest.raises(error, match=message):
            fmkernels.replace(arguments.pop("model"), **arguments)


class TestHooks:
    def test_hooks_move_along_and_handles_still_work(self):
        model = nn.Sequential(nn.Linear(3, 3))
        seen = []
        handles = [
            model[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
            model[0].register_forward_hook(lambda m, args, out: seen.append(type(m)) or out * 2),
            model[0].register_full_backward_hook(lambda m, gi, go: seen.append("backward")),
        ]
        inputs = torch.randn(2, 3, requires_grad=True)
        expected = model(inputs)
        seen.clear()
        report = fmkernels.replace(model)
        output = model(inputs)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        assert seen == [fnn.Linear, "backward"]
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(model(inputs), F.linear(inputs, model[0].weight, model[0].bias))
        model[0].register_forward_hook(lambda m, args, out: out * 3)
        hooked = model(inputs)
        report.undo()
        torch.testing.assert_close(model(inputs), hooked)

    @pytest.mark.parametrize("hooked", [0, 1, 2, 3])
    def test_nothing_is_fused_across_a_hook(self, hooked):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        ).eval()
        seen = []
        model[hooked].register_forward_hook(lambda m, args, out: seen.append(out))
        inputs = torch.randn(1, 3, 8, 8)
        expected = model(inputs)
        fmkernels.replace(model)
        torch.testing.assert_close(model(inputs), expected)
        torch.testing.assert_close(seen[1], seen[0])


class TestReport:
    def test_table(self, basic):
        model, inputs = basic
        lines = str(fmkernels.replace(model, example_inputs=inputs)).splitlines()
        header = ["path", "status", "old", "new", "backend", "error", "reason"]
        assert lines[0].split() == header
        assert len(lines) == 2 + 6 + 1
        column = lines[0].index("reason")
        assert lines[2 + 4][column:] == "fmkernels has no Bilinear layer"
        assert lines[-1].startswith("Basic: 5 replaced, 0 fused, 1 kept; error of the whole model")

    def test_of_a_model_without_layers(self):
        report = fmkernels.replace(nn.Sequential(nn.ReLU()))
        assert str(report) == "Sequential: 0 replaced, 0 fused, 0 kept"

    def test_to_dict_is_json(self, basic):
        model, inputs = basic
        report = fmkernels.replace(model, example_inputs=inputs)
        loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert loaded["summary"] == {"replaced": 5, "fused": 0, "kept": 1}
        assert loaded["error"] == report.error
        assert loaded["rows"][0] == {
            "path": "lstm",
            "status": "replaced",
            "old": "LSTM",
            "new": "LSTM",
            "backend": report.rows[0].backend,
            "reason": "",
            "error": report.rows[0].error,
        }

    def test_backend_is_what_a_call_chooses(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        report = fmkernels.replace(model)
        with torch.no_grad():
            model(torch.randn(1, 3, 4, 4))
        decisions = {d.op: d.chosen for d in fmkernels.last_decisions()[-2:]}
        rows = rows_of(report)
        assert rows["0"].backend == decisions["conv2d"]
        assert rows["3"].backend == decisions["linear"]

    def test_errors_without_example_inputs(self, basic):
        report = fmkernels.replace(basic[0])
        assert report.error is None
        assert all(row.error is None for row in report.rows)

    @pytest.mark.parametrize("given", ["tensor", "tuple", "dict"])
    def test_errors(self, basic, given):
        model, inputs = basic
        given = {"tensor": inputs, "tuple": (inputs,), "dict": {"x": inputs}}[given]
        report = fmkernels.replace(model, example_inputs=given)
        rows = rows_of(report)
        for path in ("lstm", "attention", "gru", "head"):
            assert 0 <= rows[path].error < 1e-5
        assert rows["mix"].error is None
        assert report.error < 1e-5

    def test_a_wrong_layer_shows(self, monkeypatch):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        right = fnn.Linear.forward
        monkeypatch.setattr(fnn.Linear, "forward", lambda self, x: right(self, x) * 1.01)
        report = fmkernels.replace(model, example_inputs=torch.randn(3, 4))
        assert report.rows[0].error == pytest.approx(0.01, rel=1e-3)
        assert report.error > 0.005

    def test_a_nan_shows(self, monkeypatch):
        model = nn.Sequential(nn.Linear(4, 4))
        monkeypatch.setattr(fnn.Linear, "forward", lambda self, x: x * float("nan"))
        report = fmkernels.replace(model, example_inputs=torch.randn(3, 4))
        assert report.error == float("inf")
        assert report.to_dict()["error"] == "inf"

    def test_measuring_leaves_no_trace(self):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Flatten(),
        )
        model[3].eval()
        inputs = torch.randn(2, 3, 6, 6)
        state = copy.deepcopy(model.state_dict())
        kept_inputs, random_state = inputs.clone(), torch.get_rng_state()
        fmkernels.replace(model, example_inputs=inputs)
        assert [m.training for m in model] == [True, True, True, False, True]
        assert torch.equal(torch.get_rng_state(), random_state)
        assert torch.equal(inputs, kept_inputs)
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert not any(m._forward_hooks for m in model.modules())

    def test_random_models_draw_the_same_numbers_both_times(self):
        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(3, 3)

            def forward(self, x):
                return self.linear(x + torch.randn_like(x)) * random.random()

        model = Noisy()
        states = torch.get_rng_state(), random.getstate()
        report = fmkernels.replace(model, example_inputs=torch.ones(2, 3))
        assert report.error < 1e-6
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]

    def test_model_that_fails_on_the_inputs_is_untouched(self, basic):
        model, _ = basic
        modules = modules_of(model)
        with pytest.raises(RuntimeError):
            fmkernels.replace(model, example_inputs=torch.randn(2, 5, 7))
        assert modules_of(model) == modules

    def test_layer_that_fails_is_undone(self, monkeypatch):
        model = nn.Sequential(nn.Linear(4, 4))
        modules = modules_of(model)
        right = fnn.Linear.forward

        def fails_on_batches(self, x):
            if len(x) > 1:
                raise ArithmeticError("broken")
            return right(self, x)

        monkeypatch.setattr(fnn.Linear, "forward", fails_on_batches)
        with pytest.raises(ArithmeticError):
            fmkernels.replace(model, example_inputs=torch.randn(3, 4))
        assert modules_of(model) == modules


class TestUndo:
    def test_the_original_objects_return(self, basic):
        model, inputs = basic
        expected = model.eval()(inputs)
        modules = modules_of(model)
        report = fmkernels.replace(model)
        assert modules_of(model) != modules
        assert report.undo() is model
        assert modules_of(model) == modules
        assert torch.equal(model(inputs), expected)
        assert str(report).endswith("undone")

    def test_works_once(self, basic):
        report = fmkernels.replace(basic[0])
        report.undo()
        with pytest.raises(RuntimeError, match="undone already"):
            report.undo()

    def test_what_happened_in_between_is_kept(self, basic):
        model, inputs = basic
        report = fmkernels.replace(model)
        model.eval()
        model.load_state_dict(
            {name: value * 0.5 for name, value in model.state_dict().items()}, assign=True
        )
        model.head.register_parameter("extra", nn.Parameter(torch.ones(1)))
        model.double()
        expected = model(inputs.double())
        parameters = dict(model.named_parameters())
        report.undo()
        assert type(model.head) is nn.Linear
        assert not model.lstm.training
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert "head.extra" in parameters
        torch.testing.assert_close(model(inputs.double()), expected)

    def test_foreign_assignments_stay(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        first = model[0]
        report = fmkernels.replace(model)
        model[1] = foreign = nn.Identity()
        report.undo()
        assert model[0] is first
        assert model[1] is foreign

    def test_after_freezing(self):
        model = nn.Sequential(nn.Linear(2, 2))
        keys = list(model.state_dict())
        report = fmkernels.replace(model, freeze=True)
        report.undo()
        assert list(model.state_dict()) == keys
        assert list(dict(model.named_buffers())) == []

    def test_patched(self, basic):
        model, inputs = basic
        modules = modules_of(model)
        with fmkernels.patched(model, families=("linear",)) as report:
            assert type(model.head) is fnn.Linear
            assert type(model.lstm) is nn.LSTM
        assert modules_of(model) == modules
        assert report.undone
        with pytest.raises(ZeroDivisionError), fmkernels.patched(model):
            raise ZeroDivisionError
        assert modules_of(model) == modules
        with fmkernels.patched(model) as report:
            report.undo()
        assert modules_of(model) == modules

    def test_patched_layer(self):
        layer = nn.Linear(2, 2)
        with fmkernels.patched(layer) as report:
            assert type(report.model) is fnn.Linear
        assert report.model is layer


class TestWholeModels:
    def test_training_steps_match(self, basic):
        model, inputs = basic
        theirs = copy.deepcopy(model)
        fmkernels.replace(model)
        target = torch.randn(2, 4)
        losses = []
        for trainee in (theirs, model):
            optimizer = torch.optim.SGD(trainee.parameters(), lr=0.1, momentum=0.9)
            losses.append([])
            for _ in range(5):
                loss = F.mse_loss(trainee(inputs), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        assert losses[0][-1] < losses[0][0]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    def test_an_optimizer_made_before_goes_on_working(self):
        model = nn.Sequential(nn.Linear(3, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        fmkernels.replace(model)
        before = model[0].weight.detach().clone()
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        assert not torch.equal(model[0].weight, before)

    def test_state_dict_is_unchanged(self, basic):
        model, _ = basic
        state = model.state_dict()
        fmkernels.replace(model)
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], state[name]) for name in state)
        Basic().load_state_dict(after)
        model.load_state_dict(Basic().state_dict())

    def test_deepcopy_is_independent(self, basic):
        model, inputs = basic
        fmkernels.replace(model)
        model.eval()
        copied = copy.deepcopy(model)
        expected = copied(inputs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        torch.testing.assert_close(copied(inputs), expected)
