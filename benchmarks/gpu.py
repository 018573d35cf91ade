"""What a GPU shows, in one call of at most six minutes: speed, its limit, JPEGs, the tests, kill and resume.

    python benchmarks/gpu.py                            all parts; the report is printed at the end
    python benchmarks/gpu.py --out gpu.md               and written to a file, after each part
    python benchmarks/gpu.py --parts resnet50 small     only these
    python benchmarks/gpu.py --tiny                     a few small batches on whatever there is: that the script works
    python benchmarks/gpu.py --part jpegs --seconds 90  one part in this process, which prints its records

resnet50      ResNet-50 on batches of 128 pictures of 224 x 224 from pinned memory, SGD with momentum, autocast: the
              complete ImageNet program but for reading files
small         ResNet-18 and a vision transformer on 32 x 32, in loopctl and in other libraries
others        the first part's work in other libraries: pip install lightning accelerate transformers
limit         the best composition that tune finds for these networks
jpegs         ResNet-50 from a folder of JPEGs of 500 x 375, a worker per core
kill_resume   benchmarks/kill_resume.py on the device
tests         the tests that need a GPU

Each part is a process of its own with a time limit. One that fails, hangs or is late is ended with all that it has
started; what it has found by then is in the report, and the others go on. A part that ends early leaves its time to the
next. The last two measure no speed, so they run side by side, and with --tiny all do.
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from gpu_report import report
from watch import Outcome, run

STARTED = time.perf_counter()           # before torch is imported, since the limits include that
HERE = Path(__file__).parent
LIMITS = {"resnet50": 40, "small": 60, "others": 25, "limit": 90, "jpegs": 65}      # seconds, one after the other
CHECKS = 80                                                                         # seconds, for both side by side
SECONDS, SECONDS_TINY = 360, 120


def main() -> None:
    names = [*LIMITS, "kill_resume", "tests"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=names, choices=names, metavar="PART")
    parser.add_argument("--part", choices=LIMITS, help="run one part in this process, without a watch")
    parser.add_argument("--seconds", type=float,
                        help=f"of all parts ({SECONDS}, or {SECONDS_TINY} with --tiny), or of --part")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the report to this file (default: $OUT/gpu.md, if set)")
    args = parser.parse_args()
    import gpu_parts
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("there is no CUDA device; --tiny shows on a CPU that the script works")
    if args.part:
        # It plans with less than its limit, which includes its end.
        until = STARTED + 0.9 * (args.seconds or LIMITS[args.part])
        return gpu_parts.PARTS[args.part](gpu_parts.Work(args.tiny, device, until))
    seconds = args.seconds or (SECONDS_TINY if args.tiny else SECONDS)
    file = args.out or (Path(os.environ["OUT"], "gpu.md") if os.environ.get("OUT") else None)
    about, outcomes, until = gpu_parts.machine(), dict[str, Outcome](), STARTED
    try:
        for stage, share in stages(device, args.tiny):
            if chosen := [name for name in stage if name in args.parts]:
                until += share * seconds
                left = until - time.perf_counter()
                commands = {name: [word.replace("{seconds}", f"{left:.1f}") for word in stage[name]] for name in chosen}
                run(commands, left, HERE.parent, outcomes)
                if file:
                    file.write_text(report(about, outcomes))
    finally:
        print(report(about, outcomes), end="", flush=True)


def stages(device: str, tiny: bool) -> list[tuple[dict[str, list[str]], float]]:
    """The commands that run side by side, stage by stage, and each stage's share of the time."""
    timed = {name: [sys.executable, str(HERE / "gpu.py"), "--part", name, "--seconds", "{seconds}", *["--tiny"] * tiny]
             for name in LIMITS}
    pytest = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:benchmark"]
    kills = [sys.executable, str(HERE / "kill_resume.py"), *["--device", device] * (device != "cpu")]
    if tiny:
        checks = {"kill_resume": [*kills, "--kills", "0", "--each", "1", "--only", "clip"],
                  "tests": [*pytest, "-q", "--co", "tests/plugins/test_cudagraph.py"]}
        return [(timed | checks, 1.0)]
    checks = {"kill_resume": [*kills, "--kills", "2", "--epochs", "6", "--each", "1", "--only",
                              "cudagraph,amp,prefetch,channels_last"],
              # -v, so that the names of failures are known also where pytest is ended before it lists them.
              "tests": [*pytest, "-v", "-n", "8"]}
    whole = sum(LIMITS.values()) + CHECKS
    return [*(({name: timed[name]}, LIMITS[name] / whole) for name in LIMITS), (checks, CHECKS / whole)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that nothing is left behind, and it reports
    main()
