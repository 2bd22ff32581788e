"""The forward of a Sequential whose convolutions run as one call, or take a residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fmkernels._replace import programs
from fmkernels._replace.programs import GIVEN, NOTHING, Call, Program, Watch

# What is called next, and whether it takes the residual.
Step = tuple[Program | nn.Module, bool]


@dataclass(frozen=True)
class SequentialForward:
    """What a Sequential does that calls its members one after the other.

    Attributes:
        member: name of the member that takes the residual which the Sequential itself is given;
            None: it is given none.
        names: of all members. Another one after ``member`` would follow the sum instead of
            preceding it.
    """

    member: str | None
    names: tuple[str, ...]

    def __call__(self, module: nn.Sequential, input: Tensor, residual: Any = None) -> Any:
        if residual is not None and tuple(module._modules) != self.names:
            raise RuntimeError(
                f"{type(module).__name__} had the members {', '.join(self.names)} when "
                "fmkernels.replace fused a sum into one of them, and has changed since: undo the "
                "replacement, and replace again"
            )
        if programs.may_record():
            return self._run(module, input, residual)
        for name, layer in module._modules.items():
            given = residual is not None and name == self.member
            input = layer(input, residual) if given else layer(input)
        return input

    def record(
        self,
        module: nn.Sequential,
        input: int,
        residual: int,
        program: list[Call],
        watch: Watch,
    ) -> int | None:
        """See :func:`programs.record`."""
        if residual != NOTHING and tuple(module._modules) != self.names:
            return None
        return programs.record_members(module, self.member, input, residual, program, watch)

    def _run(self, module: nn.Sequential, input: Any, residual: Any) -> Any:
        """Convolutions as one call, as far as they follow one another."""
        given = residual is not None
        steps = programs.kept(module, given, lambda watch: self._steps(module, given, watch))
        for step, takes in steps:
            if isinstance(step, Program):
                input = step(input, residual if takes else None)
            else:
                input = step(input, residual) if takes else step(input)
        return input

    def _steps(self, module: nn.Sequential, has_residual: bool, watch: Watch) -> list[Step]:
        steps: list[Step] = []
        calls: list[Call] = []
        value = 0

        def finish(takes: bool) -> None:
            nonlocal calls, value
            if calls:
                steps.append((Program(calls), takes))
            calls, value = [], 0

        for name, layer in module._modules.items():
            given = has_residual and name == self.member
            before = len(calls)
            result = programs.record(layer, value, GIVEN if given else NOTHING, calls, watch)
            if result == (len(calls) if len(calls) > before else value):
                value = result
                if given:
                    finish(True)
                continue
            del calls[before:]
            finish(False)
            steps.append((layer, given))
        finish(False)
        return steps


def forward_of(module: nn.Module) -> SequentialForward | None:
    """The one that ``module`` was given, if any."""
    forward = getattr(type(module), "_fmkernels_forward", None)
    return forward if isinstance(forward, SequentialForward) else None


def is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its members, one after the other."""
    forward = forward_of(module)
    if forward is None:
        plain = programs.forward_function(module) is nn.Sequential.forward
    else:
        plain = not forward.member
    return plain and "forward" not in vars(module)
