"""benchmarks/gpu.py: its clock, its watch over the parts, and its report. What it measures needs a GPU."""
import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))


def test_the_clock_times_loops_that_end_in_any_way(script):
    loops = script("loops")

    def reads_in_advance_and_wraps_errors(model, data, device):
        batches = iter(data)
        try:
            next(batches)
            for _ in batches:
                time.sleep(0.01)
        except loops.Enough as error:
            raise RuntimeError("the loader failed") from error

    batches = loops.pool(4, 2, 10, "cpu")
    for loop in (loops.by_hand, loops.ours):
        assert loops.rate(loop, small, batches, "cpu", 2, 0.01) > 0
    measured = loops.rate(reads_in_advance_and_wraps_errors, small, batches, "cpu", 2, 0.1)
    assert 4 < measured < 400                                 # at most 4 samples in 10 ms
    with pytest.raises(RuntimeError, match="ended before its time"):
        loops.rate(lambda model, data, device: next(iter(data)), small, batches, "cpu", 2, 0.01)


def test_a_loop_that_fails_is_a_row_with_its_reason_and_the_others_go_on(script, capsys):
    parts = script("gpu_parts")

    def fails(model, data, device):
        raise ValueError("no such thing\nand more")

    def misses(model, data, device):
        import no_such_library  # noqa: F401

    work = parts.Work(True, "cpu", time.perf_counter() + 9)
    chosen = {"by hand": script("loops").by_hand, "failing": fails, "missing": misses, "loopctl": parts.amp()}
    parts.compare(work, "A network", small, chosen, script("loops").pool(4, 2, 10, "cpu"), 9)
    found = script("gpu_report").tables(capsys.readouterr().out.splitlines()).splitlines()
    assert found[:5:2] == ["A network:", "| loop | images/s | of by hand |", found[4]]
    assert found[4].endswith("| 1.00 |")
    assert found[5:7] == ["| failing | not measured: ValueError: no such thing |  |",
                          "| missing | not installed: no_such_library |  |"]
    assert found[7].startswith("| loopctl |")


def test_the_report_has_medians_ratios_of_rounds_and_what_was_printed_before_a_part_was_ended(script):
    report, outcome = script("gpu_report").report, script("watch").Outcome
    records = [{"table": "T", "text": "what tune says"},
               *({"table": "T", "cells": {"loop": "by hand", "images/s": rate}} for rate in (100, 200, 300)),
               *({"table": "T", "cells": {"loop": "ours", "images/s": rate}} for rate in (150, 400)),
               {"table": "T", "cells": {"loop": "ours", "waiting": 0.25}}]
    lines = ["a warning", *map(json.dumps, records)]
    kills = ["amp: equal after 2 kills, in 1.5 times", "Traceback", "ema: FAILED: weights differ"]
    tests = ["[gw0] [ 10%] FAILED tests/a.py::test_x[a b]", "[gw0] [ 20%] PASSED tests/a.py::test_y",
             "FAILED tests/a.py::test_z - assert 1 == 2", "=== 2 failed, 1 passed in 3.00s ==="]
    assert report("A GPU.", {
        "small": outcome(lines, "ended at its time limit", 9.7), "kill_resume": outcome(kills, "", 2),
        "tests": outcome(tests, "", 3)}) == """A GPU.

### small, 10 s

Not complete: ended at its time limit

T:

```text
what tune says
```

| loop | images/s | of by hand | waiting |
| --- | --- | --- | --- |
| by hand | 200 | 1.00 |  |
| ours | 275 | 1.75 | 0.25 |

### kill_resume, 2 s

- amp: equal after 2 kills, in 1.5 times
- ema: FAILED: weights differ

### tests, 3 s

`2 failed, 1 passed in 3.00s`

- `tests/a.py::test_x[a b]`
- `tests/a.py::test_z`: assert 1 == 2
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc")
def test_a_part_that_hangs_is_ended_with_all_that_it_started_and_the_others_are_not(script, capsys):
    hang = ("import subprocess, sys, time; p = subprocess.Popen(['sleep', '60'], start_new_session=True); "
            "print(p.pid); time.sleep(60)")
    began = time.perf_counter()
    found = {}
    script("watch").run({"hangs": [sys.executable, "-c", hang], "works": [sys.executable, "-c", "print(1)"],
                         "fails": [sys.executable, "-c", "import no_such_library"]}, 1.5, BENCHMARKS, found)
    assert time.perf_counter() - began < 20
    assert found["hangs"].reason == "ended at its time limit"
    (pid,) = found["hangs"].lines
    status = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z":       # Z: only its parent is missing
        assert time.monotonic() < deadline, "the process of a process is still there"
        time.sleep(0.01)
    assert found["works"].lines == ["1"]
    assert found["works"].reason == ""
    assert found["fails"].reason == "exit status 1: ModuleNotFoundError: No module named 'no_such_library'"


def test_one_call_writes_the_report_of_all_stages_within_its_time(script, monkeypatch, tmp_path, capsys):
    gpu = script("gpu")
    assert sum(share for _, share in gpu.stages("cuda", tiny=False)) == pytest.approx(1)
    record = json.dumps({"table": "T", "cells": {"loop": "by hand", "images/s": 1234.5}})
    hangs = [sys.executable, "-c", f"print({record!r}); import time; time.sleep(20 + {{seconds}})"]
    works = [sys.executable, "-c", "print('3 passed')"]
    monkeypatch.setattr(gpu, "stages", lambda device, tiny: [
        ({"small": hangs}, 0.5), ({"tests": works, "kill_resume": ["left", "out"]}, 0.5)])
    monkeypatch.setattr(gpu, "STARTED", time.perf_counter())
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--seconds", "3", "--parts", "small", "tests"])
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "gpu.md").read_text() == printed
    assert "Not complete: ended at its time limit\n\nT:\n\n| loop | images/s |\n| --- | --- |\n| by hand | 1,234 |" in printed
    assert printed.endswith("`3 passed`\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would measure")
def test_without_a_gpu_it_says_how_to_try_it(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        script("gpu").main()
    assert capsys.readouterr().err.endswith("there is no CUDA device; --tiny shows on a CPU that the script works\n")
