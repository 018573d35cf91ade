"""Knowledge distillation: train with the outputs and the features of a teacher."""
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

import loopctl
from loopctl import Run, UsageError, hookimpl
from loopctl.data.batch import sample_count
from loopctl.model.features import FeaturePairs, described
from loopctl.model.forward import outputs_of
from loopctl.report.terminal import one_line
from loopctl.rng import rng_state, set_rng_state


@dataclass(eq=False)
class Distill:
    """Train the model to give the outputs of a teacher, another model that is trained already.

    The distillation of Hinton, Vinyals and Dean, arXiv:1503.02531: the loss is alpha * temperature**2 * KL, the
    Kullback-Leibler divergence of the model's distribution over the classes from the teacher's, both softened by the
    temperature, plus (1 - alpha) * the loss of the run. Each position of the outputs counts, such as a pixel or token.
    With features it adds their mean squared errors, as the hints of FitNets, arXiv:1412.6550. Both are logged, as
    train_distill and train_features; validation has the loss of the run alone.

    The teacher is in evaluation mode, on the run's device and in its precision, and has no gradients. It is no part of
    checkpoints, so a resumed run needs it again. It gets the batches of the model, so it must expect the same inputs.

    teacher: folder of a run, whose best weights are used, or the teacher as package.module:name or file.py:name, a
        module or a function that returns one; from Python the module itself, which is then put into evaluation mode
    temperature: divides the outputs, above 0; the larger, the more the smaller probabilities count
    alpha: the share of the teacher's outputs in the loss, 0 to 1; with 1, the targets of the data have no effect, and
        with 0 only features count
    dim: the dimension of the outputs that has the classes; -1 for language models, whose outputs have them last
    features: modules of the model, by name or glob, with those of the teacher whose outputs theirs should equal, such
        as layer3=layer3 or blocks.?=blocks.1?, which are paired in order
    feature_weight: what the mean squared error of the features is multiplied by
    """

    teacher: Callable[..., Any] | str
    temperature: float = 4.0
    alpha: float = 0.9
    dim: int = 1
    features: dict[str, str] = field(default_factory=dict)
    feature_weight: float = 1.0
    capturable: ClassVar[bool] = True
    topic = "data and losses"

    def __post_init__(self) -> None:
        if isinstance(self.teacher, str):
            self.teacher = str(Path(self.teacher).absolute())        # a resumed run may be started elsewhere
        if not self.temperature > 0:
            raise ValueError(f"temperature is above 0, not {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is between 0 and 1, not {self.alpha}")
        if not self.feature_weight > 0:
            raise ValueError(f"feature_weight is above 0, not {self.feature_weight}")
        if not (self.alpha or self.features):
            raise ValueError("with alpha=0 and without features, nothing of the teacher is used; use a larger alpha")

    @hookimpl
    def setup(self, run: Run) -> None:
        if run.carries_state or run.turns:
            raise UsageError("forward carries a state, or there are several; distill needs one function (model, batch)")
        random = rng_state()            # a teacher may be built with random weights before its own are loaded
        try:
            self.module = load_teacher(self.teacher)
        finally:
            set_rng_state(random)
        if {*self.module.parameters()} & {*run.model.parameters()}:
            raise UsageError("the teacher shares parameters with the model; pass a copy of it")
        self.module.to(run.device).eval()
        self.pairs = FeaturePairs(self.features, run.model, self.module)

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        with self.pairs.recorded():
            return (yield)

    # The innermost wrapper, so that the teacher computes under the autocast of any other.
    @hookimpl(wrapper=True, trylast=True)
    def compute_loss(self, run: Run, batch: Any) -> Generator[None, Tensor, Tensor]:
        try:
            loss = yield
            if not torch.is_grad_enabled():         # an evaluation
                return loss
            with torch.no_grad():
                target = outputs_of(run, self.module, batch)
            scale = sample_count(batch) if run.reduction == "sum" else 1
            if self.alpha:
                loss = self.alpha * self.distance(run, run.outputs, target) + (1 - self.alpha) * loss
            if self.features:
                error = self.pairs.error()
                run.log("features", error)
                loss = loss + self.feature_weight * (scale * error)
            return loss
        finally:
            self.pairs.clear()

    def distance(self, run: Run, own: Any, target: Any) -> Tensor:
        """The part of the loss that is the distance of the outputs `own` of the model from those of the teacher."""
        if not isinstance(own, Tensor) or getattr(target, "shape", None) != own.shape:
            raise UsageError(f"the teacher gives {described(target)} for a batch, and the model {described(own)}; both "
                             "have to give a tensor, with the same classes")
        if self.dim not in range(-own.ndim, own.ndim) or own.shape[self.dim] == 1:
            raise UsageError(f"the outputs are {described(own)}, without classes in dimension {self.dim}; choose "
                             "another dim, or features with alpha=0")
        logs, wanted = (log_softmax(outputs / self.temperature, self.dim) for outputs in (own, target))
        # For outputs (N, C) it is reduction="batchmean"; for others, such as (N, C, H, W), the mean over all positions.
        count = own.numel() // own.shape[self.dim]
        distance = self.temperature ** 2 * (kl_div(logs, wanted, reduction="sum", log_target=True) / count)
        run.log("distill", distance)
        return count * distance if run.reduction == "sum" else distance


def load_teacher(teacher: Any) -> nn.Module:
    """The model of a run's folder, or the module that `teacher` is or returns. Raises UsageError for another result."""
    if isinstance(teacher, str):
        return loopctl.load_run(teacher).model
    try:
        module = teacher if isinstance(teacher, nn.Module) else teacher()
    except Exception as error:              # a function of the user may raise anything
        raise UsageError(f"teacher: {getattr(teacher, '__name__', teacher)} cannot be called without arguments "
                         f"({one_line(error)}); name a module, or a function that returns one") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"teacher is a {type(module).__name__}, not a torch.nn.Module; name one, or a function that "
                         "returns one")
    return module
