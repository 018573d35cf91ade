"""Train one work with one library, in this process, and write what came of it: `cell.py LIBRARY WORK FOLDER PART`."""
from __future__ import annotations

import json
import os
import random
import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if sys.path[0] == str(HERE):            # the folders here have the names of libraries
    sys.path.append(sys.path.pop(0))
elif str(HERE) not in sys.path:
    sys.path.append(str(HERE))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import works  # noqa: E402
from works import WORKS, Work  # noqa: E402

from loopctl.tape import record  # noqa: E402

ENDS = {works.NotOffered: "not offered", works.NeedsGpu: "needs a GPU"}


def load_script(library: str, work: str) -> Any:
    """The function `train` of a script."""
    spec = spec_from_file_location(f"acid_{library}_{work}", HERE / library / f"{work}.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module         # as the checks for types of some libraries need
    spec.loader.exec_module(module)
    return module.train


def seed() -> None:
    """Set the random-number generators of Python, NumPy and torch."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def train_cell(library: str, name: str, folder: Path, part: int = 0, rank: int = 0) -> dict[str, Any]:
    """Train a work, with its tape in `folder`; return how it ended, the results, and what was said where it failed."""
    work: Work = WORKS[name]
    work.folder, work.part = folder / "scratch", part
    work.folder.mkdir(exist_ok=True, parents=True)
    model = work.make_model().train()
    try:
        train = load_script(library, name)
        seed()                  # after the imports, which may draw random numbers
        with record(folder / "updates.tape", model, resume=part == 2) as tape:
            results = train(work, model, tape) or {}
    except tuple(ENDS) as end:
        return {"end": ENDS[type(end)], "text": str(end)}
    except Exception:
        return {"end": "failed", "text": traceback.format_exc()}
    return {"end": "trained", "results": {key: value.tolist() if isinstance(value, torch.Tensor) else value
                                          for key, value in results.items()}}


def main() -> None:
    library, name, folder, part = sys.argv[1:]
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    outcome = train_cell(library, name, Path(folder), int(part), rank)
    (Path(folder) / f"outcome-{rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
