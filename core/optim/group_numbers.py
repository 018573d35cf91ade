"""Numbers in an optimizer's parameter groups: find them by name, read and set them, in tuples and tensors too."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from loopctl.errors import UsageError, nearest

Place = tuple[str, int | None]      # the key in a parameter group, and the index where its value is a tuple


def numbers_by_name(group: dict[str, Any]) -> dict[str, Place]:
    """Where each number of a parameter group is, by its name.

    An item of a tuple has its index in the name, such as betas.1. The first of betas is called momentum. A whole number
    above 1, other than a rate, counts something, such as iterations, and is left out.
    """
    found: dict[str, Place] = {}
    for key, value in group.items():
        if key == "params" or key.startswith("initial_"):
            continue
        if isinstance(value, tuple | list):
            found |= {f"{key}.{index}": (key, index) for index, item in enumerate(value) if is_number(item)}
        elif is_number(value) or key == "lr":
            found[key] = key, None
    if "betas.0" in found and "momentum" not in found:
        found["momentum"] = found.pop("betas.0")
    return found


def is_number(value: Any) -> bool:
    """Whether `value` can be multiplied by a factor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and value <= 1)


def read_number(group: dict[str, Any], place: Place) -> float:
    """Return a number of a parameter group, which waits for the device if it is a tensor there."""
    key, index = place
    return float(group[key] if index is None else group[key][index])


def write_number(group: dict[str, Any], place: Place, value: float) -> None:
    """Set a number of a parameter group; of a tensor, the content, for compiled and captured steps."""
    key, index = place
    old = group[key] if index is None else group[key][index]
    if isinstance(old, Tensor):
        old.fill_(value)
    elif index is None:
        group[key] = value
    else:
        group[key] = (*group[key][:index], value, *group[key][index + 1:])


def initial_key(name: str) -> str:
    """The key under which a parameter group has the initial value of a number, as `initial_lr` is that of the rate."""
    return f"initial_{name}"


def scheduled_places(optimizer: Any, name: str, of: str = "") -> dict[int, Place]:
    """Where the number called `name` is in each parameter group in which it is not 0, by the index of the group.

    of: of several optimizers, the name of the one whose groups are meant. Raises UsageError where a group has no such
    number, or where it is 0 in all of them.
    """
    found: dict[int, Place] = {}
    groups = [(index, group) for index, group in enumerate(optimizer.param_groups)
              if not of or group.get("optimizer") == of]
    for index, group in groups:
        known = numbers_by_name(group)
        if name not in known:
            own = group.get("optimizer", "")
            which = f"the optimizer {own}" if own else type(optimizer).__name__
            raise UsageError(f"option={name}: {which} has no such number; {nearest(name, known, 'it has')}"
                             + "; name another optimizer with optimizer=..." * bool(own and not of))
        if group.get(initial_key(name), read_number(group, known[name])):
            found[index] = known[name]
    if not found:
        raise UsageError(f"option={name}: it is 0 in every parameter group, which a factor does not change; give the "
                         f"optimizer a {name} above 0")
    return found
