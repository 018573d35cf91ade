"""CutMix: train on images with a rectangle of another image in them."""
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch

from loopctl import UsageError
from loopctl.data.batch import is_image_batch, iter_tensors, map_nested
from loopctl.model.mixing import Mixing


@dataclass(eq=False)
class Cutmix(Mixing):
    """Train on images with a rectangle of another image in them; targets are mixed by its area.

    Yun et al., arXiv:1905.04899; same numbers as torchvision.transforms.v2.CutMix. The rectangle is cut from the image
    before it in the batch, on the device, and is the same for the whole batch. The loss must take probabilities of the
    classes as targets, as CrossEntropyLoss does. Metrics compare with the true targets.

    alpha: the area that stays is drawn from Beta(alpha, alpha)
    prob: the probability that a batch is changed
    num_classes: the number of classes; left out, that of the outputs of the model's last linear layer
    switch_prob: beside `mixup`, the probability that a batch is cut; otherwise it is mixed. timm calls it so
    """

    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.switch_prob <= 1:
            raise ValueError(f"switch_prob is from 0 to 1, not {self.switch_prob}")

    def mix_inputs(self, inputs: Any, share: float) -> tuple[Any, float]:
        images = [leaf for leaf in iter_tensors(inputs) if is_image_batch(leaf)]
        if len({image.shape[-2:] for image in images}) != 1:
            raise UsageError("cutmix cuts images of one size, floating-point tensors of shape (N, C, H, W), and the "
                             "inputs of this run are not of that kind; leave out cutmix")
        height, width = images[0].shape[-2:]
        x, y, half = torch.randint(width, (1,)).item(), torch.randint(height, (1,)).item(), 0.5 * sqrt(1.0 - share)
        left, right = max(int(x - int(half * width)), 0), min(int(x + int(half * width)), width)
        top, bottom = max(int(y - int(half * height)), 0), min(int(y + int(half * height)), height)

        def cut(leaf: Any) -> Any:
            if not is_image_batch(leaf):
                return leaf
            leaf = leaf.clone()
            leaf[..., top:bottom, left:right] = leaf[..., top:bottom, left:right].roll(1, 0)
            return leaf

        return map_nested(cut, inputs), 1.0 - (right - left) * (bottom - top) / (width * height)
