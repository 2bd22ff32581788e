"""The recurrent family's Triton kernels in Triton's interpreter.

Beside what the family's own tests run on every backend: both plans for the same layer, launches.
"""

from __future__ import annotations

import copy

import pytest
import torch

from fmkernels import testing
from fmkernels.ops._triton.support import INTERPRETING
from fmkernels.ops.rnn import reference
from fmkernels.ops.rnn.schema import PLAIN_LSTM

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1"),
]
if INTERPRETING:
    from fmkernels.ops._triton.launch import config, observed_launches
    from fmkernels.ops.rnn import triton as kernels
    from fmkernels.ops.rnn import triton_configs as configs

STEPS, FEATURES = 4, 5
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=testing.dtype_name)
plans = pytest.mark.parametrize("plan", ["sequence", "steps"])

VARIANTS = {
    "plain": {},
    "no_biases": {"has_biases": False},
    "activations": {"activation": "relu", "recurrent_activation": "hard_sigmoid"},
    "identity": {"activation": "identity", "recurrent_activation": "tanh"},
    "peephole": {"peephole": True},
    "zoneout": {"zoneout": 0.2, "peephole": True},
    "zoneout_masks": {"zoneout": 0.2, "zone_masks": True, "peephole": True},
    "recurrent_mask": {"recurrent_mask": True},
    "projection": {"projected": 3},
    "layer_norm": {"layer_norm": True},
    "layer_norm_no_biases": {"layer_norm": True, "has_biases": False},
    "everything": {
        "layer_norm": True, "peephole": True, "projected": 3, "zoneout": 0.2, "zone_masks": True,
        "activation": "sigmoid",
    },
}  # fmt: skip


@pytest.fixture
def plan_of(monkeypatch):
    """Makes every layer run by one plan, in tiles that do not divide it."""

    def choose(plan):
        tile = config(4, 1, BLOCK_B=16, BLOCK_U=16, BLOCK_K=16)
        steps = dict.fromkeys(configs.STEP_FORWARD["interpret"], tile)
        for table in (configs.STEP_FORWARD, configs.STEP_BACKWARD):
            monkeypatch.setitem(table, "interpret", steps)
        for table in configs.SEQUENCE.values():
            sizes = table["interpret"] if plan == "sequence" else {}
            monkeypatch.setitem(table, "interpret", sizes)

    return choose


class Layer:
    """Operands of one layer of a kind, and its results and gradients by either implementation."""

    def __init__(
        self, kind, dtype, *, batch=3, hidden=7, projected=0, directions=2, steps=STEPS,
        batch_first=False, lengths=None, zone_masks=False, recurrent_mask=False, cells=False,
        nonlinearity="tanh", **options,
    ):  # fmt: skip
        self.kind, self.dtype, self.batch_first, self.cells = kind, dtype, batch_first, cells
        self.options = PLAIN_LSTM._replace(**options)
        self.nonlinearity = nonlinearity
        gates, width = {"lstm": 4, "gru": 3, "rnn": 1}[kind], projected or hidden

        def draw(*shape, std=1.0):
            return testing.normal(*shape, dtype=dtype, std=std)

        leading = (batch, steps) if batch_first else (steps, batch)
        self.input = draw(*leading, FEATURES)
        self.h0, self.c0 = draw(directions, batch, width), draw(directions, batch, hidden)
        scale = hidden**-0.5
        self.weights = []
        for _ in range(directions):
            shapes = [(gates * hidden, FEATURES), (gates * hidden, width)]
            if self.options.has_biases:
                shapes += [(gates * hidden,)] * 2
            if projected:
                shapes.append((projected, hidden))
            if self.options.peephole:
                shapes.append((3, hidden))
            self.weights += [draw(*shape, std=scale) for shape in shapes]
            if self.options.layer_norm:
                shapes = [(4 * hidden,), (4 * hidden,), (hidden,)]
                self.weights += [1 + draw(*shape, std=0.1) for shape in shapes]
                if self.options.has_biases:
                    self.weights.append(draw(hidden, std=0.1))
        masks = [None, None, None]
        if recurrent_mask:
            masks[0] = (torch.rand(directions, batch, width) > 0.3).to(dtype) / 0.5
        if zone_masks:
            masks[1] = torch.rand(directions, steps, batch, width) < 0.3
            masks[2] = torch.rand(directions, steps, batch, hidden) < 0.3
        self.masks = (None if lengths is None else torch.tensor(lengths), *masks)
        self.grads = [draw(*leading, directions * width), draw(*self.h0.shape),
                      draw(*self.c0.shape), draw(*leading, directions * hidden)]  # fmt: skip

    def map(self, function):
        """A copy with ``function`` of every tensor."""

        def each(value):
            if isinstance(value, torch.Tensor):
                return function(value)
            return type(value)(map(each, value)) if type(value) in (list, tuple) else value

        copy = object.__new__(Layer)
        copy.__dict__ = {name: each(value) for name, value in self.__dict__.items()}
        return copy

    def results(self, module):
        """Results and every gradient by name."""
        input, h0, c0, weights = self.input, self.h0, self.c0, self.weights
        needs, first, biases = (True, True, True), self.batch_first, self.options.has_biases
        if self.kind == "lstm":
            given = (*self.masks, *self.options, first)
            output, h_n, c_n, cells, saved = module.lstm_forward(
                input, h0, c0, weights, None, *given, self.cells, True
            )
            grads = self.grads if self.cells else [*self.grads[:3], None]
            named = {"output": output, "h_n": h_n, "c_n": c_n, "cells": cells}
            *rest, by_weight = module.lstm_backward(
                *grads, input, h0, c0, weights, output, saved, *given, *needs
            )
        elif self.kind == "gru":
            output, h_n, gates = module.gru_forward(
                input, h0, weights, None, self.masks[0], biases, first, True
            )
            named = {"output": output, "h_n": h_n}
            *rest, by_weight = module.gru_backward(
                *self.grads[:2], input, h0, weights, output, gates, self.masks[0], biases, first,
                *needs,
            )  # fmt: skip
        else:
            output, h_n = module.rnn_forward(
                input, h0, weights, None, self.masks[0], self.nonlinearity, biases, first
            )
            named = {"output": output, "h_n": h_n}
            *rest, by_weight = module.rnn_backward(
                *self.grads[:2], input, h0, weights, output, self.masks[0], self.nonlinearity,
                biases, first, *needs,
            )  # fmt: skip
        named |= {f"grad_{name}": g for name, g in zip(("input", "h0", "c0"), rest, strict=False)}
        return named | {f"grad_weight_{i}": g for i, g in enumerate(by_weight)}


