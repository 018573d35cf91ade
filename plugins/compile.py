"""Compiled models."""
import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from loopctl import Run, UsageError, hookimpl
from loopctl.model import summary

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")       # the modes that use them


@dataclass(eq=False)
class Compile:
    """Compile the model's forward and backward passes.

    It is torch.compile. The model itself stays what it is, so that checkpoints, patterns and averages know its own
    names. The first batch takes the time to compile, in training and in evaluation, and so does the first of another
    size, after which any size will do; a learning rate that moves, averages and clipping compile nothing anew, a thaw
    does.

    backend: what compiles; inductor needs a C++ compiler for a CPU; aot_eager and eager need nothing and speed up
        nothing, which helps to find out whose a failure is
    mode: of inductor: default, or what takes longer to compile; reduce-overhead and max-autotune use CUDA
        graphs, which allow one backward pass per step
    dynamic: compile for any size from the start, or (false) anew for each; from the second size on if left out
    fullgraph: refuse a model that cannot be compiled in one piece
    per_block: compile each of the model's repeated blocks by itself, such as the layers of a transformer; starts faster
    """

    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    dynamic: bool | None = None
    fullgraph: bool = False
    per_block: bool = False

    def __post_init__(self) -> None:
        if self.mode and self.backend != "inductor":
            raise ValueError(f"mode is inductor's, not {self.backend}'s; leave out one of the two")
        self.graphs = self.mode in CUDA_GRAPHS or self.backend == "cudagraphs"
        self.capturable = not self.graphs

    @hookimpl
    def wrap_model(self, run: Run) -> None:
        self.settings: dict[str, Any] = {"backend": self.backend, "mode": self.mode, "dynamic": self.dynamic,
                                         "fullgraph": self.fullgraph}
        self.blocks = summary.repeated_blocks(run.model) if self.per_block else []
        if self.per_block and not self.blocks:
            raise UsageError("per_block: no block of layers is in the model twice; leave out per_block")
        if self.graphs:
            self.check_passes(run)
        if self.backend not in torch.compiler.list_backends(exclude_tags=()):
            there = ", ".join(["aot_eager", "eager", *torch.compiler.list_backends()])
            raise UsageError(f"no backend is called {self.backend!r}; there are {there}")
        if not self.blocks:
            run.network = torch.compile(run.network, **self.settings)

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        try:
            # Blocks of one class share a limit of versions, beyond which torch no longer compiles; so do runs.
            with quiet(), torch._dynamo.config.patch(recompile_limit=64):
                for block in self.blocks:
                    block.compile(**self.settings)
                return (yield)
        except torch._dynamo.exc.TorchDynamoException as error:
            said = " ".join(str(error).partition("\n\n")[0].split())[:300].rstrip(".")
            raise UsageError(f"{said}; {self.way_out(said)}") from error
        finally:
            for block in self.blocks:
                block._compiled_call_impl = None

    def check_passes(self, run: Run) -> None:
        steps, micro_batches = run.plan()
        acting = run.hook.acting
        if who := replacing(run, "micro_step") or (acting["group_batches"] if micro_batches > steps else []):
            raise UsageError(f"with CUDA graphs, as {self.mode or self.backend} uses them, the second backward pass of "
                             f"a step overwrites the gradients of the first, and {who[0]} makes several; use "
                             "mode=max-autotune-no-cudagraphs")

    def way_out(self, said: str) -> str:
        if "C++ compiler" in said:
            return "install g++, or use backend=aot_eager, which needs none"
        if self.fullgraph:
            return "use fullgraph=false"
        return "leave compile out, which shows whether the model itself fails"


def replacing(run: Run, hook: str) -> list[str]:
    """The plugins that replace `hook`."""
    return [impl.plugin_name for impl in run.hook.hookimpls
            if impl.function.__name__ == hook and not impl.wrapper and impl.plugin_name in run.hook.plugins]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from saying that there are CUDA's tools and no GPU."""
    log = logging.getLogger("torch.utils.cpp_extension")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
