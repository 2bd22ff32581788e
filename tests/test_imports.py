"""Imports inside the package point one way, and importing it needs nothing optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fmkernels

PACKAGE = Path(fmkernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest first: a module imports from its own floor's package or from floors below.
FLOORS = (
    ("_version", "_native", "_dispatch", "_checks", "_remember"),
    ("ops._",),
    ("ops",),
    ("functional",),
    ("nn",),
    ("freeze", "testing", "info", "_attention_oracle"),
    ("_replace",),
    ("models",),
    ("",),  # the package itself, which gathers the public names
    ("bench",),
    ("cli",),
)
# The same inside one family of ops/. Backends stand side by side and do not see each other.
# A part may be several files: "schema_pool" belongs to "schema".
FAMILY_FLOORS = (
    ("geometry", "sequences"),
    ("schema",),
    ("reference", "triton", "cuda"),
    ("backends",),
    ("autograd",),
)


def module_name(path: Path) -> str:
    """``ops.conv.schema`` for the file that defines it; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """Every module of the package that the file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import, line {node.lineno}"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            # "from package import module" imports the module, anything else the package.
            names = [
                name if name.removeprefix("fmkernels.") in MODULES else node.module
                for name in inner
            ]
        else:
            continue
        for name in names:
            if name == "fmkernels" or name.startswith("fmkernels."):
                found.add(name.removeprefix("fmkernels").removeprefix("."))
    return found


def floor(name: str, floors=FLOORS) -> int:
    for height, prefixes in enumerate(floors):
        for prefix in prefixes:
            private = prefix.endswith("._") and name.startswith(prefix)
            if private or name == prefix or (prefix and name.startswith(prefix + ".")):
                return height
    return len(floors)


def test_every_module_has_a_floor():
    homeless = [name for name in MODULES if floor(name) == len(FLOORS)]
    assert not homeless, f"say in FLOORS where these belong: {homeless}"


@pytest.mark.parametrize("name", list(MODULES))
def test_imports_point_down(name):
    own = floor(name)
    for target in imported_modules(MODULES[name]):
        assert target in MODULES, f"{name} imports fmkernels.{target}"
        same_package = target.split(".")[0] == name.split(".")[0]
        beside = floor(target) == own and (same_package or own == 0)
        assert floor(target) < own or beside, f"{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") == 2])
def test_families_stand_alone(name):
    room, family, part = name.split(".")
    if room != "ops":
        return
    own = floor(part.split("_")[0], FAMILY_FLOORS)
    for target in imported_modules(MODULES[name]):
        if not target.startswith("ops.") or target.startswith("ops._"):
            continue
        _, other_family, *rest = target.split(".")
        assert other_family == family, f"{name} imports {target}"
        kind = rest[0].split("_")[0] if rest else ""
        same_part = kind == part.split("_")[0]
        assert floor(kind, FAMILY_FLOORS) < own or same_part, f"{name} imports {target}"


def test_import_is_light():
    """The extras (triton among them) are not needed, and no GPU is touched."""
    script = (
        "import sys, torch\n"
        "extras = ('triton', 'typer', 'rich', 'matplotlib', 'psutil', 'onnx', 'openvino')\n"
        "before = {e for e in extras if e in sys.modules}\n"
        "import fmkernels\n"
        "print({e for e in extras if e in sys.modules} - before, torch.cuda.is_initialized())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set() False"


def test_public_names_exist():
    for module in (fmkernels, fmkernels.functional, fmkernels.nn):
        for name in module.__all__:
            assert hasattr(module, name), name
