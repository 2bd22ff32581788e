"""Convolutional classifiers of small images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fmkernels.models._layers import layers_of


@dataclass(frozen=True)
class _Variant:
    """``convs``: output channels, and whether a 2x2 max-pooling follows."""

    convs: tuple[tuple[int, bool], ...]
    padding: int
    hidden: int


VARIANTS = {
    "large": _Variant(convs=((64, True), (128, True)), padding=1, hidden=512),
    "small": _Variant(convs=((32, True), (64, True), (64, False)), padding=0, hidden=64),
}


class CNN(nn.Module):
    """3x3 convolutions with ReLU and 2x2 max-pooling, then two fully connected layers.

    * ``"large"``: conv 64, pool, conv 128, pool, dense 512, dense 10; the convolutions keep the
      image's size.
    * ``"small"``: conv 32, pool, conv 64, pool, conv 64, dense 64, dense 10; without padding.

    With ``layers="fmkernels"`` each convolution, ReLU and pooling is one layer, and so is the
    dense layer with its ReLU.

    Args:
        variant: ``"large"`` or ``"small"``.
        layers: ``"torch"`` or ``"fmkernels"``.
        in_channels, image_size: of the (square) images.
        num_classes: logits per image.

    Shape:
        input (N, in_channels, image_size, image_size), output (N, num_classes).

    Raises:
        ValueError: unknown variant or layers, or an image too small for the convolutions.
    """

    def __init__(
        self,
        variant: str = "large",
        layers: str = "torch",
        *,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        package = layers_of(layers)
        shape = VARIANTS[variant]
        self.features = nn.Sequential()
        channels, size = in_channels, image_size
        for number, (width, pooled) in enumerate(shape.convs, start=1):
            options = {"padding": shape.padding}
            if layers == "fmkernels":
                options |= {"activation": "relu", "pool": ("max", 2) if pooled else None}
            conv = package.Conv2d(channels, width, 3, **options)
            self.features.add_module(f"conv{number}", conv)
            if layers == "torch":
                self.features.add_module(f"relu{number}", nn.ReLU())
                if pooled:
                    self.features.add_module(f"pool{number}", nn.MaxPool2d(2))
            size += 2 * shape.padding - 2
            size = size // 2 if pooled else size
            channels = width
        if size < 1:
            raise ValueError(f"image_size is too small for variant {variant!r}, got {image_size}")
        self.classifier = nn.Sequential()
        options = {"activation": "relu"} if layers == "fmkernels" else {}
        hidden = package.Linear(channels * size * size, shape.hidden, **options)
        self.classifier.add_module("dense1", hidden)
        if layers == "torch":
            self.classifier.add_module("relu", nn.ReLU())
        self.classifier.add_module("dense2", package.Linear(shape.hidden, num_classes))

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.features(input).flatten(1))
