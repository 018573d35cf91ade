"""Run the benchmarks and put their tables into docs/performance.md, between the comments that name them.

    pip install -e '.[bench]'
    python benchmarks/report.py                     all of them, half an hour
    python benchmarks/report.py overhead steady     only these

Each benchmark prints its table, which goes between <!-- NAME --> and <!-- end of NAME -->.
"""
from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
TABLES = ("overhead", "compose", "plugins", "startup", "steady", "saving", "processes", "convergence", "images")


def measured(name: str) -> str:
    print(f"{name} ...", file=sys.stderr)
    command = [sys.executable, "-W", "ignore", str(HERE / f"{name}.py")]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def machine() -> str:
    """What the tables were made on."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    cpu = name[1] if name else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {version('torch')}, " \
           f"torchvision {version('torchvision')}, loopctl {version('loopctl')}.\n"


def put(name: str, text: str) -> None:
    page = PAGE.read_text()
    part = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    if not part.search(page):
        raise SystemExit(f"{PAGE}: there is no <!-- {name} --> with an <!-- end of {name} -->")
    PAGE.write_text(part.sub(lambda _: f"\n{text}\n", page, count=1))


def main(names: list[str]) -> None:
    for name in names:
        if name not in TABLES:
            raise SystemExit(f"there is no table {name}; there are {', '.join(TABLES)}")
    for name in names or TABLES:
        put(name, measured(name))
    put("machine", machine())


if __name__ == "__main__":
    main(sys.argv[1:])
