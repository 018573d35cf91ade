"""Mixup: train on weighted means of samples and of their targets."""
from dataclasses import dataclass
from typing import Any

from loopctl.model.mixing import Mixing, blend


@dataclass(eq=False)
class Mixup(Mixing):
    """Train on weighted means of two samples and of their targets.

    Zhang et al., arXiv:1710.09412; same numbers as torchvision.transforms.v2.MixUp. Each sample is mixed with the one
    before it in the batch, on the device, with one weight for the whole batch. The loss must take probabilities of the
    classes as targets, as CrossEntropyLoss does, or numbers. Metrics compare with the true targets. Beside `cutmix`,
    each batch is changed by one of the two, as its option `switch_prob` says.

    alpha: the weight is drawn from Beta(alpha, alpha); small values mix little
    prob: the probability that a batch is mixed
    num_classes: the number of classes; left out, that of the outputs of the model's last linear layer
    """

    alpha: float = 0.2

    def mix_inputs(self, inputs: Any, share: float) -> tuple[Any, float]:
        return blend(inputs, share), share
