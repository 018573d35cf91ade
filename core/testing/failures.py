"""A pytest plugin: of a test that fails, say what `loopctl why` says of the training loops that it compares.

Use it with `pytest -p loopctl.testing.failures`, or with that in `addopts`. A test that fails with an AssertionError is
run once more, with a tape of every model that it trains. The tapes of models with the same parameters are compared with
the first of them, and what differs is a section of the report. Tests that pass are not affected.
"""
from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

MOST = 10               # failing tests of a process that are explained: more usually have one reason
explained: list[str] = []


@pytest.hookimpl
def pytest_runtest_protocol(item: Any, nextitem: Any) -> bool:
    """Run a test as pytest does; where it fails, add what differs to its report."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failed = next((report for report in reports if report.failed and report.when == "call"), None)
    if failed and "AssertionError" in failed.longreprtext and len(explained) < MOST:
        explained.append(item.nodeid)
        try:
            text = difference(item, nextitem)
        except Exception as error:              # the failure itself is reported in any case
            text = f"the loops could not be recorded ({type(error).__name__}: {error})"
        if text:
            failed.sections.append(("what `loopctl why` says", text))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def difference(item: Any, nextitem: Any) -> str:
    """Run a test once more and record it; return what differs between its loops, or "" where it has no two alike."""
    from loopctl.tape.reading import TapeContent, read_tape  # imported here, for most sessions need no torch for it
    from loopctl.tape.recording_each import record_each
    from loopctl.why.differences import explain_tapes

    with TemporaryDirectory(prefix="loopctl-") as folder:
        with record_each(folder) as files:
            runtestprotocol(item, nextitem=nextitem, log=False)
        first: dict[Any, TapeContent] = {}      # by the shapes of the parameters
        found = []
        for file in files:
            tape = read_tape(file)
            shapes = tuple(tuple(parameter[1:3]) for parameter in tape.header["parameters"])
            if shapes in first:
                found.append(f"A is loop {first[shapes].file.stem} of this test, B is loop {file.stem}. "
                             f"{explain_tapes(first[shapes], tape).text}")
            first.setdefault(shapes, tape)
    return "\n\n".join(found)
