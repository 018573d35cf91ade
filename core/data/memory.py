"""Whether data fits in the memory of this machine."""
from __future__ import annotations

import os

from loopctl.errors import UsageError


def check_memory(what: str, size: float, way_out: str) -> None:
    """Raise UsageError where `size` bytes are more than the machine has, which would die of it and not tell why."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):        # Windows does not tell
        return
    if size > memory:
        raise UsageError(f"{what} would take {size / 1e9:,.0f} GB of memory, and this machine has "
                         f"{memory / 1e9:,.0f} GB; {way_out}")
