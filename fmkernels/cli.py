"""The ``fmkernels`` command: ``info``, ``verify``, ``bench`` and ``demo``.

The commands themselves are in ``fmkernels.bench.commands``; this module only has to import without
the packages of the extra ``bench``, so that it can say that they are missing.
"""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = {"typer": "typer", "rich": "rich", "psutil": "psutil", "matplotlib": "matplotlib"}


def missing_packages() -> list[str]:
    """The packages every command needs that are not installed."""
    return [
        package for package, module in _NEEDED.items() if importlib.util.find_spec(module) is None
    ]


def main() -> None:
    """Entry point of the console script."""
    missing = missing_packages()
    if missing:
        print(
            f"The fmkernels command needs {', '.join(missing)}, which this extra brings:\n"
            "    pip install 'fmkernels[bench]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from fmkernels.bench.commands import app

    app()


if __name__ == "__main__":
    main()
