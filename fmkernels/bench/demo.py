"""``fmkernels demo``: two models learn real handwritten digits, twice from the same start.

Once with ``torch.nn``'s layers and once with a copy whose layers ``fmkernels.replace`` exchanged.
Both see the same batches in the same order, so their losses may differ by rounding alone.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fmkernels
from fmkernels import _dispatch, models
from fmkernels.bench.candidates import backends_chosen

# Training amplifies rounding: a ReLU or a pooling window that decides the other way by one bit
# puts two runs on different paths a few steps later. So the losses are compared twice. In the
# first steps rounding alone leaves them within 1e-5 of each other, and a wrong gradient does not;
# after that, two runs whose weights start one rounding apart stay within 0.02.
EARLY_STEPS = 10
EARLY_BOUND = 5e-4
CURVE_BOUND = 0.1
TEST_DIGITS = 297
BATCH = 50


@dataclass(frozen=True)
class Outcome:
    """One model trained both ways.

    Attributes:
        model: its name.
        torch_losses, our_losses: the loss of every step.
        torch_accuracy, our_accuracy: share of the held-out digits that are recognised.
        torch_seconds, our_seconds: time in training steps. The two took turns epoch by epoch, but
            this
            is one run: ``fmkernels bench`` measures speed.
        backend: which backends served fmkernels' calls.
    """

    model: str
    torch_losses: tuple[float, ...]
    our_losses: tuple[float, ...]
    torch_accuracy: float
    our_accuracy: float
    torch_seconds: float
    our_seconds: float
    backend: str

    @property
    def early_difference(self) -> float:
        """Largest difference between the losses of the first steps."""
        return self._difference(EARLY_STEPS)

    @property
    def max_difference(self) -> float:
        """Largest difference between the losses of any step."""
        return self._difference(len(self.our_losses))

    @property
    def agree(self) -> bool:
        return self.early_difference <= EARLY_BOUND and self.max_difference <= CURVE_BOUND

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "early_difference": self.early_difference,
            "early_bound": EARLY_BOUND,
            "max_difference": self.max_difference,
            "bound": CURVE_BOUND,
            "agree": self.agree,
        }

    def _difference(self, steps: int) -> float:
        pairs = zip(self.torch_losses[:steps], self.our_losses[:steps], strict=True)
        differences = [abs(theirs - ours) for theirs, ours in pairs]
        # max() would pass over a NaN.
        return max(d if math.isfinite(d) else math.inf for d in differences)


def run(epochs: int, seed: int = 0) -> list[Outcome]:
    """Train both models both ways.

    Raises:
        ImportError: scikit-learn, which brings the digits, is not installed.
    """
    images, labels = load_digits()
    torch.manual_seed(seed)
    # The CNN is made for 32x32 images, the RNN reads the rows of a digit one after another.
    large = F.interpolate(images[:, None], size=(32, 32), mode="bilinear")
    cnn = models.CNN("small", in_channels=1)
    return [
        train_both("CNN (32-64-64-64-10)", cnn, large, labels, epochs),
        train_both("RNN (LSTM 128, LSTM 64)", models.RNN(8), images, labels, epochs),
    ]


def load_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits, shuffled: ``(N, 8, 8)``, mean 0 and variance 1; classes."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn, which brings the digits") from error
    digits = bundled()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    return images[order], torch.tensor(digits.target)[order]


def train_both(
    name: str, model: nn.Module, inputs: Tensor, labels: Tensor, epochs: int
) -> Outcome:
    """Train ``model`` and a copy with replaced layers on the same batches."""
    replaced = replaced_copy(model)
    trainees = [_Trainee(model), _Trainee(replaced)]
    train_inputs, train_labels = inputs[:-TEST_DIGITS], labels[:-TEST_DIGITS]
    _dispatch.clear_decisions()
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(epoch)
        batches = torch.randperm(len(train_labels), generator=generator).split(BATCH)
        # Whoever goes second finds the batches in the caches: they take turns at that.
        for trainee in trainees if epoch % 2 else trainees[::-1]:
            trainee.train_epoch(train_inputs, train_labels, batches)
    backend = backends_chosen()
    theirs, ours = trainees
    return Outcome(
        name,
        tuple(theirs.losses),
        tuple(ours.losses),
        theirs.accuracy(inputs[-TEST_DIGITS:], labels[-TEST_DIGITS:]),
        ours.accuracy(inputs[-TEST_DIGITS:], labels[-TEST_DIGITS:]),
        theirs.seconds,
        ours.seconds,
        backend,
    )


def replaced_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its layers replaced."""
    replaced = copy.deepcopy(model)
    fmkernels.replace(replaced)
    return replaced


class _Trainee:
    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        # A small rate: larger steps amplify rounding before ten of them are done.
        self.optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
        self.losses: list[float] = []
        self.seconds = 0.0

    def train_epoch(self, inputs: Tensor, labels: Tensor, batches: tuple[Tensor, ...]) -> None:
        for batch in batches:
            x, y = inputs[batch], labels[batch]
            start = time.perf_counter()
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
            self.seconds += time.perf_counter() - start

    def accuracy(self, inputs: Tensor, labels: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            return (self.model(inputs).argmax(1) == labels).float().mean().item()


def print_outcomes(outcomes: list[Outcome], console: Console) -> None:
    """Both loss curves as sparklines, their largest difference, accuracies and times."""
    for outcome in outcomes:
        table = Table(title=f"{outcome.model} on {_DIGITS}")
        table.add_column("layers")
        table.add_column("training loss")
        for column in ("last loss", "accuracy", "seconds"):
            table.add_column(column, justify="right")
        top = max(outcome.torch_losses + outcome.our_losses)
        for layers, losses, accuracy, seconds in (
            ("torch.nn", outcome.torch_losses, outcome.torch_accuracy, outcome.torch_seconds),
            (
                f"fmkernels ({outcome.backend})",
                outcome.our_losses,
                outcome.our_accuracy,
                outcome.our_seconds,
            ),
        ):
            table.add_row(
                layers,
                sparkline(losses, top),
                f"{losses[-1]:.4f}",
                f"{accuracy:.1%}",
                f"{seconds:.2f}",
            )
        console.print(table)
        verdict = "agree" if outcome.agree else "DISAGREE"
        console.print(
            f"The loss curves {verdict}: largest difference in the first {EARLY_STEPS} steps "
            f"{outcome.early_difference:.1e} (allowed {EARLY_BOUND:.0e}), in all "
            f"{len(outcome.our_losses)} {outcome.max_difference:.1e} (allowed {CURVE_BOUND:.0e})",
            style="green" if outcome.agree else "bold red",
        )


_DIGITS = f"{TEST_DIGITS} held-out digits of scikit-learn's 1797"
_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: tuple[float, ...], top: float, width: int = 48) -> str:
    """``values``, averaged into at most ``width`` columns, as a line of bars from 0 to ``top``."""
    size = -(-len(values) // width)
    columns = [values[i : i + size] for i in range(0, len(values), size)]
    means = [sum(column) / len(column) for column in columns]
    # A NaN has no height and shows as "?".
    return "".join(
        _BARS[min(len(_BARS) - 1, int(mean / top * len(_BARS)))]
        if mean == mean and top > 0
        else "?"
        for mean in means
    )
