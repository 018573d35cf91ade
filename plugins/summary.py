"""A table of the model's layers, printed after the first step."""
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from loopctl import Run, hookimpl
from loopctl.model.summary import FirstStepLayers, render, table
from loopctl.report.terminal import say


@dataclass(eq=False)
class Summary:
    """Print each layer's output shape, parameters and multiply-adds, and the sizes in memory.

    It makes no forward pass of its own: it records the first micro-batch's and prints after the first step, so the run
    is the same as without it; only torch.compile compiles once more, for the second step. A MiB is 2**20 bytes. It is
    the table of torchsummary (github.com/sksq96/pytorch-summary), except that activations, the outputs of the innermost
    layers, are not doubled for their gradients.

    Multiply-adds are those of one forward pass over the whole micro-batch: of linear and bilinear layers, convolutions,
    recurrent layers and nn.MultiheadAttention, each from its formula and the recorded shapes. Padding and masked
    positions count; biases, norms, activations and look-ups do not. "At least" marks a total that lacks a layer without
    a formula. Functions that a module calls itself, such as F.scaled_dot_product_attention, are not recorded.

    depth: levels of the module tree to show, 1 for the model's direct parts; deeper ones are counted in their parent
    """

    depth: int | None = None
    capturable: ClassVar[bool] = True       # it only records the first step
    rank_zero_only: ClassVar[bool] = True
    topic = "logging and reports"

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth is at least 1, not {self.depth}")

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        with FirstStepLayers() as self.first_step:
            return (yield)

    @hookimpl
    def before_step(self, run: Run) -> None:
        self.first_step.start(run)

    @hookimpl
    def after_step(self) -> None:
        if self.first_step.finish():                # a live progress bar stays below what is printed
            say(render(table(self.first_step.layers, self.depth)))
