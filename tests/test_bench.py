"""The benchmark machinery: fair turns, right arithmetic, no speed for wrong numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import fmkernels
from fmkernels.bench import candidates, environment, numerics, peers, roofline, run, timer
from fmkernels.bench import workloads as workloads_module
from fmkernels.bench.results import Cell, Measurement, Results
from fmkernels.bench.workloads import Workload

CEILINGS = roofline.Ceilings(
    threads=2,
    peak_gflops={"fp32": 100.0, "bf16": 200.0},
    read_gbs=10.0,
    cache_bytes=1 << 20,
    source="a test",
)


class FakeTime:
    """A clock that only moves when something sleeps or is called."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.log.append("pause")
        self.now += seconds

    def candidate(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds

        return call

    def time(self, durations, **options):
        calls = {name: self.candidate(name, seconds) for name, seconds in durations.items()}
        options = {"clock": self.clock, "sleep": self.sleep, "pause_s": 0.5} | options
        return timer.time_interleaved(calls, **options)


# --- timer


def test_the_order_rotates_and_then_reverses():
    orders = ["".join(timer.turn_order(list("abc"), turn)) for turn in range(7)]
    assert orders == ["abc", "bca", "cab", "cba", "acb", "bac", "abc"]


def test_everyone_takes_every_place_and_follows_every_other():
    orders = [timer.turn_order(list("abc"), turn) for turn in range(6)]
    for place in range(3):
        assert {order[place] for order in orders} == set("abc")
    followers = {pair for order in orders for pair in zip(order, order[1:], strict=False)}
    assert followers == {(x, y) for x in "abc" for y in "abc" if x != y}


def test_each_burst_comes_after_a_pause_and_an_untimed_call():
    fake = FakeTime()
    fake.time({"a": 0.03, "b": 0.009}, burst_s=0.02, min_rounds=2, max_rounds=2)
    sizing = ["a"] * 3 + ["b"] * 3
    # One call of a fills the 20 ms burst, b needs three; each is preceded by one untimed call.
    burst_a, burst_b = ["pause", "a", "a"], ["pause", "b", "b", "b", "b"]
    assert fake.log == sizing + burst_a + burst_b + burst_b + burst_a


def test_times_are_per_call_and_exclude_pause_and_warm_up():
    timings = FakeTime().time({"slow": 0.25, "quick": 0.001}, budget_s=0.0)
    assert timings["slow"].median_s == pytest.approx(0.25)
    assert timings["quick"].median_s == pytest.approx(0.001)
    assert timings["quick"].calls_per_burst == 20
    assert len(timings["slow"].samples_s) == timer.MIN_ROUNDS


def test_rounds_fill_the_budget_between_their_bounds():
    def rounds(**options):
        return len(FakeTime().time({"a": 0.5}, pause_s=0.0, **options)["a"].samples_s)

    assert rounds(budget_s=10.0) == 10  # a burst of one call and its warm-up: 1 s a round
    assert rounds(budget_s=0.0, min_rounds=3) == 3
    assert rounds(budget_s=1e9, max_rounds=7) == 7


def test_one_disturbed_burst_moves_neither_median_nor_quartiles():
    fake = FakeTime()
    durations = iter([1.0] * 3 + [1.0, 1.0] * 6 + [1.0, 9.0] + [1.0, 1.0] * 10)

    def call():
        fake.now += next(durations)

    timing = timer.time_interleaved(
        {"a": call}, clock=fake.clock, sleep=fake.sleep, min_rounds=9, max_rounds=9
    )["a"]
    assert max(timing.samples_s) == 9.0
    assert (timing.median_s, timing.iqr_s) == (1.0, 0.0)


def test_contradicting_bounds_are_refused():
    with pytest.raises(ValueError, match="min_rounds"):
        timer.time_interleaved({"a": lambda: None}, min_rounds=5, max_rounds=4)


def test_nobody_to_time():
    assert timer.time_interleaved({}) == {}


# --- roofline


def test_the_roof_is_the_bandwidth_only_beyond_the_cache():
    flops, small, large = 10**6, 1 << 19, 1 << 21
    assert CEILINGS.roof_gflops("fp32", flops, small) == 100.0
    assert CEILINGS.roof_gflops("fp32", flops, large) == pytest.approx(10.0 * flops / large)
    assert CEILINGS.roof_gflops("bf16", 10**9, large) == 200.0


def test_probing_without_the_lab_says_so(monkeypatch):
    monkeypatch.setattr(roofline._native, "lab", lambda: None)
    monkeypatch.setattr(roofline, "_STREAM_BYTES", 1 << 20)
    ceilings = roofline.probe(threads=1, seconds=0.01)
    assert "torch.matmul" in ceilings.source
    assert ceilings.peak_gflops["fp32"] > 0
    assert ceilings.read_gbs > 0


def test_probing_with_the_lab_adds_up_the_threads(monkeypatch):
    class Lab:
        @staticmethod
        def peak_gflops(dtype, seconds):
            if dtype == "bf16":
                raise ValueError("no bf16 arithmetic")
            return 10.0

        @staticmethod
        def read_bandwidth_gbs(nbytes, seconds):
            return 3.0

    monkeypatch.setattr(roofline._native, "lab", lambda: Lab)
    ceilings = roofline.probe(threads=2, seconds=0.01)
    assert ceilings.peak_gflops == {"fp32": 20.0, "bf16": 20.0}
    assert ceilings.read_gbs == 6.0


# --- workloads


def test_names_are_unique_and_families_known():
    names = [workload.name for workload in workloads_module.WORKLOADS]
    assert len(set(names)) == len(names)
    assert {w.family for w in workloads_module.WORKLOADS} == set(workloads_module.FAMILIES)


def test_every_family_takes_part_in_a_quick_run():
    quick = workloads_module.select(quick=True)
    assert {workload.family for workload in quick} == set(workloads_module.FAMILIES)


def test_selection_by_family_and_name():
    chosen = workloads_module.select(("rnn", "linear"), match="LSTM t50")
    assert chosen
    assert all(w.family == "rnn" and "lstm T50" in w.name for w in chosen)
    with pytest.raises(ValueError, match="family"):
        workloads_module.select(("pooling",))
    with pytest.raises(ValueError, match="no workload"):
        workloads_module.select(("conv",), match="zzz")


def named(name):
    return next(w for w in workloads_module.WORKLOADS if w.name == name)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("conv-bn-relu-pool 32x64x56x56->64", 2 * 32 * 56 * 56 * 64 * 64 * 9),
        ("conv depthwise 8x128x56x56", 2 * 8 * 56 * 56 * 128 * 9),
        ("linear 512x512x512", 2 * 512**3),
        ("lstm T100 B64 H256", 2 * 100 * 64 * 4 * 256 * 512),
        ("lstm cell B32 H256", 2 * 32 * 4 * 256 * 512),
        ("sdpa 4x8x512x64", 4 * 4 * 8 * 512 * 512 * 64),
        ("sdpa causal 1x12x1024x64", 2 * 12 * 1024 * 1024 * 64),
        ("sdpa decode 8x32/8x1x128 of 2048 keys", 4 * 8 * 32 * 2048 * 128),
        (
            "encoder layer 8x128x512",
            8 * 128 * 512 * 2 * (4 * 512 + 2 * 2048) + 4 * 8 * 8 * 128 * 128 * 64,
        ),
    ],
)
def test_counted_operations_are_those_of_the_formula(name, flops):
    assert named(name).cost("fp32").flops == flops


