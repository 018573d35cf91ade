"""A run that is killed without warning ends with the bits of one that was not; the benchmark, in short."""
import subprocess
import sys
from pathlib import Path


def test_a_killed_run_ends_with_the_same_bits():
    """Loader workers, half precision, accumulation, clipping, schedules, an average; three kills, then all compared."""
    script = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"
    done = subprocess.run([sys.executable, str(script), "--kills", "3", "--epochs", "6", "--only", "none"],
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal after 3 kills" in done.stdout
