"""Models by name: a few small ones for small images, torchvision's, or `package.module:factory`."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from loopctl.cli.specs import at_least_one, at_most, call, completed, names_in_source, resolve
from loopctl.data.memory import check_memory
from loopctl.errors import UsageError, one_line

if TYPE_CHECKING:
    from torch import nn

    from loopctl import Data

SMALL = ("cnn", "linear", "mlp", "vit")

# Without these the two return a second output while training, and warn of their own defaults.
PLAIN = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def known() -> list[str]:
    """The names, without importing torch."""
    return sorted([*SMALL, *theirs()])


def theirs() -> list[str]:
    """torchvision's models. It is not imported for a name: that takes a second or two, which a small model need not."""
    return names_in_source("torchvision", "models", r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(")


def make(spec: str, data: Data) -> nn.Module:
    """The model that `spec` says, fitted to the classes and the images of `data`.

    A factory is given `num_classes`, `in_channels` and `image_size` where it has arguments of these names.
    Raises UsageError where the model cannot be made, or does not map the images to the classes.
    """
    from torch import nn

    small: dict[str, Callable[..., Any]] = {"cnn": cnn, "linear": linear, "mlp": mlp, "vit": vit}
    large = theirs()
    name, factory, options = resolve("model", spec, lambda: [*small, *large],
                                     lambda name: small.get(name) or large_one(name))
    fitted = {"num_classes": data.classes, "in_channels": data.shape[0], "image_size": data.shape[-1]}
    if name in large:
        from torchvision.models import get_model_weights

        options = {"num_classes": data.classes} | PLAIN.get(name, {}) | options
        if options.get("aux_logits"):
            raise UsageError(f"model {name}: with aux_logits it returns more than scores while training; leave it out")
        weights = list(get_model_weights(name).__members__)
        if options.get("weights") not in (None, *weights):
            raise UsageError(f"model {name}: weights takes none or {', '.join(weights)}, not {options['weights']!r}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")       # trying it out tells
        if name in small or name in large:
            weigh(name, factory, options, fitted)
        model = call(f"model {name}", factory, options, fitted)
        if not isinstance(model, nn.Module):
            raise UsageError(f"model {name} made a {type(model).__name__}, not a torch.nn.Module")
        try_out(name, model, data)
    return model


def large_one(name: str) -> Callable[..., Any]:
    from torchvision.models import get_model

    return partial(get_model, name, weights=None)


def weigh(name: str, factory: Callable[..., Any], options: dict[str, Any], fitted: dict[str, Any]) -> None:
    """Raise UsageError where the model is larger than memory: a model whose tensors are empty shells tells its size."""
    import torch

    shell = {key: value for key, value in completed(factory, options, fitted).items() if key != "weights"}
    try:
        with torch.device("meta"):
            model = factory(**shell)
    except Exception:                       # what is wrong with it is told when it is made
        return
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    check_memory(f"model {name}: its weights and their gradients", 2 * size, "make it smaller")


def try_out(name: str, model: nn.Module, data: Data) -> None:
    """Show `model` one image, so that what does not fit is known before training."""
    import torch

    from loopctl.model.eval_mode import eval_mode

    shape = "x".join(map(str, data.shape))
    try:
        with eval_mode(model), torch.no_grad():
            output = model(torch.zeros(1, *data.shape))
    except Exception as error:             # a model may raise anything at images it was not made for
        ways = "; the data may have an option for it, such as channels=3 or size=224" if name not in SMALL else ""
        raise UsageError(f"model {name} cannot take images of {shape}: {one_line(error)}{ways}") from error
    if not isinstance(output, torch.Tensor):
        raise UsageError(f"model {name} gives a {type(output).__name__} in place of a tensor of scores, one per class")
    if output.shape != (1, data.classes):
        raise UsageError(f"model {name} gives a tensor of shape {tuple(output.shape)} for one image, and the data has "
                         f"{data.classes} classes; it must be (1, {data.classes}), so fit its last layer to them")


def linear(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """One linear layer on the pixels."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))


def mlp(num_classes: int, in_channels: int, image_size: int, width: int = 128, dropout: float = 0.0) -> nn.Module:
    """Two hidden layers on the pixels."""
    from torch import nn

    at_least_one("model mlp", width=width)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_channels * image_size**2, width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, num_classes))


def cnn(num_classes: int, in_channels: int, width: int = 32, dropout: float = 0.0) -> nn.Module:
    """Four convolutions in two stages, for images of 8 to 32 pixels."""
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
    """A small vision transformer: torchvision's, for images whose side patch_size divides."""
    from torch import nn
    from torchvision.models import VisionTransformer

    if patch_size is None:
        patch_size = 2 if image_size < 28 else 4
    at_least_one("model vit", patch_size=patch_size, width=width, depth=depth, heads=heads)
    at_most("model vit", 1000, depth=depth)
    if image_size % patch_size:
        raise UsageError(f"model vit: patch_size={patch_size} does not divide the images' side of {image_size} pixels")
    model: Any = VisionTransformer(image_size, patch_size, depth, heads, width, 2 * width, dropout,
                                   num_classes=num_classes)
    if in_channels != 3:
        model.conv_proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
    return model
