"""A report of the model, layer by layer."""
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

from loopctl import hookimpl, layers


@dataclass(eq=False)
class Summary:
    """Print each layer's output shape, parameters and multiply-adds, and the sizes in memory.

    There is no forward pass for it: it looks on at the first micro-batch and prints after the first step, so the run
    is what it would be without; only torch.compile compiles once more, for the second step. An MB is 2**20 bytes.
    It is the report of torchsummary (github.com/sksq96/pytorch-summary), except that activations, the outputs of the
    innermost layers, are not doubled for their gradients.

    Multiply-adds are those of one forward pass of the micro-batch, all of its samples together: of linear and bilinear
    layers, convolutions, recurrent layers and nn.MultiheadAttention, each from its formula and the shapes seen. Zeros
    from padding and what a mask leaves out count; biases, norms, activations and look-ups do not. "At least" marks a
    total that misses a layer without a formula. What a module computes besides its parts is not seen, such as
    F.scaled_dot_product_attention in a module of one's own.

    depth: levels of the module tree to show, 1 for the model's direct parts; what is deeper is counted in its parent
    """

    depth: int | None = None
    capturable: ClassVar[bool] = True       # it looks on at the first step only
    on_first_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth is at least 1, not {self.depth}")

    @hookimpl(wrapper=True)
    def train(self):
        self.printed = False
        with ExitStack() as self.watching:          # ends in after_step, or here after an exception
            return (yield)

    @hookimpl
    def before_step(self, run):
        # Not in train_start, where a plugin may copy the model: the copy would keep the hooks for ever.
        if not self.printed:
            before = run.outputs                    # each micro-batch sets its own: the first ends when these are gone
            self.layers = self.watching.enter_context(layers.watch(run.model, lambda: run.outputs is before))

    @hookimpl
    def after_step(self):
        if not self.printed:
            self.watching.close()
            report = layers.table(self.layers, self.depth)
            print(layers.text(report))              # a live progress bar stays below what is printed
            self.printed = True
