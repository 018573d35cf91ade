"""Progressive resizing: train on small images first, and on whole ones at the end."""
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import interpolate

from loopctl import Run, UsageError, hookimpl
from loopctl.data.batch import is_image_batch, iter_tensors, map_nested


@dataclass(eq=False)
class ProgressiveResizing:
    """Train on small images first, and on whole ones at the end, which makes early epochs fast.

    The method is that of fastai and of MosaicML's Composer, whose option names it has. Images, floating-point tensors
    of shape (N, C, H, W), are resized on the device in training; evaluation sees them whole. The size grows linearly
    with the progress of the run. The model must take images of any size, as one with global pooling does.

    initial_scale: the size of the images at the start, as a part of their own
    delay_fraction: the part of the run before the size begins to grow
    finetune_fraction: the part of the run, at its end, with whole images
    size_increment: sizes are multiples of this number of pixels
    mode: resize shrinks images, crop cuts a random part out of them, the same for a batch
    """

    initial_scale: float = 0.5
    delay_fraction: float = 0.5
    finetune_fraction: float = 0.2
    size_increment: int = 4
    mode: Literal["resize", "crop"] = "resize"

    keeps_sample_count: ClassVar[bool] = True
    topic = "data and losses"

    def __post_init__(self) -> None:
        if not 0 < self.initial_scale <= 1:
            raise ValueError(f"initial_scale is above 0 and at most 1, not {self.initial_scale}")
        if min(self.delay_fraction, self.finetune_fraction) < 0 or self.delay_fraction + self.finetune_fraction > 1:
            raise ValueError("delay_fraction and finetune_fraction are parts of the run, and together at most 1")
        if self.size_increment < 1:
            raise ValueError(f"size_increment is at least 1, not {self.size_increment}")

    @hookimpl
    def transform_batch(self, run: Run, batch: Any) -> Any:
        scale = self.scale(run.progress)
        if not any(map(is_image_batch, iter_tensors(batch))):
            raise UsageError("the batches of this run have no images, floating-point tensors of shape (N, C, H, W); "
                             "leave out progressive_resizing")
        if scale == 1:
            return batch
        places: dict[Any, tuple[int, int]] = {}         # of crops, by size, so that images and masks are cut alike

        def resized(leaf: Any) -> Any:
            if not is_image_batch(leaf):
                return leaf
            whole = leaf.shape[-2], leaf.shape[-1]
            height, width = size = self.size(whole[0], scale), self.size(whole[1], scale)
            if self.mode == "resize":
                return leaf if size == whole else interpolate(leaf, size, mode="bilinear", antialias=True)
            if whole not in places:
                places[whole] = (torch.randint(whole[0] - height + 1, ()).item(),       # type: ignore[assignment]
                                 torch.randint(whole[1] - width + 1, ()).item())
            top, left = places[whole]
            return leaf[..., top:top + height, left:left + width]

        return map_nested(resized, batch)

    def scale(self, progress: float) -> float:
        """The size of the images as a part of their own, at a progress of the run from 0 to 1."""
        growing = 1 - self.delay_fraction - self.finetune_fraction
        if progress >= 1 - self.finetune_fraction:
            return 1.0
        grown = max(0.0, progress - self.delay_fraction) / growing if growing else 0.0
        return self.initial_scale + (1 - self.initial_scale) * grown

    def size(self, pixels: int, scale: float) -> int:
        """The scaled number of pixels, rounded to a multiple of `size_increment`, and at most all of them."""
        return min(pixels, max(1, round(pixels * scale / self.size_increment)) * self.size_increment)
