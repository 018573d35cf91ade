"""`load_run`: the model of a run from its folder, with its weights, classes and preprocessing, without the data."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from loopctl.checkpoint.atomic_files import DamagedCheckpoint, read_checkpoint
from loopctl.checkpoint.finding import check_layout, checkpoints_in, latest_first, restore_content
from loopctl.checkpoint.sharded_tensors import check_sharded, load_sharded
from loopctl.checkpoint.state import load_model
from loopctl.checkpoint.weights_file import load_weights
from loopctl.cli import data, models
from loopctl.cli.compare import read_config
from loopctl.composition.discovery import build_plugin, split_head, split_spec
from loopctl.data.dataset import Data, Preprocessing
from loopctl.errors import UsageError, one_line

DATA = "data.json"          # in a run's folder: classes, shape and preprocessing


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What a run has made, and what is needed to use it."""

    model: nn.Module                                    # on the CPU, in eval mode
    classes: tuple[str, ...]                            # the names of the classes by number; empty if there are none
    transforms: Callable[[Any], Tensor] | None          # an image file or a Pillow image -> an input; None if not known
    config: dict[str, Any]                              # the content of run.toml
    shape: tuple[int, ...] | None                       # of one input, without the batch dimension; None if not known
    weights: Path                                       # the file that the weights were read from


def load_run(folder: str | Path, weights: str | Path | None = None) -> SavedRun:
    """Load the model of a run of `loopctl run` from the run's folder. The training data need not be there.

    weights: "best" is checkpoints/best.safetensors, by the metric that the plugin `checkpoint` monitors. "last" is
    weights.safetensors, which is written when the run ends, averaged weights included; of a run that has not ended it
    is the model of the latest checkpoint. A path is a .safetensors file or a checkpoint. None means "best" if there is
    one, otherwise "last".

    A model of the user's own, `package.module:factory` or `file.py:factory`, is built by that code, which is imported;
    a relative path of a file begins in the current folder. Raises UsageError where the run cannot be loaded.
    """
    folder = Path(folder)
    config, described = read_run(folder)
    model = build_model(folder, config["model"], described)
    file = find_weights(folder, config, weights)
    if file.suffix == ".pt":
        load_checkpoint(model, file)
    else:
        load_weights(model, file)
    names = described.class_names or tuple(map(str, range(described.classes or 0)))
    transforms = ImageTransforms(described.preprocessing) if described.preprocessing else None
    return SavedRun(model.eval(), names, transforms, config, described.shape, file)