def test_bytes_are_inputs_parameters_and_outputs():
    elements = 512 * 512 * 3 + 512
    assert named("linear 512x512x512").cost("fp32").bytes == 4 * elements
    assert named("linear 512x512x512").cost("bf16").bytes == 2 * elements


def test_a_training_step_costs_three_forwards():
    linear = named("linear 512x512x512")
    assert linear.cost("fp32", "training").flops == 3 * linear.cost("fp32").flops


def test_a_seed_fixes_inputs_and_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    (first, inputs), (second, again) = (named("linear 512x512x512").make("fp32") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(inputs[0], again[0])


@pytest.mark.parametrize("name", [w.name for w in workloads_module.select(("models",))])
def test_replace_reaches_into_the_reference_architectures(name):
    module, _ = named(name).make("fp32")
    assert fmkernels.replace(module).rows


# --- numerics


def test_an_error_within_twice_pytorchs_passes_and_beyond_fails():
    oracle = {"output 0": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    baseline = {"output 0": torch.tensor([1.0, 2.001])}
    near = {"output 0": torch.tensor([1.0, 2.0019])}
    far = {"output 0": torch.tensor([1.0, 2.0021])}
    assert numerics.check(near, [baseline], oracle, torch.float32).ok
    verdict = numerics.check(far, [baseline], oracle, torch.float32)
    assert not verdict.ok
    assert "output 0" in verdict.message


@pytest.mark.parametrize(
    ("computed", "said"),
    [
        ({}, "missing"),
        ({"output 0": torch.zeros(3)}, "not (2,)"),
        ({"output 0": torch.tensor([1.0, 2.0], dtype=torch.float64)}, "float64"),
        ({"output 0": torch.tensor([1.0, math.nan])}, "off by inf"),
    ],
)
def test_missing_misshapen_mistyped_and_nan_tensors_fail(computed, said):
    oracle = {"output 0": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    verdict = numerics.check(
        computed, [{"output 0": torch.tensor([1.0, 2.0])}], oracle, torch.float32
    )
    assert not verdict.ok
    assert said in verdict.message


def test_the_worst_tensor_is_named():
    oracle = {"a": torch.ones(4, dtype=torch.float64), "b": torch.ones(4, dtype=torch.float64)}
    exact = {"a": torch.ones(4), "b": torch.ones(4)}
    wrong = {"a": torch.ones(4), "b": torch.full((4,), 1.5)}
    assert numerics.check(wrong, [exact], oracle, torch.float32).worst == "b"


# --- results


def cell(times, **fields):
    made = Cell("w", "conv", "fp32", "inference", flops=10, bytes=10)
    for (candidate, layout), seconds in times.items():
        made.measurements.append(Measurement(candidate, layout, median_s=seconds, **fields))
    return made


def test_ratios_are_against_the_faster_layout_and_against_the_same():
    made = cell(
        {
            ("eager", "contiguous"): 6.0,
            ("eager", "channels_last"): 3.0,
            ("fmkernels", "contiguous"): 2.0,
            ("fmkernels", "channels_last"): 1.5,
        }
    )
    assert made.ratio == 2.0
    assert made.ratio_same_layout == 3.0


def test_a_candidate_without_a_time_has_no_ratio():
    made = cell({("eager", "contiguous"): 6.0, ("fmkernels", "contiguous"): None})
    assert made.ratio is None


def test_geometric_means_are_per_family_dtype_and_mode():
    one = cell({("eager", "contiguous"): 4.0, ("fmkernels", "contiguous"): 1.0})
    two = cell({("eager", "contiguous"): 1.0, ("fmkernels", "contiguous"): 1.0})
    other = dataclasses.replace(two, mode="training")
    means = Results({}, CEILINGS, [one, two, other]).geometric_means()
    assert [(m["mode"], m["workloads"], m["least"]) for m in means] == [
        ("inference", 2, 1.0),
        ("training", 1, 1.0),
    ]
    assert means[0]["ratio"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("load", "cpus", "warns"), [(None, 2, False), (0.4, 2, False), (0.6, 2, True), (1.9, 8, False)]
)
def test_a_busy_machine_is_pointed_out(load, cpus, warns):
    assert (environment.busy_warning(load, cpus) is not None) == warns


# --- a whole cell


def tiny(**options):
    defaults = {
        "name": "tiny linear",
        "family": "linear",
        "build": lambda: (nn.Linear(8, 4), (torch.randn(3, 8),)),
    }
    return Workload(**defaults | options)


@pytest.fixture
def quickly(monkeypatch):
    """Timing that costs next to nothing."""
    real = timer.time_interleaved

    def time_interleaved(calls, budget_s):
        return real(calls, budget_s=0, pause_s=0, burst_s=0, min_rounds=2, max_rounds=2)

    monkeypatch.setattr(timer, "time_interleaved", time_interleaved)


def by_candidate(measured):
    return {m.label: m for m in measured.measurements}


@pytest.mark.parametrize("mode", workloads_module.MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_cell_has_errors_times_and_shares_of_the_ceiling(quickly, dtype, mode):
    measured = run.measure(tiny(), dtype, mode, run.Options(), CEILINGS)
    assert not measured.failed
    for measurement in by_candidate(measured).values():
        assert measurement.status == "ok", measurement.message
        assert 0 <= measurement.error <= measurement.allowed
        assert measurement.median_s > 0
        assert measurement.gflops == pytest.approx(measured.flops / measurement.median_s / 1e9)
        assert measurement.of_peak == pytest.approx(
            measurement.gflops / CEILINGS.peak_gflops[dtype]
        )
    assert by_candidate(measured)["fmkernels"].backend in ("cpu", "none")
    assert measured.ratio > 0


def test_both_layouts_of_a_convolution_take_part(quickly):
    conv = tiny(
        build=lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.randn(2, 3, 8, 8),)),
        layouts=("contiguous", "channels_last"),
    )
    measured = by_candidate(run.measure(conv, "fp32", "inference", run.Options(), CEILINGS))
    assert set(measured) == {
        "eager",
        "eager channels_last",
        "fmkernels",
        "fmkernels channels_last",
    }
    assert all(m.median_s for m in measured.values())


class OffByALittle(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x) * 1.001


def test_wrong_numbers_get_no_speed(quickly):
    measured = run.measure(
        tiny(substitute=OffByALittle), "fp32", "inference", run.Options(), CEILINGS
    )
    ours = by_candidate(measured)["fmkernels"]
    assert ours.status == "wrong"
    assert "output 0 is off by" in ours.message
    assert (ours.median_s, ours.gflops, measured.ratio) == (None, None, None)
    assert measured.failed
    assert by_candidate(measured)["eager"].median_s is not None


class WrongGradient(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.weight, self.bias = module.weight, module.bias

    def forward(self, x):
        output = nn.functional.linear(x, self.weight, self.bias)
        return output + (output * 0.01 - output.detach() * 0.01)


def test_a_wrong_gradient_gets_no_training_speed(quickly):
    workload = tiny(substitute=WrongGradient)
    options = run.Options()
    training = run.measure(workload, "fp32", "training", options, CEILINGS)
    assert by_candidate(training)["fmkernels"].status == "wrong"
    assert "grad" in by_candidate(training)["fmkernels"].message
    assert not run.measure(workload, "fp32", "inference", options, CEILINGS).failed


def test_a_raising_candidate_does_not_end_the_run(quickly):
    def refuse(module):
        raise RuntimeError("no such kernel")

    measured = run.measure(tiny(substitute=refuse), "fp32", "inference", run.Options(), CEILINGS)
    ours = by_candidate(measured)["fmkernels"]
    assert (ours.status, measured.failed) == ("error", True)
    assert "no such kernel" in ours.message


def test_a_missing_peer_is_named_and_is_no_failure(quickly, monkeypatch):
    def absent(problem):
        raise peers.PeerUnavailable("onnxruntime is not installed")

    monkeypatch.setitem(peers.PEERS, "onnxruntime", absent)
    options = run.Options(peers=("onnxruntime",))
    measured = run.measure(tiny(), "fp32", "inference", options, CEILINGS)
    peer = by_candidate(measured)["onnxruntime"]
    assert (peer.status, peer.message) == ("unavailable", "onnxruntime is not installed")
    assert not measured.failed


def test_peers_without_training_say_so():
    problem = candidates.Problem.build(tiny(), "fp32", "training")
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(peers.PeerUnavailable, match="inference only"):
            peers.PEERS[name](problem)


def test_a_package_that_does_not_import_is_not_installed():
    with pytest.raises(peers.PeerUnavailable, match="no_such_package is not installed"):
        peers._need("no_such_package")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_installed_peers_agree_with_pytorch(quickly, name):
    pytest.importorskip(name)
    if name == "onnxruntime":
        pytest.importorskip("onnxscript")
    options = run.Options(peers=(name,))
    measured = run.measure(tiny(), "fp32", "inference", options, CEILINGS)
    peer = by_candidate(measured)[name]
    assert peer.status == "ok", peer.message


def test_the_oracle_sees_the_rounded_values():
    problem = candidates.Problem.build(tiny(), "bf16", "inference")
    expected = nn.functional.linear(
        problem.inputs[0].double(), problem.module.weight.double(), problem.module.bias.double()
    )
    assert torch.equal(problem.oracle()["output 0"], expected)


def test_planned_cells_are_those_a_workload_offers():
    both, inference = tiny(), tiny(name="i", modes=("inference",), dtypes=("fp32",))
    planned = run.planned([both, inference], run.Options(dtypes=("fp32", "bf16")))
    assert [(w.name, dtype, mode) for w, dtype, mode in planned] == [
        ("tiny linear", "fp32", "inference"),
        ("tiny linear", "fp32", "training"),
        ("tiny linear", "bf16", "inference"),
        ("tiny linear", "bf16", "training"),
        ("i", "fp32", "inference"),
    ]


def test_a_unit_that_crosses_a_corner_is_forgiven_in_gradients_alone():
    exact = torch.ones(1000, 1000, dtype=torch.float64)
    crossed = exact.float()
    crossed[3, 4] = 0.0  # one of a million
    for name, corners, ok in (
        ("grad input 0", True, True),
        ("grad input 0", False, False),
        ("output 0", True, False),
    ):
        verdict = numerics.check(
            {name: crossed}, [{name: exact.float()}], {name: exact}, torch.float32, corners=corners
        )
        assert verdict.ok == ok, (name, corners)


def test_a_wrong_gradient_fails_with_corners_too():
    exact = {"grad weight": torch.randn(64, 64, dtype=torch.float64)}
    right = {"grad weight": exact["grad weight"].float()}
    wrong = {"grad weight": right["grad weight"] * 1.01}
    assert not numerics.check(wrong, [right], exact, torch.float32, corners=True).ok
