"""Resume from checkpoints that were changed at random or by an attacker, with a tripwire for code and for other files.

    python benchmarks/fuzz_checkpoints.py               500 of them, half of them sharded
    python benchmarks/fuzz_checkpoints.py --cases 40 --seed 3

Every case changes a copy of a whole checkpoint, gives it a checksum that is right again where an attacker would, and
calls `fit(resume=...)`. Python's audit hook notices every file that is opened outside of the run's folder, and every
import, subprocess, connection or call of `exec`, `eval` and `compile`. Files that safetensors opens are noticed by
their content: a whole copy of the shards lies beside the folder, and no weights may come from there. Exits with status
1 if anything was noticed.
"""
from __future__ import annotations

import argparse
import io
import logging
import os
import pickle
import random
import shutil
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loopctl import UsageError, fit
from loopctl.checkpoint.atomic_files import CHECKSUM_MARK, checksum_comment, read_checkpoint, save_checkpoint
from loopctl.checkpoint.sharded_tensors import file_checksum

WATCHED = ("open", "import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove",
           "os.rename", "subprocess.Popen", "socket.connect", "socket.bind", "ctypes.dlopen", "pickle.find_class",
           "shutil.rmtree")
noticed: list[str] = []
watching: list[Path] = []           # the folder in which files may be opened, while a case runs


def tripwire(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching or event not in WATCHED:
        return
    if event in ("open", "os.remove", "os.rename", "shutil.rmtree"):
        path = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes) else None
        if (path is None or path.resolve().is_relative_to(watching[0]) or path.is_relative_to("/proc")
                or installed(path)):
            return
    if event == "import" and str(arguments[0]).startswith("torch."):        # torch imports its parts when they are used
        return
    if event == "exec":
        source = str(getattr(arguments[0], "co_filename", ""))
        if source == "<string>" or installed(Path(source)):         # functions that loopctl generates for a composition
            return
    if event == "compile" and arguments[1] in ("<string>", b"<string>"):
        return
    noticed.append(f"{event} {arguments!r:.200}")


def installed(path: Path) -> bool:
    """Whether a file is Python code of the interpreter or of an installed package."""
    roots = sys.base_prefix, Path(torch.__file__).parents[1]
    return path.suffix in (".py", ".pyc") and any(path.is_relative_to(root) for root in roots)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    watching.append(folder.resolve())
    try:
        yield
    finally:
        watching.clear()


class RunsCode:
    """Pickled, it runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch CODE_HAS_RUN",)


class WritesAFile:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("CODE_HAS_RUN", "w")


ODD: list[Any] = ["../other", "/etc/passwd", "", None, -1, 2**70, 1e308, float("nan"), [], {}, (), "\0", b"\0",
                  {"loopctl value": "numpy"}, {"loopctl value": "path", "text": "/etc/passwd"}, {"sharded tensor": "0"},
                  {"loopctl value": "os.system"}, torch.ones(0), torch.ones(3, dtype=torch.complex64), [[]] * 3,
                  {"a": {"b": {}}}, True, "step-00000004-1.sharded/.."]


def train(folder: Path, plugins: list[str], resume: Path | None = None, epochs: int = 1) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(5, 4, generator=generator), torch.arange(5) % 2) for _ in range(4)]
    return fit(model, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=0.01), batches, batches[:1], epochs=epochs,
               out=folder, plugins=[*plugins, "ema", "clip", "checkpoint", "cosine"], resume=resume)


def with_checksum(data: bytes) -> bytes:
    """The content of a checkpoint file with a checksum that is right."""
    body = data[:-len(checksum_comment(0))] if CHECKSUM_MARK in data[-40:] else data[:-2]
    return body + checksum_comment(zlib.crc32(b"\0\0", zlib.crc32(body)))


def change_bytes(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 6)):
        data[draw.randrange(len(data))] ^= draw.randint(1, 255)
    file.write_bytes(with_checksum(bytes(data)) if draw.random() < 0.8 else data)


def change_length(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    shorter = draw.random() < 0.5
    part = data[:draw.randrange(len(data))]
    file.write_bytes(part if shorter else data + part)


def put_pickle(file: Path, draw: random.Random) -> None:
    """Put a pickle that runs code in place of the archive's own, or write it as the whole file."""
    value = draw.choice([RunsCode(), WritesAFile(), [RunsCode()], {"loopctl": RunsCode()}])
    code = pickle.dumps(value, protocol=draw.choice([0, 2, 4]))
    if draw.random() < 0.3:
        file.write_bytes(with_checksum(code + b"\0\0"))
        return
    stream = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            own = old.read(name)
            if name.endswith("data.pkl"):
                own = code if draw.random() < 0.5 else own[:-1] + code[2 * (code[:1] == b"\x80"):]
            new.writestr(name, own)
    file.write_bytes(with_checksum(stream.getvalue()))