def read_run(folder: Path) -> tuple[dict[str, Any], Data]:
    """The configuration of the run in `folder`, and its data without the samples.

    Raises UsageError where there is no run, or none whose model can be built from what is there.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; name the folder of a run, such as runs/a")
    config, described = read_config(folder / "run.toml"), read_data(folder / DATA)
    if described is None or not isinstance(config.get("model"), str):
        missing = "run.toml" if not config else DATA if described is None else "model in its run.toml"
        raise UsageError(f"{folder} has no {missing}, so how to build its model is unknown; build it yourself, and "
                         "load the weights with loopctl.load_weights")
    return config, described


def describe_data(described: Data) -> str:
    """What the use of a trained model needs to know of its data, as JSON. `read_data` reads it."""
    images = described.preprocessing
    content = {"classes": list(described.class_names) or described.classes,
               "shape": described.shape and list(described.shape),
               "images": asdict(images) if images and len(images.mean) in (1, 3) else None}
    lines = [f"    {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_data(file: Path) -> Data | None:
    """A Data without samples, from what `describe_data` returned; None if there is no file.

    Raises UsageError where it cannot be read.
    """
    no_samples: Any = ()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        classes, images = content["classes"], content["images"]
        shape = None if content["shape"] is None else tuple(map(int, content["shape"]))
        names = tuple(map(str, classes)) if isinstance(classes, list) else ()
        preprocessing = images and Preprocessing(images["mode"], int(images["resize"]), int(images["crop"]),
                                                 tuple(map(float, images["mean"])), tuple(map(float, images["std"])))
        number: Any = classes if classes is None else len(names) or int(classes)
        return Data(no_samples, no_samples, number, shape, class_names=names, preprocessing=preprocessing)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {type(error).__name__}: {one_line(error)}") from error


def build_model(folder: Path, spec: str, described: Data) -> nn.Module:
    """The model that the run in `folder` has trained, by its `spec`, with weights that are not yet those of the run."""
    source, found, _ = split_head(spec, models.known_names())[0].rpartition(".py:")
    if found and not Path(f"{source}.py").is_file():
        raise UsageError(f"{folder}: its model is made by {source}.py, which is not there; go to the folder where the "
                         f"run was started (this is {Path.cwd()}), or bring the file")
    random = torch.get_rng_state()
    try:
        return models.make(spec, described, logits=False, pretrained=False)
    finally:
        torch.set_rng_state(random)


def find_weights(folder: Path, config: dict[str, Any], weights: str | Path | None) -> Path:
    """The file that `weights` names, as in `load_run`. Raises UsageError where it does not exist."""
    if weights not in (None, "best", "last"):
        if not Path(str(weights)).is_file():
            raise UsageError(f"weights={weights}: there is no such file; use best, last or the path of a file")
        return Path(str(weights))
    folders = [folder / name for name in checkpoint_folders(config)]
    best = [file for file in (where / "best.safetensors" for where in folders) if file.is_file()]
    if weights != "last" and best:
        return best[0]
    if weights == "best":
        raise UsageError(f"there is no {folders[0] / 'best.safetensors'}; use last, or the path of a file")
    final = folder / "weights.safetensors"
    found = [final] if final.is_file() else latest_first(file for where in folders for file in checkpoints_in(where))
    if not found:
        raise UsageError(f"{folder} has no weights yet: neither {final.name} nor a checkpoint")
    return found[0]


def checkpoint_folders(config: dict[str, Any]) -> list[str]:
    """The folders, relative to the run's, in which its plugins `checkpoint` write."""
    plugins = config.get("plugin")
    specs = [str(spec) for spec in (plugins if isinstance(plugins, list) else [])]
    return [build_plugin(spec)[1].dir for spec in specs if split_spec(spec)[0] == "checkpoint"] or ["checkpoints"]


def load_checkpoint(model: nn.Module, file: Path) -> None:
    """Load the weights of the model from a checkpoint. Raises UsageError where it is damaged, or of another model."""
    try:
        saved = restore_content(read_checkpoint(file))
        check_layout(saved)
        if "sharded" in saved:
            check_sharded(saved, file.parent)
            whole: Any = SimpleNamespace(model=model, device=torch.device("cpu"))       # for tensors in one piece
            saved = load_sharded(whole, {key: saved[key] for key in ("model", "sharded")}, file.parent)
        load_model(model, saved["model"])
    except DamagedCheckpoint as error:
        raise UsageError(f"{file} {error}; name another file for the weights") from error
    except RuntimeError as error:
        raise UsageError(f"{file} does not fit the model: {one_line(error)}") from error


class ImageTransforms:
    """Turn an image, a path or a Pillow image, into the input of a model, as in validation."""

    def __init__(self, values: Preprocessing) -> None:
        from torchvision.transforms import v2

        grey = [v2.Grayscale(len(values.mean))] if values.mode == "L" else []
        self.steps = data.transforms(values.mean, values.std,
                                     [*grey, v2.Resize(values.resize), v2.CenterCrop(values.crop)])

    def __call__(self, image: str | Path | Image.Image) -> Tensor:
        """Raises UsageError where a file cannot be read."""
        from loopctl.cli.image_folder import load_image, to_rgb

        if isinstance(image, Image.Image):
            return self.steps(to_rgb(image.copy(), "the image"))        # a copy, because to_rgb may change it
        return self.steps(load_image(str(image)))
