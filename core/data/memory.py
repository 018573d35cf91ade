"""Check that something fits in the memory of this machine before it is allocated."""
from __future__ import annotations

import os

from loopctl.errors import UsageError


def check_memory(what: str, size: float, way_out: str) -> None:
    """Raise UsageError where `size` bytes exceed the host's memory; the system would kill the process without a reason.

    what, way_out: the subject of the message, and the advice at its end
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):        # Windows has no sysconf
        return
    if size > memory:
        raise UsageError(f"{what} would take {size / 1e9:,.0f} GB of memory, and this machine has "
                         f"{memory / 1e9:,.0f} GB; {way_out}")
