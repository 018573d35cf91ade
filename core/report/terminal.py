"""Text for a terminal, a pipe or a log: in plain letters where its encoding has no others."""
from __future__ import annotations

import codecs
import sys
from contextlib import suppress
from typing import Any

from loopctl.errors import counted as counted  # for plugins
from loopctl.errors import one_line as one_line

# Of bars and boxes, the ASCII characters that look most like them. Other characters become escapes such as \u0142.
PLAIN = dict(zip("▁▂▃▄▅▆▇█│└─━╸╺…", "__..::##|+----~", strict=True))


def plain_letters(error: UnicodeError) -> tuple[str, int]:
    """The error handler `loopctl.plain` of encodings: replace what cannot be encoded by ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start:error.end]
    return "".join(PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode() for char in lost), error.end


codecs.register_error("loopctl.plain", plain_letters)


class PlainStream:
    """A text stream that writes to another one, and writes plain letters where the other has no others."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return self.stream.write(text.encode(encoding, "loopctl.plain").decode(encoding))


def say(text: str) -> None:
    """Print a text, above a live progress bar if there is one. Use it in place of `print`, which some encodings end."""
    if sys.stdout is not None:
        print(text, file=PlainStream(sys.stdout), flush=True)


def use_plain_letters() -> None:
    """Make stdout and stderr of this process write plain letters where they have no others."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError):                 # of a stream that cannot be written to, since this flushes it
                stream.reconfigure(errors="loopctl.plain")
