"""For tests of plugins: see what a run calls."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loopctl.compose import SPECS
from loopctl.hooks import hookimpl


class Trace:
    """A plugin that writes down every hook that is called, indented by what it is called from, in `lines`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0


def traced(hook: str) -> Any:
    """A wrapper of one hook that notes its name."""
    def around(self: Trace) -> Iterator[None]:
        self.lines.append("  " * self.depth + hook)
        self.depth += 1
        try:
            return (yield)
        finally:
            self.depth -= 1
    return hookimpl(wrapper=True)(around)


for name in SPECS:
    setattr(Trace, name, traced(name))
