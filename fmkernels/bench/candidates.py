"""Who is measured: PyTorch eager and fmkernels, each in the layouts a user chooses between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fmkernels
from fmkernels import _dispatch
from fmkernels.bench.workloads import Inputs, Workload, cast, tensors_in, with_fmkernels

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """A workload built in one dtype and mode.

    Attributes:
        module: PyTorch's own module, in eval mode for inference and train mode for training.
        inputs: NCHW-contiguous inputs.
        grad_output: gradient of the first output, for training.
    """

    workload: Workload
    dtype: str
    mode: str
    module: nn.Module
    inputs: Inputs
    grad_output: torch.Tensor

    @classmethod
    def build(cls, workload: Workload, dtype: str, mode: str, device: str = "cpu") -> Problem:
        module, inputs = workload.make(dtype)
        module, inputs = module.to(device), tuple(tensor.to(device) for tensor in inputs)
        module.train(mode == "training")
        with torch.no_grad():
            output = next(tensors_in(copy.deepcopy(module)(*inputs)))
        generator = torch.Generator().manual_seed(1)
        grad_output = torch.randn(output.shape, generator=generator).to(output)
        return cls(workload, dtype, mode, module, inputs, grad_output)

    def oracle(self) -> Tensors:
        """What :meth:`Candidate.tensors` should be, computed by PyTorch in float64 from the very
        same (already rounded) parameters and inputs."""
        double = Problem(
            self.workload,
            "fp64",
            self.mode,
            copy.deepcopy(self.module).double(),
            tuple(cast(tensor, torch.float64) for tensor in self.inputs),
            self.grad_output.double(),
        )
        return module_candidate("oracle", double, double.module).tensors()


@dataclass(frozen=True)
class Candidate:
    """Something that computes a problem.

    Attributes:
        name: "eager", "fmkernels" or a peer's name.
        layout: memory format of its inputs.
        call: one inference, or one forward and backward pass; this is what is timed.
        tensors: the same once, returning every output and gradient by name.
    """

    name: str
    layout: str
    call: Callable[[], object]
    tensors: Callable[[], Tensors]


def eager(problem: Problem, layout: str) -> Candidate:
    return module_candidate("eager", problem, copy.deepcopy(problem.module), layout)


def ours(problem: Problem, layout: str) -> Candidate:
    """fmkernels: a copy of the module with its layers replaced, frozen for inference."""
    module = with_fmkernels(problem.workload, copy.deepcopy(problem.module))
    if problem.mode == "inference" and problem.workload.substitute is None:
        fmkernels.freeze(module)
    return module_candidate("fmkernels", problem, module, layout)


def backends_used(candidate: Candidate) -> str:
    """Which backends serve one call of ``candidate``, see :func:`backends_chosen`."""
    _dispatch.clear_decisions()
    candidate.call()
    return backends_chosen()


def backends_chosen() -> str:
    """The backends in the log of decisions, for example "cpu" or "cpu+reference".

    "none" if the log is empty: ``replace`` found nothing that it could serve better than PyTorch.
    """
    chosen = {decision.chosen for decision in fmkernels.last_decisions()}
    return "+".join(sorted(chosen)) or "none"


def module_candidate(
    name: str,
    problem: Problem,
    module: nn.Module,
    layout: str = "contiguous",
    run: Callable[..., object] | None = None,
) -> Candidate:
    """A candidate that calls a module.

    Args:
        module: owns the parameters.
        layout: given to the 4-D inputs and parameters.
        run: what to call in the module's place (its compiled form).
    """
    inputs, grad_output = problem.inputs, problem.grad_output
    if layout == "channels_last":
        module = module.to(memory_format=torch.channels_last)
        inputs = tuple(_channels_last(tensor) for tensor in inputs)
        grad_output = _channels_last(grad_output)
    run = module if run is None else run
    if problem.mode == "inference":
        return Candidate(name, layout, lambda: run(*inputs), lambda: _outputs(run(*inputs)))

    inputs = tuple(tensor.detach() for tensor in inputs)
    sources = dict(module.named_parameters())
    if problem.workload.input_gradient:
        for index, tensor in enumerate(inputs):
            if tensor.is_floating_point():
                sources[f"input {index}"] = tensor.requires_grad_()
    wanted = list(sources.values())

    def step():
        outputs = run(*inputs)
        first = next(tensors_in(outputs))
        return outputs, torch.autograd.grad(first, wanted, grad_output)

    def step_tensors() -> Tensors:
        outputs, gradients = step()
        named = {f"grad {name}": grad for name, grad in zip(sources, gradients, strict=True)}
        return _outputs(outputs) | named

    return Candidate(name, layout, step, step_tensors)


def _outputs(outputs: object) -> Tensors:
    return {f"output {i}": tensor.detach() for i, tensor in enumerate(tensors_in(outputs))}


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
