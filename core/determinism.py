"""Operations that have no deterministic form, where torch is told to use deterministic algorithms only."""
from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from loopctl.errors import UsageError

if TYPE_CHECKING:
    from loopctl.run import Run

# What torch raises, and warns of where it is told to only warn. The second is said of attention.
WITHOUT_FORM = r"([\w. ]+) (does not have a deterministic implementation|defaults to a non-deterministic algorithm)"


def refusal(error: Exception) -> str:
    """What to say of an error of torch that refuses an operation because it has no deterministic form; "" of others."""
    if not isinstance(error, RuntimeError) or not (found := re.match(WITHOUT_FORM, str(error))):
        return ""
    notes = getattr(error, "__notes__", [])
    where = f" ({', '.join(notes)})" if notes else ""
    return (f"{found[1]} has no deterministic form{where}, and only deterministic algorithms are allowed; use other "
            "operations, or --deterministic=warn, in Python torch.use_deterministic_algorithms(True, warn_only=True)")


@contextmanager
def nondeterminism_named(run: Run) -> Iterator[None]:
    """Name an operation in the block that has no deterministic form, in one line: what torch says takes a paragraph.

    Raises UsageError where torch refuses it; where torch only warns, it is logged once.
    """
    with logged_once(run) if torch.is_deterministic_algorithms_warn_only_enabled() else nullcontext():
        try:
            yield
        except RuntimeError as error:
            if refused := refusal(error):
                raise UsageError(refused) from error
            raise


@contextmanager
def logged_once(run: Run) -> Iterator[None]:
    """Log an operation that torch warns of in every call, in place of the warning and once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", WITHOUT_FORM, UserWarning)
        show = warnings.showwarning

        def log_or_show(message: Warning | str, *rest: Any, **more: Any) -> None:
            if found := re.match(WITHOUT_FORM, str(message)):
                run.say_once(found[0], f"{found[1]} has no deterministic form, so another run may differ from this one")
            else:
                show(message, *rest, **more)

        warnings.showwarning = log_or_show
        yield
