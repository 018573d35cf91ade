"""A run that is killed and resumed equals an uninterrupted one: benchmarks/kill_resume.py with few kills."""
import subprocess
import sys
from pathlib import Path


def test_a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one():
    """Three kills of a run with loader workers, half precision, accumulation, clipping, schedules and weight averaging."""
    script = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"
    done = subprocess.run([sys.executable, str(script), "--kills", "3", "--epochs", "6", "--only", "none"],
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal after 3 kills" in done.stdout
