"""What loopctl says when it refuses, in one line."""
from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """Something asked for cannot be done. The message is one line: the culprit, the fact, the way out."""


def nearest(word: object, known: Iterable[str], what: str = "known") -> str:
    """The way out of a wrong name: the nearest right one, or all of them."""
    known = sorted(known)
    close = get_close_matches(str(word), known, n=1)
    few = known if len(known) <= 20 else [*known[:10], f"and {len(known) - 10} more"]
    return f"did you mean {close[0]!r}?" if close else f"{what}: {', '.join(few)}"


def one_line(error: object) -> str:
    """The message of an error, on one line: without what no terminal shows, and of a very long one both ends."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(str(error).split()))
    return text if len(text) <= 470 else f"{text[:290]} ... {text[-170:]}"


def names(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
