"""Models by name for `--model`: small ones for small images, torchvision's, or `package.module:factory`."""
from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopctl.cli.pretrained import load_pretrained, replace_head
from loopctl.cli.specs import at_least_one, at_most, call_factory, factory_arguments, names_in_source, resolve
from loopctl.data.memory import check_memory
from loopctl.errors import UsageError, one_line

if TYPE_CHECKING:
    from torch import nn

    from loopctl import Data

SMALL = ("cnn", "linear", "mlp", "vit")

# Without these options the two return a second output in training mode, and warn that their defaults will change.
SINGLE_OUTPUT = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def known_names() -> list[str]:
    """The names of all models, found without importing torch."""
    return sorted([*SMALL, *torchvision_names()])


def torchvision_names() -> dict[str, str]:
    """The names of torchvision's models and their modules, read from its source: its import would take seconds."""
    return names_in_source("torchvision", "models", r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(")


def make(spec: str, data: Data, logits: bool = True, pretrained: bool = True) -> nn.Module:
    """Return the model that `spec` names, for the classes and the image shape of `data`.

    A factory is passed `num_classes`, `in_channels` and `image_size` if it has arguments of these names, and the data
    has them. With `weights`, a model of torchvision gets a new last layer if the weights are for another number of
    classes.
    logits: whether the model must return one logit per class
    pretrained: false builds a model of torchvision with weights=... without them, for one whose weights are loaded
        next, such as that of a run that resumes.
    Raises UsageError where the model cannot be built, or does not return what it must.
    """
    import torch
    from torch import nn

    from loopctl.cli.deterministic import use_deterministic_pooling
    from loopctl.determinism import WITHOUT_FORM

    small: dict[str, Callable[..., Any]] = {"cnn": cnn, "linear": linear, "mlp": mlp, "vit": vit}
    large = torchvision_names()
    name, factory, options = resolve("model", spec, lambda: [*small, *large],
                                     lambda name: small.get(name) or torchvision_factory(name))
    from_data = {} if data.classes is None else {"num_classes": data.classes}
    if data.shape and len(data.shape) == 3:
        from_data |= {"in_channels": data.shape[0], "image_size": data.shape[-1]}
    weights, file, changes_head = None, None, False
    if name in large:
        classes = {} if data.classes is None else {"num_classes": data.classes}
        if options.get("aux_logits"):
            raise UsageError(f"model {name}: with aux_logits=true it returns a second output in training; leave it out")
        weights = named_weights(name, options, pretrained)
        if weights is None:
            file = options.pop("weights", None)
            options = classes | SINGLE_OUTPUT.get(name, {}) | options
        else:
            changes_head = "num_classes" not in options and data.classes is not None
            options = {"num_classes": len(weights.meta["categories"])} | options
            options.pop("aux_logits", None)
        if not pretrained:
            options = without_weights(name, options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")       # check_output reports it
        warnings.filterwarnings("ignore", WITHOUT_FORM)         # the run logs it
        check_arguments(name, factory, options | from_data)
        if name in small or name in large:
            check_model_memory(name, factory, options, from_data)
        try:
            model = call_factory(f"model {name}", factory, options, from_data)
        except UsageError as error:
            if weights is None or not isinstance(error.__cause__, OSError):
                raise
            raise UsageError(f"model {name}: its weights cannot be downloaded ({one_line(error.__cause__)}); "
                             f"pass a file, as in {name}:weights=FILE") from error
        if not isinstance(model, nn.Module):
            raise UsageError(f"model {name} returned a {type(model).__name__}, not a torch.nn.Module")
        if weights is not None and name == "inception_v3":
            model.aux_logits, model.AuxLogits = False, None      # type: ignore[assignment]   # it has them with its weights
        if changes_head:
            replace_head(f"model {name}", model, data.classes or 0)
        if file is not None and pretrained:
            load_pretrained(f"model {name}", model, str(file))
        if torch.are_deterministic_algorithms_enabled() and (name in small or name in large):
            use_deterministic_pooling(model)
        if logits and data.classes is not None and data.shape:
            check_output(name, model, data)
    return model


def named_weights(name: str, options: dict[str, Any], read: bool) -> Any:
    """Return torchvision's own weights that an option names; None where it names none, or a file.

    Raises UsageError for a name that is neither; not for one that is not to be `read`.
    """
    from torchvision.models import get_model_weights

    given, known = options.get("weights"), get_model_weights(name).__members__
    if given is not None and given not in known and read and not Path(str(given)).exists():
        raise UsageError(f"model {name}: weights takes none, {', '.join(known)} or a file; there is no file {given}")
    return known.get(given) if isinstance(given, str) else None


def check_arguments(name: str, factory: Callable[..., Any], given: dict[str, Any]) -> None:
    """Raise UsageError where a factory needs what neither the options nor the data give, such as `num_classes`."""
    parameters = inspect.signature(factory).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in given
               and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing:
        options = ",".join(f"{key}=..." for key in missing)
        raise UsageError(f"model {name} needs {', '.join(missing)}, which the data does not have; pass "
                         f"--model {name}:{options}, or a model of your own, as in --model file.py:Model")


def torchvision_factory(name: str) -> Callable[..., Any]:
    from torchvision.models import get_model

    return partial(get_model, name, weights=None)


def without_weights(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that give the same model of torchvision without its pretrained weights, which set some of them."""
    from torchvision.models import get_model_weights

    weights = options.get("weights")
    options = {key: value for key, value in options.items() if key != "weights"}
    if weights is None:
        return options
    size = get_model_weights(name)[weights].meta["min_size"]
    set_by_weights: dict[str, Any] = {}
    if name in SINGLE_OUTPUT:
        set_by_weights = {"transform_input": True} | SINGLE_OUTPUT[name]
    elif name.startswith("vit_"):
        set_by_weights = {"image_size": size[0]}
    elif name == "maxvit_t":
        set_by_weights = {"input_size": size}
    return set_by_weights | options


def check_model_memory(name: str, factory: Callable[..., Any], options: dict[str, Any],
                       from_data: dict[str, Any]) -> None:
    """Raise UsageError where weights and gradients exceed memory; their size is computed on the meta device."""
    import torch

    arguments = factory_arguments(factory, options, from_data)
    arguments.pop("weights", None)          # no pretrained weights are loaded on the meta device
    try:
        with torch.device("meta"):
            model = factory(**arguments)
    except Exception:                       # `call_factory` reports it
        return
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    check_memory(f"model {name}: its weights and their gradients", 2 * size, "make it smaller")


def check_output(name: str, model: nn.Module, data: Data) -> None:
    """Run `model` on one image. Raises UsageError where that fails or does not give one logit per class."""
    import torch

    from loopctl.determinism import refusal
    from loopctl.model.eval_mode import eval_mode

    assert data.shape is not None
    shape = "x".join(map(str, data.shape))
    try:
        with eval_mode(model), torch.no_grad():
            output = model(torch.zeros(1, *data.shape, dtype=None if data.numbers else torch.int64))
    except Exception as error:             # a model may raise anything for an image of the wrong shape
        if refused := refusal(error):
            raise UsageError(f"model {name}: {refused}") from error
        advice = "" if name in SMALL else "; the data may have an option for it, such as channels=3 or size=224"
        raise UsageError(f"model {name} cannot take inputs of {shape}: {one_line(error)}{advice}") from error
    if not isinstance(output, torch.Tensor):
        raise UsageError(f"model {name} returned a {type(output).__name__}, not a tensor; return one logit per class")
    if output.shape != (1, data.classes):
        raise UsageError(f"model {name} returned a tensor of shape {tuple(output.shape)} for one sample, but the data "
                         f"has {data.classes} classes; change its last layer so that it is (1, {data.classes})")


def linear(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Multinomial logistic regression: one linear layer on the pixels."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))


def mlp(num_classes: int, in_channels: int, image_size: int, width: int = 128, dropout: float = 0.0) -> nn.Module:
    """A multilayer perceptron with two hidden layers on the pixels.

    width: number of units of each hidden layer
    dropout: probability of dropping a unit, after each hidden layer
    """
    from torch import nn

    at_least_one("model mlp", width=width)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_channels * image_size**2, width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, num_classes))


def cnn(num_classes: int, in_channels: int, width: int = 32, dropout: float = 0.0) -> nn.Module:
    """A convolutional network of four layers in two stages, for images of 8 to 32 pixels.

    width: number of channels of the first stage; the second has twice as many
    dropout: probability of dropping an input of the last layer
    """
    from torch import nn

    def convolution(channels: int, filters: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]

    at_least_one("model cnn", width=width)
    return nn.Sequential(
        *convolution(in_channels, width), *convolution(width, width), nn.MaxPool2d(2),
        *convolution(width, 2 * width), *convolution(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8 * width, num_classes))


def vit(num_classes: int, in_channels: int, image_size: int, patch_size: int | None = None, width: int = 64,
        depth: int = 6, heads: int = 4, dropout: float = 0.0) -> nn.Module:
    """A small torchvision VisionTransformer; patch_size must divide the images' height and width.

    patch_size: height and width of a patch in pixels; 2 for images below 28 pixels, otherwise 4
    width: length of the vector of a patch
    depth: number of layers
    heads: number of attention heads of a layer
    dropout: probability of dropping an element
    """
    from torch import nn
    from torchvision.models import VisionTransformer

    if patch_size is None:
        patch_size = 2 if image_size < 28 else 4
    at_least_one("model vit", patch_size=patch_size, width=width, depth=depth, heads=heads)
    at_most("model vit", 1000, depth=depth)
    if image_size % patch_size:
        raise UsageError(f"model vit: patch_size={patch_size} does not divide the image size of {image_size} pixels")
    model: Any = VisionTransformer(image_size, patch_size, depth, heads, width, 2 * width, dropout,
                                   num_classes=num_classes)
    if in_channels != 3:
        model.conv_proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
    return model
