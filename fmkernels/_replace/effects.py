"""Whether a call may run later than it did, as far as other calls can tell.

A layer that takes a residual runs where the sum was: after whatever computes the residual, which
may have come between. Nothing here proves more than it needs: what is not known to be harmless
counts as a reason to leave the order alone.
"""

from __future__ import annotations

import operator

from torch import fx, nn

from fmkernels._replace import sequential
from fmkernels._replace.catalog import has_call_hooks
from fmkernels._replace.trace import Trace

# These make a new tensor of what they read.
_FRESH = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_RANDOM = ("drop", "rand", "normal", "bernoulli", "multinomial", "rrelu")
_PURE_PACKAGES = ("torch", "_operator", "builtins", "math")
_IN_PLACE_OPERATORS = {name.strip("_") for name in dir(operator) if name.startswith("__i")}
_IN_PLACE_OPERATORS |= {"setitem", "delitem"}


class Effects:
    """What calls of a model's modules do besides returning a value.

    Args:
        traces: those of the modules that have been traced, by module.
    """

    def __init__(self, traces: dict[nn.Module, list[Trace]]) -> None:
        self._traces = traces

    def harmless(self, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
        """Whether a call of a trace writes into no tensor that exists and draws no random number.

        ``modules``: those that the trace calls.
        """
        if node.op == "call_module":
            return self._harmless_module(modules[node.target])
        if node.op == "call_method":
            return not node.target.endswith("_") and not _is_random(node.target)
        if node.op == "call_function":
            return _is_harmless_function(node)
        return True

    def reads_afresh(self, module: nn.Module) -> bool:
        """Whether ``module`` reads its input only through layers that make a new tensor of it, so
        that nothing in it can write into its input."""
        if has_call_hooks(module) or "forward" in vars(module):
            return False
        if _is_torch_layer(module):
            return isinstance(module, _FRESH)
        if sequential.is_plain(module):
            layers = (child for child in module.children() if type(child) is not nn.Identity)
            first = next(layers, None)
            return first is not None and self.reads_afresh(first)
        for traced in self._traces.get(module, ()):
            modules = dict(module.named_modules(remove_duplicate=False))
            for node in traced.graph.nodes:
                if node.op == "placeholder" and not all(
                    user.op == "call_module" and self.reads_afresh(modules[user.target])
                    for user in node.users
                ):
                    return False
        return module in self._traces

    def _harmless_module(self, module: nn.Module) -> bool:
        if has_call_hooks(module) or "forward" in vars(module):
            return False
        if sequential.is_plain(module):
            return all(self._harmless_module(child) for child in module.children())
        if _is_torch_layer(module):
            return isinstance(module, (*_FRESH, *_POOLS, nn.Identity))
        return module in self._traces and all(
            self.harmless(node, dict(module.named_modules(remove_duplicate=False)))
            for traced in self._traces[module]
            for node in traced.graph.nodes
        )


def _is_harmless_function(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "_")
    package = getattr(node.target, "__module__", None) or "torch"
    if package.split(".")[0] not in _PURE_PACKAGES or package.startswith("torch._ops"):
        return False
    if package == "_operator" and name in _IN_PLACE_OPERATORS:
        return False
    # True may stand for inplace=True.
    flags = "out" in node.kwargs or any(v is True for v in (*node.args, *node.kwargs.values()))
    return not flags and not name.endswith("_") and not _is_random(name)


def _is_torch_layer(module: nn.Module) -> bool:
    own = type(module).__module__.startswith("torch.nn.modules.")
    return own and not sequential.is_plain(module)


def _is_random(name: str) -> bool:
    return any(part in name for part in _RANDOM)
