"""How long it takes to an answer and to the first step, and how much memory; processes that begin anew, in turns.

    python benchmarks/startup.py [rounds]

By hand it is the same network on the same digits with the same optimizer, in one plain script that says how far it is.
The last two lines of a process are not alike: `loopctl run` evaluates and saves before it ends. Prints a table of
docs/performance.md.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

SAY = """
import json, resource, time
def say(what):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("moment", json.dumps([what, time.time(), time.process_time(), peak]), flush=True)
"""
IMPORTS = SAY + """
import torch
say("torch is imported")
import torchvision
say("torchvision too")
from sklearn.datasets import load_digits
found = load_digits()
images = (torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3053) / 0.3761
targets = torch.tensor(found.target)
say("and the digits are read")
"""
SCRIPT = IMPORTS + """
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
train = torch.arange(len(targets)) % 5 != 0
loader = DataLoader(TensorDataset(images[train], targets[train]), 64, shuffle=True)
def convolution(channels, filters):
    return [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
model = nn.Sequential(
    *convolution(1, 32), *convolution(32, 32), nn.MaxPool2d(2), *convolution(32, 64), *convolution(64, 64),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
loss_fn = nn.CrossEntropyLoss()
say("the network is made")
optimizer = torch.optim.AdamW(model.parameters())
say("the optimizer is made")
for input, target in loader:
    say("the first step begins")
    optimizer.zero_grad()
    loss_fn(model(input), target).backward()
    optimizer.step()
    say("the first step is done")
    break
"""
PLUGIN = SAY + """
from loopctl import hookimpl
class Moments:
    @hookimpl
    def before_step(self, run):
        say("the first step begins")
    @hookimpl
    def after_step(self, run):
        say("the first step is done")
"""
LOOPCTL = [sys.executable, "-m", "loopctl"]
PROCESSES = {
    "`loopctl --help`": [*LOOPCTL, "--help"],
    "`loopctl plugins`": [*LOOPCTL, "plugins"],
    "imports and data alone": [sys.executable, "imports.py"],
    "a script by hand": [sys.executable, "script.py"],
    "`loopctl run`": [*LOOPCTL, "run", "--max-steps", "1", "--plugin", "plugin.py:Moments"],
}


def moments(command: list[str], folder: str) -> list[tuple[str, float, float, float]]:
    """What the process says of itself, and its end: the moment, seconds since its start, its seconds of processor time,
    its memory's peak in MiB."""
    began = time.time()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.time()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    said = [json.loads(line.removeprefix("moment ")) for line in output.splitlines() if line.startswith("moment ")]
    said.append(("it has ended", ended, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024))
    return [(what, at - began, processor, peak) for what, at, processor, peak in said]


def main(rounds: int) -> None:
    found: dict[tuple[str, str], list[list[float]]] = {}
    with TemporaryDirectory() as folder:
        for name, text in (("imports", IMPORTS), ("script", SCRIPT), ("plugin", PLUGIN)):
            Path(folder, f"{name}.py").write_text(text)
        for number in range(rounds + 1):
            for name, command in PROCESSES.items():
                for what, *measured in moments(command, folder):
                    found.setdefault((name, what), []).append(measured)
            print(f"round {number} of {rounds}", file=sys.stderr)
    print("| process | until | seconds | of processor time | peak memory, MiB |\n|---|---|---|---|---|")
    for (name, what), each in found.items():
        seconds, processor, peak = (median(values) for values in zip(*each[1:], strict=True))   # the first fills caches
        print(f"| {name} | {what} | {seconds:.2f} | {processor:.2f} | {peak:,.0f} |")


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 7)
