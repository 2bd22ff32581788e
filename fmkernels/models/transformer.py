"""A stack of Transformer decoder layers."""

from __future__ import annotations

from torch import Tensor, nn

from fmkernels.models._layers import layers_of


class Transformer(nn.Module):
    """Vaswani et al. 2017's decoder: self-attention, cross-attention, feed-forward, stacked.

    ``num_layers`` of torch.nn.TransformerDecoderLayer (batch first, layer norm after each sum);
    the defaults are the paper's base model, with 8 heads of 64.

    Args:
        num_layers: how many decoder layers.
        layers: ``"torch"`` or ``"fmkernels"``.
        d_model, nhead, dim_feedforward, dropout: as in torch.nn.TransformerDecoderLayer.

    Shape:
        target (N, T, d_model), memory (N, S, d_model), output (N, T, d_model).

    Raises:
        ValueError: unknown layers.
    """

    def __init__(
        self,
        num_layers: int = 6,
        layers: str = "torch",
        *,
        d_model: int = 512,
        nhead: int = 8,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        package = layers_of(layers)
        self.layers = nn.ModuleList(
            package.TransformerDecoderLayer(
                d_model, nhead, dim_feedforward, dropout, batch_first=True
            )
            for _ in range(num_layers)
        )

    def forward(self, target: Tensor, memory: Tensor, *, is_causal: bool = False) -> Tensor:
        """Apply the stack.

        Args:
            target: attends to itself, and to ``memory``.
            memory: for example an encoder's output.
            is_causal: position i of ``target`` sees positions 0 to i of ``target`` only.
        """
        mask = None
        if is_causal:
            mask = nn.Transformer.generate_square_subsequent_mask(
                target.size(1), device=target.device, dtype=target.dtype
            )
        for layer in self.layers:
            target = layer(target, memory, tgt_mask=mask, tgt_is_causal=is_causal)
        return target
