"""Lets torch.compile trace this package's recurrent layers.

Dynamo breaks the graph at every instance of ``torch.nn.LSTM``, ``GRU`` or ``RNN``, subclasses
included, unless ``torch._dynamo.config.allow_rnn`` is set: torch's own layers would unroll their
loop over time. These trace as one op per layer, so for them, and for them alone, the flag is set
while Dynamo looks at the instance. Where a version of torch has no such place to do that, the flag
remains the user's to set.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import wraps
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_BUILDER = "torch._dynamo.variables.builder"


def trace_layers(kind: type) -> None:
    """Have Dynamo trace instances of ``kind``; it is not imported for that."""
    if _BUILDER in sys.modules:
        _allow(sys.modules[_BUILDER], kind)
    else:
        sys.meta_path.insert(0, _OnImport(kind))


def _allow(builder: ModuleType, kind: type) -> None:
    config = sys.modules.get("torch._dynamo.config")
    variable_builder = getattr(builder, "VariableBuilder", None)
    original = getattr(variable_builder, "wrap_module", None)
    if original is None or not hasattr(config, "allow_rnn"):
        return

    @wraps(original)
    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, kind):
            return original(self, value)
        with config.patch(allow_rnn=True):
            return original(self, value)

    variable_builder.wrap_module = wrap_module


class _OnImport(MetaPathFinder):
    """Waits for Dynamo's module, then steps out of the way."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _allow(module, self._kind)

        spec.loader.exec_module = exec_module
        return spec
