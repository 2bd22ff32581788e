"""The three reference architectures, with torch.nn's layers or this package's by one argument.

>>> theirs = fmkernels.models.CNN()
>>> ours = fmkernels.models.CNN(layers="fmkernels")
>>> ours.load_state_dict(theirs.state_dict())

Both kinds have the same parameter names and, from the same seed, the same initial values. All
return logits: softmax belongs to the loss.
"""

from fmkernels.models.cnn import CNN
from fmkernels.models.rnn import RNN
from fmkernels.models.transformer import Transformer

__all__ = ["CNN", "RNN", "Transformer"]
