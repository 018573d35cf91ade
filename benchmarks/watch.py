"""Run commands side by side for at most so long, and keep what they printed."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread


@dataclass
class Outcome:
    """What is left of a command: the lines that it printed, why it failed or "", and how long it took."""

    lines: list[str]
    reason: str
    seconds: float


def run(commands: dict[str, list[str]], seconds: float, folder: Path, outcomes: dict[str, Outcome]) -> None:
    """Run commands side by side in `folder`, and put what they leave into `outcomes`, after an interrupt too.

    One that takes longer than `seconds` is ended with all that it has started.
    """
    began, running = time.perf_counter(), list[Command]()
    try:
        for name, command in commands.items():
            running.append(Command(name, command, folder))
        for one in running:
            one.wait(seconds - (time.perf_counter() - began))
    finally:
        for one in running:
            one.end()
            outcomes[one.name] = Outcome(one.lines, one.reason, one.ended - began)


class Command:
    """A command that runs, why it failed or "", and the lines that it prints, which go to stderr as they come."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name, self.lines, self.reason, self.ended = name, list[str](), "interrupted", time.perf_counter()
        self.process = subprocess.Popen(command, cwd=folder, text=True, errors="replace", start_new_session=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        env=os.environ | {"PYTHONUNBUFFERED": "1"})
        self.reader = Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append(line.rstrip())
                print(f"{self.name}: {line.rstrip()}", file=sys.stderr, flush=True)
        self.ended = time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Wait until the command has ended, at most so long, then end it."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.end()
            self.reason = "ended at its time limit"
        else:
            self.reason = ""
        self.reader.join(2)             # a process that outlives its parent could hold the pipe open
        if self.process.returncode and not self.reason:
            last = next((line for line in reversed(self.lines) if line and not line.startswith("{")), "")
            self.reason = f"exit status {self.process.returncode}: {last[:300]}"

    def end(self) -> None:
        """Kill the command, if it is still running, and all processes that it has started."""
        if self.process.poll() is None:
            family = [self.process.pid]
            for pid in family:                          # grows while it is read
                family += children(pid)
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


def children(parent: int) -> list[int]:
    """The processes that a process has started, on Linux."""
    found = []
    for file in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(pid) for pid in file.read_text().split()]
    return found
