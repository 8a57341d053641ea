"""``python -m release``: build, check and table; see ``release/__init__.py``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import build, check, table
from .pythons import to_be_had


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m release", description="Wheels and the sdist: made and checked.")
    parser.add_argument("command", choices=("build", "check", "table"))
    parser.add_argument("--dist", type=Path, default=build.ROOT / "dist", help="where they are (default: dist)")
    parser.add_argument(
        "--work", type=Path, default=build.ROOT / ".cache" / "wheel" / "work", help="what is thrown away"
    )
    parser.add_argument("--python", nargs="*", default=[], help="interpreters (default: of each version that is here)")
    parser.add_argument("--torch", nargs="+", default=[check.OLDEST_TORCH, "newest"], help="versions of torch to check")
    given = parser.parse_args()
    if given.command == "table":
        table.write()
        return 0
    pythons = to_be_had(given.python)
    print("Pythons:", ", ".join(f"{python.version} ({python.executable})" for python in pythons), flush=True)
    if given.command == "build":
        for path in build.build(given.dist, given.work, pythons):
            print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")
        return 0
    rows = check.check(given.dist, given.work, pythons, given.torch)
    table.write()
    failed = [row for row in rows if "failed" in row]
    print(f"{len(rows) - len(failed)} of {len(rows)} pairs hold; written: {check.LOG}, {table.PAGE}")
    return 1 if failed or not table.served_somewhere(table.logged()) else 0


if __name__ == "__main__":
    sys.exit(main())
