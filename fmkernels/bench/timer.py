"""Fair timing of several candidates in one process.

Timing one candidate after the other is unfair on a CPU: the worker threads of one library spin for
a while after a call and slow whoever comes next, clocks drift, and other processes come and go.
So the candidates take turns. Every round times one burst of each; the order rotates from round to
round (and reverses after a full turn, so that nobody keeps the same predecessor); before each
burst comes a pause that lets foreign worker threads fall asleep, and one untimed call that wakes
this candidate's own threads and caches. The median over the rounds is reported with its quartiles.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PAUSE_S = 0.05
BURST_S = 0.02
MIN_ROUNDS = 5
MAX_ROUNDS = 60


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate.

    Attributes:
        median_s, q1_s, q3_s: median and quartiles over the rounds.
        samples_s: one mean per burst, in the order taken.
        calls_per_burst: how many calls each sample averages.
    """

    median_s: float
    q1_s: float
    q3_s: float
    samples_s: tuple[float, ...]
    calls_per_burst: int

    @property
    def iqr_s(self) -> float:
        return self.q3_s - self.q1_s


def turn_order(names: list[str], turn: int) -> list[str]:
    """The order of the candidates in round ``turn``: rotated by one place each round, and reversed
    in every second full turn."""
    shift = turn % len(names)
    order = names[shift:] + names[:shift]
    return order[::-1] if (turn // len(names)) % 2 else order


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_s: float = 3.0,
    pause_s: float = PAUSE_S,
    burst_s: float = BURST_S,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Time the candidates against each other.

    Args:
        candidates: name -> a call without arguments. Each must have been called before (compiled,
            warmed up): the first calls here only size the bursts.
        budget_s: rounds are added until this many seconds have passed.
        pause_s: rest before each burst, in seconds.
        burst_s: the least length of a timed burst, in seconds; a longer call is timed alone.
        min_rounds, max_rounds: bounds on the number of rounds, whatever the budget says.
        clock, sleep: replaceable for tests.

    Returns:
        name -> :class:`Timing`, in the order of ``candidates``.

    Raises:
        ValueError: bounds on the rounds that contradict each other.
    """
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"need 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}")
    if not candidates:
        return {}
    names = list(candidates)
    calls = {name: _calls_per_burst(candidates[name], burst_s, clock) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}

    # A collection in the middle of a burst would be charged to whoever happens to run.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for turn in range(max_rounds):
            if turn >= min_rounds and clock() - start >= budget_s:
                break
            for name in turn_order(names, turn):
                samples[name].append(_burst(candidates[name], calls[name], pause_s, clock, sleep))
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(samples[name], calls[name]) for name in names}


def _calls_per_burst(
    call: Callable[[], object], burst_s: float, clock: Callable[[], float]
) -> int:
    call()
    quickest = math.inf
    for _ in range(2):
        start = clock()
        call()
        quickest = min(quickest, clock() - start)
    return max(1, math.ceil(burst_s / max(quickest, 1e-7)))


def _burst(
    call: Callable[[], object],
    calls: int,
    pause_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> float:
    sleep(pause_s)
    call()
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def _summary(samples: list[float], calls: int) -> Timing:
    if len(samples) == 1:
        q1 = median = q3 = samples[0]
    else:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q1, q3, tuple(samples), calls)