def doubled(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def check(layer):
    ours = layer.results(kernels)
    plain = layer.results(reference)
    exact = layer.map(doubled).results(reference)
    for name, wanted in exact.items():
        assert ours[name].shape == wanted.shape and ours[name].dtype == plain[name].dtype, name
        if wanted.numel() == 0:
            continue
        testing.assert_within_policy(name, ours[name], plain[name], wanted)


@dtypes
@plans
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "directions": 1, "has_biases": False},
        {"lengths": [4, 1, 2], "hidden": 20},
        {"batch": 17, "steps": 2},
    ],
    ids=["both_directions", "batch_first", "lengths", "two_tiles"],
)
def test_kinds(kind, options, plan, dtype, plan_of):
    plan_of(plan)
    check(Layer(kind, dtype, **options))


@plans
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_lengths_beyond_the_steps_are_cut_off(kind, plan, plan_of):
    """Nobody looks at lengths on a GPU before the kernel does."""
    plan_of(plan)
    layer = Layer(kind, torch.float32, batch=4, lengths=[2**32 + 1, -1, 2**31, 3])
    cut = copy.copy(layer)
    cut.masks = (torch.tensor([STEPS, 0, STEPS, 3]), *layer.masks[1:])
    expected = cut.results(kernels)
    for name, value in layer.results(kernels).items():
        assert torch.equal(value, expected[name]), name


@plans
def test_relu(plan, plan_of):
    plan_of(plan)
    check(Layer("rnn", torch.float32, nonlinearity="relu"))


@dtypes
@plans
@pytest.mark.parametrize("variant", VARIANTS)
def test_lstm_variants(variant, plan, dtype, plan_of):
    options = VARIANTS[variant]
    if dtype is torch.float16 and variant not in ("plain", "everything", "zoneout_masks"):
        pytest.skip("float32 runs it")
    if plan == "steps" and (options.get("layer_norm") or options.get("projected")):
        pytest.skip("the kernels of one step have neither layer norm nor projection")
    plan_of(plan)
    check(Layer("lstm", dtype, lengths=[4, 1, 3], cells=True, **options))


@dtypes
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_a_single_step_projects_its_input(kind, dtype):
    layer = Layer(kind, dtype, steps=1, directions=1)
    with observed_launches() as seen:
        layer.results(kernels)
    assert [launch.kernel for launch in seen] == [
        f"{kind}_step_fwd_kernel",
        f"{kind}_step_bwd_kernel",
    ]
    check(layer)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_one_launch_over_the_sequence(kind):
    with observed_launches() as seen:
        Layer(kind, torch.float32).results(kernels)
    assert len(seen) == 2
