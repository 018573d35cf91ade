"""Compilation of the model with torch.compile."""
import logging
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from loopctl import Run, UsageError, hookimpl
from loopctl.model import summary

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")       # the modes that use CUDA graphs


@dataclass(eq=False)
class Compile:
    """Compile the forward and backward passes of the model.

    Same as torch.compile. run.model stays uncompiled, so checkpoints, parameter patterns and weight averages have its
    own parameter names. The first batch is slow, in training and in evaluation, because it compiles. So is the first
    batch of another size, after which any size works. A changing learning rate, weight averages and clipping do not
    recompile; unfreezing parameters does.

    backend: compiler; inductor needs a C++ compiler on a CPU; aot_eager and eager need none and give no speedup, but
        help to find out which part causes an error
    mode: with inductor, default or a mode that compiles longer; reduce-overhead and max-autotune use CUDA graphs, which
        allow one backward pass per step
    dynamic: true compiles for any size from the start, false recompiles for each size; if left out, the second size
        compiles for any size
    fullgraph: raise an error if the model has graph breaks
    per_block: compile each repeated block of the model separately, such as the layers of a transformer; compiles faster
    """

    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    dynamic: bool | None = None
    fullgraph: bool = False
    per_block: bool = False
    topic = "precision and speed"

    def __post_init__(self) -> None:
        if self.mode and self.backend != "inductor":
            raise ValueError(f"mode is an option of inductor, not of {self.backend}; leave out mode or backend")
        self.cuda_graphs = self.mode in CUDA_GRAPHS or self.backend == "cudagraphs"
        self.capturable = not self.cuda_graphs

    @hookimpl
    def wrap_model(self, run: Run) -> None:
        self.settings: dict[str, Any] = {"backend": self.backend, "mode": self.mode, "dynamic": self.dynamic,
                                         "fullgraph": self.fullgraph}
        self.blocks = summary.repeated_blocks(run.model) if self.per_block else []
        if self.per_block and not self.blocks:
            raise UsageError("per_block: the model has no repeated blocks; leave out per_block")
        if self.cuda_graphs:
            self.check_one_backward_per_step(run)
        if self.backend not in torch.compiler.list_backends(exclude_tags=()):
            backends = ", ".join(["aot_eager", "eager", *torch.compiler.list_backends()])
            raise UsageError(f"no backend is called {self.backend!r}; choose one of {backends}")
        if not self.blocks:
            run.network = torch.compile(run.network, **self.settings)

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        try:
            # torch stops compiling a forward method after a number of recompilations. All blocks of a class, and all
            # runs in this process, share that limit.
            with quiet_compiler(), torch._dynamo.config.patch(recompile_limit=64):
                for block in self.blocks:
                    block.compile(**self.settings)
                return (yield)
        except torch._dynamo.exc.TorchDynamoException as error:
            message = " ".join(str(error).partition("\n\n")[0].split())[:300].rstrip(".")
            raise UsageError(f"{message}; {self.suggestion(message)}") from error
        finally:
            for block in self.blocks:
                block._compiled_call_impl = None

    # torch would use the code that it has compiled for a model without hooks, in an earlier run of this process, for a
    # like model with hooks, and leave these out.
    @hookimpl
    def train_start(self, run: Run) -> None:
        if any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules()):
            torch._dynamo.reset()

    def check_one_backward_per_step(self, run: Run) -> None:
        """Raise UsageError if a plugin makes several backward passes in a step."""
        several = any(micro_batches > steps for steps, micro_batches in run.planned.per_epoch)
        grouping = replacing(run, "group_batches") if several else []
        if plugins := replacing(run, "micro_step") or grouping:
            raise UsageError(f"{self.mode or self.backend} uses CUDA graphs, in which a second backward pass of a step "
                             f"overwrites the gradients of the first, and {plugins[0]} makes several backward passes; "
                             "use mode=max-autotune-no-cudagraphs")

    def suggestion(self, message: str) -> str:
        """What to do about an error of torch.compile."""
        if "C++ compiler" in message:
            return "install g++, or use backend=aot_eager, which needs none"
        if self.fullgraph:
            return "use fullgraph=false"
        return "leave out compile to see whether the model itself fails"


def replacing(run: Run, hook: str) -> list[str]:
    """The names of the plugins that replace `hook`."""
    return [impl.plugin_name for impl in run.hook.hookimpls
            if impl.function.__name__ == hook and not impl.wrapper and impl.plugin_name in run.hook.plugins]


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Suppress what torch's compiler says of itself in the block, and not of the model.

    That the CUDA toolkit is installed but there is no GPU; that inductor imports something deprecated (torch 2.9 to
    2.12); and, by the hundred, that the range of a power is not known (torch 2.8 to 2.12).
    """
    toolkit, ranges = logging.getLogger("torch.utils.cpp_extension"), logging.getLogger("torch.utils._sympy.interp")
    level = toolkit.level
    toolkit.setLevel(logging.ERROR)
    ranges.addFilter(of_no_power)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is ")
            yield
    finally:
        ranges.removeFilter(of_no_power)
        toolkit.setLevel(level)


def of_no_power(record: logging.LogRecord) -> bool:
    return "failed while executing pow_by_natural(" not in record.getMessage()
