"""A run that is killed and resumed equals an uninterrupted one: benchmarks/kill_resume.py with few kills."""
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("kill_resume_by_tests", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one():
    """Three kills of a run with loader workers, half precision, accumulation, clipping, schedules and weight averaging."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--kills", "3", "--epochs", "6", "--only", "none"],
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal after 3 kills" in done.stdout


def test_a_run_that_takes_longer_than_the_limit_is_ended(script, tmp_path):
    process = script.start([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path)
    with pytest.raises(AssertionError, match="^a run took longer than --limit and was ended$"):
        script.finish(process, tmp_path, time.monotonic())
    assert process.returncode == -9
    process = script.start([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path)
    with pytest.raises(AssertionError, match="^a run took longer than --limit and was ended$"):
        script.wait(process, tmp_path / "run", [], time.monotonic())
    assert process.returncode == -9
    talks = script.start([sys.executable, "-c", "import sys; sys.stderr.write('x' * 10**6)"], tmp_path)
    assert script.finish(talks, tmp_path, time.monotonic() + 60) == "x" * 10**6


def test_on_a_gpu_both_runs_are_deterministic_and_cudagraph_is_included(script, monkeypatch, capsys):
    programs = []

    def survive(plugins, epochs, kills, folder, draw, more, limit):
        programs.append((plugins[0].partition(":")[0], more, limit))
        return kills, 1.0

    monkeypatch.setattr(script, "survive", survive)
    for words, device in ((["--device", "cuda", "--limit", "9"], "cuda"), ([], "cpu")):
        monkeypatch.setattr(script, "find_device", torch.device)
        monkeypatch.setattr(sys, "argv", ["kill_resume.py", *words])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 0
        assert ("cudagraph" in [name for name, *_ in programs]) == (device == "cuda")
        assert all(program[1:] == ((["--device", "cuda", "--deterministic"], 9.0) if words else (["--device", "cpu"], 600.0))
                   for program in programs)
        programs.clear()
    assert "cudagraph: 3 kills\ncudagraph: equal after 3 kills" in capsys.readouterr().out
