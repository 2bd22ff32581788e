"""The forward of a Sequential whose convolutions run as one call, or take a residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fmkernels._replace import programs
from fmkernels._replace.programs import GIVEN, NOTHING, Call


@dataclass(frozen=True)
class SequentialForward:
    """See above.

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
        self, module: nn.Sequential, input: int, residual: int, program: list[Call]
    ) -> int | None:
        """See :func:`programs.record`."""
        if residual != NOTHING and tuple(module._modules) != self.names:
            return None
        return programs.record_members(module, self.member, input, residual, program)

    def _run(self, module: nn.Sequential, input: Any, residual: Any) -> Any:
        """Convolutions as one call, as far as they follow one another."""
        program: list[Call] = []
        value = 0
        for name, layer in module._modules.items():
            given = residual is not None and name == self.member
            before = len(program)
            result = programs.record(layer, value, GIVEN if given else NOTHING, program)
            if result == (len(program) if len(program) > before else value):
                value = result
                if given:
                    input, program, value = programs.run(program, input, residual), [], 0
                continue
            del program[before:]
            if program:
                input = programs.run(program, input, None)
            input = layer(input, residual) if given else layer(input)
            program, value = [], 0
        return programs.run(program, input, None) if program else input


def forward_of(module: nn.Module) -> SequentialForward | None:
    """The one that ``module`` was given, if any."""
    forward = getattr(type(module), "_fmkernels_forward", None)
    return forward if isinstance(forward, SequentialForward) else None


def is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its members, one after the other."""
    forward = forward_of(module)
    plain = (
        type(module).forward is nn.Sequential.forward if forward is None else not forward.member
    )
    return plain and "forward" not in vars(module)
