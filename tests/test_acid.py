"""benchmarks/acid: loopctl makes the updates of the plain loop in every work, and the page is that of the results."""
import importlib
import json
import os
import sys
from pathlib import Path

import pytest

ACID = Path(__file__).parents[1] / "benchmarks" / "acid"
WORKS = [file.stem for file in sorted((ACID / "plain").glob("*.py"))]


@pytest.fixture
def acid(monkeypatch):
    """Imports a file of benchmarks/acid. Its folders have the names of libraries, so it is not left on the path."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ACID)])
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ACID) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def train_in_a_process(folder):
    sys.path.append(str(ACID))
    try:
        return importlib.import_module("cell").train_cell("loopctl", "ddp_uneven_data", folder, 0, int(os.environ["RANK"]))
    finally:
        sys.path.remove(str(ACID))


@pytest.mark.parametrize("work", WORKS)
def test_loopctl_makes_the_updates_of_the_plain_loop(acid, work, tmp_path, request):
    cell, run = acid("cell"), acid("run")
    plain = cell.train_cell("plain", work, tmp_path / "plain")
    assert plain["end"] == "trained", plain["text"]
    asked = cell.WORKS[work]
    if asked.processes > 1:
        outcome, _ = request.getfixturevalue("ranks")(asked.processes, train_in_a_process, tmp_path / "loopctl")
    else:
        for part in (1, 2) if asked.stop_after else (0,):
            outcome = cell.train_cell("loopctl", work, tmp_path / "loopctl", part)
    found = run.compare(work, tmp_path / "plain" / "updates.tape", tmp_path / "loopctl" / "updates.tape", plain["results"],
                        outcome)
    assert found.end == "same" or (found.end == "rounding" and asked.processes > 1), found.text
    assert set(plain["results"]) == set(asked.results)


def test_what_differs_is_found_and_said(acid, tmp_path):
    cell, run = acid("cell"), acid("run")
    clipped = cell.train_cell("plain", "clip_with_accumulation", tmp_path / "a")
    cell.train_cell("plain", "schedule_per_step_with_accumulation", tmp_path / "b")
    tapes = tmp_path / "a" / "updates.tape", tmp_path / "b" / "updates.tape"
    found = run.compare("clip_with_accumulation", *tapes, {"loss": 1.0}, clipped | {"results": {"loss": 1.1}})
    assert (found.end, found.update, found.results) == ("differs", 1, {"loss": [1.1, 1.0]})
    assert found.text.startswith("update 1: ")
    found = run.compare("clip_with_accumulation", tapes[0], tapes[0], {"loss": 1.0}, clipped | {"results": {}})
    assert (found.end, found.update) == ("differs", None)
    longer = cell.train_cell("plain", "resume_in_mid_epoch", tmp_path / "c")
    assert longer["end"] == "trained"
    assert run.first_difference(tmp_path / "c" / "updates.tape", tmp_path / "c" / "updates.tape") is None


def test_the_page_is_that_of_the_results_and_every_library_has_a_short_script_for_every_work(acid):
    run = acid("run")
    results = json.loads((ACID / "results.json").read_text())
    assert run.PAGE.read_text() == run.page(results, run.NAMES), "write it with benchmarks/acid/run.py --page"
    assert set(results["cells"]) == set(run.LIBRARIES)
    for library, cells in results["cells"].items():
        assert set(cells) == set(WORKS)
        assert "failed" not in {found["end"] for found in cells.values()}
        for work in WORKS:
            assert len((ACID / library / f"{work}.py").read_text().splitlines()) <= 60
