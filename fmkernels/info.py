"""What is installed and what it runs on: build, instruction set, backends, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fmkernels import _native
from fmkernels._version import __version__
from fmkernels.ops._cuda_support import build_facts, device_support
from fmkernels.ops._triton.support import device_state

# x86 first, then Arm.
_ISA_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl")
_ISA_FLAGS += ("avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16")
_ISA_FLAGS += ("asimd", "asimdhp", "bf16", "sve")
_SYSFS_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """The processor this process runs on.

    Attributes:
        cpu: model name.
        flags: the instruction-set extensions that matter to the kernels.
        logical_cpus: how many logical processors this process may use.
        caches: cache name -> size as the kernel states it, e.g. ``{"L2": "1024K"}``.
        os: operating system and architecture.
    """

    cpu: str
    flags: tuple[str, ...]
    logical_cpus: int
    caches: dict[str, str]
    os: str


@dataclass(frozen=True)
class BackendState:
    """One backend: whether it can serve calls here, and if not, why."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Info:
    """The answer of :func:`info`. ``print`` it, or take :meth:`to_dict` for JSON.

    Attributes:
        version: of fmkernels.
        native: whether the compiled kernels are loaded.
        native_error: why they are not; None when they are.
        isa: the instruction set in use, None without the native library.
        isas_available: every instruction set built in that this processor has.
        build: compiler, flags and what else the build recorded; empty without the native library.
        threads: torch's intra-op thread count, which the kernels share.
        backends: each backend with its reason.
        machine: the processor.
        versions: of Python, torch, triton (None when absent) and numpy.
        settings: every ``FMKERNELS_*``, ``OMP_*`` and ``MKL_*`` environment variable that is set.
    """

    version: str
    native: bool
    native_error: str | None
    isa: str | None
    isas_available: tuple[str, ...]
    build: dict[str, Any]
    threads: int
    backends: tuple[BackendState, ...]
    machine: Machine
    versions: dict[str, str | None]
    settings: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """``(label, text)`` pairs, in reading order."""
        native = "loaded" if self.native else f"not loaded: {self.native_error}"
        available = ", ".join(self.isas_available) or "unknown"
        rows = [
            ("fmkernels", self.version),
            ("native library", native),
            ("ISA", f"{self.isa} (available: {available})" if self.isa else "none"),
        ]
        rows += [(f"build {key}", _text(value)) for key, value in self.build.items()]
        rows += [
            (f"backend {state.name}", "yes" if state.available else f"no: {state.reason}")
            for state in self.backends
        ]
        rows += [
            ("threads", f"{self.threads} of {self.machine.logical_cpus} logical CPUs"),
            ("CPU", self.machine.cpu),
            ("CPU flags", " ".join(self.machine.flags)),
            ("caches", "  ".join(f"{name} {size}" for name, size in self.machine.caches.items())),
            ("OS", self.machine.os),
        ]
        rows += [(name, version or "not installed") for name, version in self.versions.items()]
        rows += [(f"${name}", value) for name, value in self.settings.items()]
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def info() -> Info:
    """Report what is built, what it runs on, which backends serve calls and why the others do not.

    Returns:
        :class:`Info`.
    """
    build = dict(_native.build_info())
    for key in ("native", "error"):  # said by fields of their own
        build.pop(key, None)
    available = build.pop("isas_supported", None) or filter(None, [_native.isa()])
    return Info(
        version=__version__,
        native=_native.HAS_NATIVE,
        native_error=_native.NATIVE_ERROR,
        isa=_native.isa(),
        isas_available=tuple(available),
        build={**build, **build_facts()},
        threads=torch.get_num_threads(),
        backends=_backend_states(),
        machine=machine(),
        versions={
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "numpy": _installed("numpy"),
        },
        settings={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("FMKERNELS_", "OMP_", "MKL_"))
        },
    )


def machine() -> Machine:
    """The processor, as the operating system describes it."""
    cpuinfo = _cpuinfo()
    flags = set(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())
    return Machine(
        cpu=cpuinfo.get("model name") or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in _ISA_FLAGS if flag in flags),
        logical_cpus=_usable_cpus(),
        caches=_caches(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def last_level_cache_bytes() -> int:
    """Size of the largest cache in bytes; 32 MiB where the system does not say."""
    return max((_bytes(size) for size in _caches().values()), default=32 << 20)


def _backend_states() -> tuple[BackendState, ...]:
    triton, cuda = device_state(), device_support()
    return (
        BackendState("cpu", _native.HAS_NATIVE, _native.NATIVE_ERROR or ""),
        BackendState("triton", triton.ok, triton.reason),
        BackendState("cuda", cuda.ok, cuda.reason),
        BackendState("reference", True, ""),
    )


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}


def _caches() -> dict[str, str]:
    caches = {}
    for index in sorted(_SYSFS_CACHES.glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction":
            caches[f"L{level}" + ("d" if kind == "Data" else "")] = size
    return caches


def _bytes(size: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(size[:-1]) * units[size[-1]] if size[-1:] in units else int(size)


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
