"""Lengths of schedules: a plain number in the schedule's own unit, or `5ep`, `500st`, `10%` of the run."""
import re
from functools import lru_cache
from typing import Annotated

Duration = Annotated[int | float | str, "length"]   # annotated, so that options of this type are known and checked
UNITS = {"": "", "ep": "epoch", "st": "step", "%": "%"}


@lru_cache(typed=True)           # True is 1, and no length
def parse_duration(length: Duration | None) -> tuple[float, str]:
    """Return the number and its unit: `epoch`, `step`, `%`, or empty for the schedule's own. None is 100 %.

    Raises ValueError where the text is no length or the number is not above 0, or beyond what can be computed with.
    """
    if length is None:
        return 100.0, "%"
    found = re.fullmatch(r"\s*([-+.0-9eE]+?)\s*(ep|st|%|)\s*", str(length))
    try:
        number, unit = float(found[1]), UNITS[found[2]]   # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f"takes a length, not {length!r}: write 30, 5ep, 500st or 10%") from None
    if not 1e-9 <= number <= 1e15:
        raise ValueError(f"takes a length {'from 1e-9 to 1e15' if number > 0 else 'above 0'}, not {length!r}")
    return number, unit
