"""A driver for Triton that compiles for a chip that is not there and runs nothing.

Kernels take the real launch path (argument specialisation, compiler options, cache), so what comes
out is what that chip would be given. Triton's driver interface is private: this file is the only
one that touches it, and is known to work with triton 3.6 to 3.9.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from fmkernels.ops._triton import launch, support

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _StandInDriver(DriverBase):
    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        # No limit: the gates report what does not fit, for every kernel, instead of one exception.
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": 1 << 30,
                "max_num_regs": 65536,
                "multiprocessor_count": 132,
                "warpSize": target.warp_size,
            },
            load_binary=lambda *binary: (0, 0, 0, 0, 1024),
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles=None, **options: [1.0, 1.0, 1.0]

    def launcher_cls(self, *source: Any) -> Any:
        return lambda *launch: None


@contextlib.contextmanager
def stand_in(arch: str) -> Iterator[None]:
    """Inside, launchers given meta tensors compile their kernels for ``arch`` and run nothing.

    One architecture per process: kernels keep what they compiled for the device that they saw.
    """
    if support.INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET is set, so nothing would be compiled")
    previous = driver._active  # None where Triton has not looked for a GPU yet
    driver.set_active(_StandInDriver(TARGETS[arch]))
    launch.forget_architectures()
    try:
        with support.compile_only():
            yield
    finally:
        driver._active = previous
        launch.forget_architectures()