def change_content(file: Path, draw: random.Random) -> None:
    """Put an odd value somewhere in the content."""
    content = read_checkpoint(file)
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.25:
            place[key] = draw.choice(ODD)
            break
        place = inner
    save_checkpoint(content, file)


def change_shards(file: Path, draw: random.Random) -> None:
    """Change the folder of the shards, their files, their offsets, and their names in the checkpoint."""
    content = read_checkpoint(file)
    folder = file.parent / content["sharded"]["folder"]
    path = next(folder.glob("*.safetensors"))
    kind = draw.randrange(6)
    if kind == 0:
        content["sharded"]["folder"] = draw.choice(["/etc", "../../outside/" + folder.name, folder.name + "/..",
                                                    str(folder.resolve()), "step-1-1.sharded", ".", 7])
    elif kind == 1:
        name = draw.choice(["../../outside/rank-00000.safetensors", "/etc/passwd", ".metadata", "rank-1.pt"])
        content["sharded"]["checksums"] = {name: 0}
    elif kind == 2:
        shutil.rmtree(folder)
        folder.symlink_to(file.parents[1].with_name("outside") / folder.name)
    elif kind == 3:
        path.unlink()
        path.symlink_to(file.parents[1].with_name("outside") / folder.name / path.name)
    elif kind == 4:
        offsets = draw.choice(['{"0": [1000]}', "{}", "[]", '{"0": "x"}', '{"0": [-1]}',
                               "__import__('os').system('touch CODE_HAS_RUN')"])
        save_file(load_file(path), path, metadata={"offsets": offsets})
    else:
        path.write_bytes(draw.choice([pickle.dumps(RunsCode()), b"", b"\xff" * 64, path.read_bytes()[:50]]))
    if kind >= 4:
        content["sharded"]["checksums"] = {path.name: file_checksum(path)}
    save_checkpoint(content, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, outcomes = random.Random(args.seed), Counter[str]()
    logging.getLogger("loopctl").setLevel(logging.ERROR)
    with TemporaryDirectory() as name:
        root = Path(name)
        for kind in ("plain", "fsdp"):
            train(root / kind, ["fsdp"] if kind == "fsdp" else [])
            # Resumed once, so that all modules are imported.
            train(root / kind, ["fsdp"] if kind == "fsdp" else [], root / kind, 2)
            shutil.rmtree(root / kind)
            train(root / kind, ["fsdp"] if kind == "fsdp" else [])
        shutil.copytree(root / "fsdp" / "checkpoints", root / "outside")
        for shards in (root / "outside").glob("*/*.safetensors"):
            tensors = {key: tensor + 1000 for key, tensor in load_file(shards).items()}
            save_file(tensors, shards, metadata=metadata(shards))
        os.chdir(root)
        sys.addaudithook(tripwire)
        for number in range(args.cases):
            kind = ("plain", "fsdp")[number % 2]
            case = root / "case"
            shutil.copytree(root / kind, case)
            file = next((case / "checkpoints").glob("step-*.pt"))
            change = draw.choice([change_bytes, change_length, put_pickle, change_content, change_content]
                                 + [change_shards] * (3 * (kind == "fsdp")))
            change(file, draw)
            with watched(case):
                try:
                    run = train(case, ["fsdp"] if kind == "fsdp" else [], file, 2)
                    outcomes["resumed"] += 1
                    if max(parameter.abs().max().item() for parameter in run.model.parameters()) > 500:
                        noticed.append(f"weights from outside of the folder, case {number}")
                except UsageError:
                    outcomes["refused in one line"] += 1
                except Exception as error:
                    outcomes[f"ended with {type(error).__name__} ({change.__name__})"] += 1
            shutil.rmtree(case)
            if (root / "CODE_HAS_RUN").exists():
                noticed.append(f"code has run, case {number}")
                (root / "CODE_HAS_RUN").unlink()
        os.chdir("/")
    for outcome, count in outcomes.most_common():
        print(f"{count:5}  {outcome}")
    for line in noticed[:20]:
        print("noticed:", line)
    print(f"{args.cases} cases, noticed: {len(noticed)}")
    sys.exit(bool(noticed))


def metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


if __name__ == "__main__":
    main()
