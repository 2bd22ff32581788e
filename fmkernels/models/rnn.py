"""A recurrent classifier of sequences."""

from __future__ import annotations

from torch import Tensor, nn

from fmkernels.models._layers import layers_of


class RNN(nn.Module):
    """LSTM 128, LSTM 64, and on the last step dense 64 with ReLU and dense 10.

    Args:
        input_size: features per step.
        layers: ``"torch"`` or ``"fmkernels"``; there the dense layer and its ReLU are one.
        num_classes: logits per sequence.

    Shape:
        input (N, T, input_size), output (N, num_classes).

    Raises:
        ValueError: unknown layers.
    """

    def __init__(
        self, input_size: int = 64, layers: str = "torch", *, num_classes: int = 10
    ) -> None:
        super().__init__()
        package = layers_of(layers)
        options = {"activation": "relu"} if layers == "fmkernels" else {}
        self.lstm1 = package.LSTM(input_size, 128, batch_first=True)
        self.lstm2 = package.LSTM(128, 64, batch_first=True)
        self.dense1 = package.Linear(64, 64, **options)
        self.relu = nn.ReLU() if layers == "torch" else nn.Identity()
        self.dense2 = package.Linear(64, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        output, _ = self.lstm1(input)
        output, _ = self.lstm2(output)
        return self.dense2(self.relu(self.dense1(output[:, -1])))
