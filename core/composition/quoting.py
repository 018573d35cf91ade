"""Quotes and brackets in the text of options: where a comma or an equals sign is a part of a value.

Text in double quotes has escapes as in JSON; lists, tuples and dicts may be in brackets: `["a,b", [1, 2], {x=none}]`.
"""
from __future__ import annotations

import json
import re
from itertools import pairwise

BRACKETS = {"[": "]", "(": ")", "{": "}"}
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|.', re.DOTALL)         # a quoted text, or a character
OPENING = re.compile(r'(?:^|[,=])\s*["\[({]')
VALUE_END = re.compile(r"\s*(?:[,=]|\Z)")


def outside(text: str, separator: str) -> list[int]:
    """Return where `separator` is in `text`, except in quotes and in brackets.

    Quotes and brackets count where a value starts, which is at the start of the text and after a comma or an equals
    sign, and only if the value ends with them: a regular expression such as `layer[12].*` is plain text.
    """
    found, position, starts = [], 0, True
    while position < len(text):
        char = text[position]
        end = enclosed_end(text, position) if starts and (char == '"' or char in BRACKETS) else position
        if end > position:
            position, starts = end, False
            continue
        if char == separator:
            found.append(position)
        starts = char in ",=" or (starts and char.isspace())
        position += 1
    return found


def enclosed_end(text: str, start: int) -> int:
    """Return the end of the quotes or brackets that open at `start` and are all of a value; else `start`."""
    end = closing_end(text, start)
    return end if end and VALUE_END.match(text, end) else start


def closing_end(text: str, start: int) -> int:
    """Return the end of the quotes or brackets that open at `start`; 0 if they are not closed."""
    closing = ""
    for token in TOKEN.finditer(text, start):
        if token[0] in BRACKETS:
            closing += BRACKETS[token[0]]
        elif token[0] == closing[-1:]:
            closing = closing[:-1]
        if not closing:
            return 0 if token[0] == '"' else token.end()
    return 0


def split(text: str, separator: str = ",") -> list[str]:
    """Split `text` at each `separator` that is neither in quotes nor in brackets."""
    cuts = [-1, *outside(text, separator), len(text)]
    return [text[before + 1:after] for before, after in pairwise(cuts)]


def split_pair(text: str) -> tuple[str, str]:
    """Split `name=value` at its last equals sign; the name is empty if there is none."""
    at = max(outside(text, "="), default=-1)
    return text[:max(at, 0)].strip(), text[at + 1:].strip()


def is_enclosed(text: str, opening: str) -> bool:
    """Whether all of `text` is in one pair of quotes, or of brackets."""
    return text[:1] == opening and enclosed_end(text, 0) == len(text)


def unquote(text: str) -> str:
    """Return `text` without its quotes, if it has some. Raises ValueError for a wrong escape."""
    if not is_enclosed(text, '"'):
        return text
    try:
        return json.loads(text, strict=False)
    except ValueError:
        raise ValueError("takes text in quotes with escapes as in JSON, such as \\\\ for a backslash, "
                         f"not {text}") from None


def quote(text: str) -> str:
    """Return `text` in quotes, in printable characters."""
    escaped = json.dumps(text, ensure_ascii=False)
    escaped = escaped.replace("\x7f", "\\u007f")                   # the one that json.dumps escapes in no case
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in escaped)


def opens_something(text: str) -> bool:
    """Whether text opens quotes or brackets that something after it could close."""
    closed = text[:1] in BRACKETS and '"' not in text           # such as a regular expression
    return bool(OPENING.search(text, closing_end(text, 0) if closed else 0))
