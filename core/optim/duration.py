"""Durations of schedules: a plain number in the schedule's own unit, or `5ep`, `500st`, `10%` of the run; and times.

To add a unit of durations, add it to `UNITS`, to the examples and to `convert`.
"""
from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from loopctl.optim.plan import Plan

Duration = Annotated[int | float | str, "duration"]     # annotated, so that options of this type are known and checked
UNITS = {"": "", "ep": "epoch", "st": "step", "%": "%"}
EXAMPLES = ("30", "5ep", "500st", "10%")                # one of each unit, for messages
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}      # by unit of a time, in the order in which they are written


@lru_cache(typed=True)           # typed, because True equals 1 and is no duration
def parse_duration(duration: Duration | None) -> tuple[float, str]:
    """Return the number and its unit: `epoch`, `step`, `%`, or empty for the schedule's own. None is 100 %.

    Raises ValueError for text that is no duration, and for a number that is not above 0 or too large to compute with.
    """
    if duration is None:
        return 100.0, "%"
    units = "|".join(UNITS)
    found = re.fullmatch(rf"\s*([-+.0-9eE]+?)\s*({units})\s*", str(duration))
    try:
        number, unit = float(found[1]), UNITS[found[2]]   # type: ignore[index]
    except (TypeError, ValueError):
        examples = f"{', '.join(EXAMPLES[:-1])} or {EXAMPLES[-1]}"
        raise ValueError(f"takes a duration, not {duration!r}: write {examples}") from None
    if not 1e-9 <= number <= 1e15:
        bounds = "from 1e-9 to 1e15" if number > 0 else "above 0"
        raise ValueError(f"takes a duration {bounds}, not {duration!r}")
    return number, unit


def convert(number: float, unit: str, by: str, plan: Plan, planned_steps: int) -> float:
    """A duration in epochs (`by="epoch"`) or in steps (`by="step"`). A number without a unit is in that unit."""
    unit = unit or by
    steps = number * planned_steps / 100 if unit == "%" else number if unit == "step" else plan.steps(number)
    return steps if by == "step" else plan.epochs(steps)


def parse_time(text: str) -> float:
    """Return the seconds of a time such as `90s`, `30m`, `2h`, `1h30m` or `1.5d`. Raises ValueError for other text."""
    pattern = "".join(rf"(?:(\d{{1,6}}(?:\.\d+)?){unit})?" for unit in SECONDS)
    found = re.fullmatch(pattern, text.strip(), re.ASCII) if isinstance(text, str) else None
    numbers = zip(found.groups("0") if found else (), SECONDS.values(), strict=False)
    seconds = sum(float(number) * factor for number, factor in numbers)
    if not seconds > 0:
        raise ValueError(f"takes a time, not {text!r}: write 90s, 30m, 2h, 1h30m or 1d")
    return seconds
