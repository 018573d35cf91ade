"""Output of a training run that cannot be written, because a disk is full or a terminal is gone, ends no training."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class LastingStream:
    """A text stream that writes to another one, and remembers an error of the other in place of raising it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None           # the first one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            self.error = self.error or error

    def give_up(self) -> None:
        """Discard what cannot be written, which Python would try again when it exits, and then fail."""
        try:
            self.stream.flush()
        except OSError:
            with suppress(OSError):                 # not a file
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let no write to stdout or stderr fail inside the block. At its end a line on stderr says what is missing."""
    before = sys.stdout, sys.stderr
    # None where there is no such stream, as in a process without a console.
    streams = [stream and LastingStream(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        out, errors = streams
        if out:
            out.flush()
        if out and out.error and errors:
            errors.write(f"stdout could not be written ({out.error.strerror}); what was printed is incomplete, "
                         "the files of the run are not\n")
            errors.flush()
        for stream in filter(None, streams):
            stream.give_up()
