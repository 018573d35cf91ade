"""UsageError, and helpers that write its one-line messages."""
from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """A request that cannot be carried out. The message is one line: the culprit, the fact, the way out."""


def nearest(word: object, known: Iterable[str], what: str = "known") -> str:
    """Return a hint for a wrong name: the nearest name in `known`, or, after the word `what`, a list of them."""
    known = sorted(known)
    close = get_close_matches(str(word), known, n=1)
    if not close:                       # then whatever the case of its letters
        lower = {name.lower(): name for name in known}
        close = [lower[name] for name in get_close_matches(str(word).lower(), lower, n=1)]
    listed = known if len(known) <= 20 else [*known[:10], f"and {len(known) - 10} more"]
    return f"did you mean {close[0]!r}?" if close else f"{what}: {', '.join(listed)}"


def harmless(text: object) -> str:
    """Return a text that others wrote with its unprintable characters escaped, so that a terminal does not obey it."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in str(text))


def one_line(error: object) -> str:
    """Return the message of an error on one line: unprintable characters escaped, the middle of a long one cut out."""
    text = harmless(" ".join(str(error).split()))
    return text if len(text) <= 470 else f"{text[:290]} ... {text[-170:]}"


def counted(number: int, thing: str) -> str:
    """Return a number of things: `1 epoch`, `2 epochs`, `1,000 batches`."""
    return f"{number:,} {thing}{'es' if thing.endswith(('s', 'tch')) else 's'}" if number != 1 else f"1 {thing}"


def names(items: Iterable[str]) -> str:
    """Join names for a message: `a`, `a and b`, `a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
