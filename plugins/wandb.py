"""Logs for Weights & Biases."""
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import claim_output
from loopctl.checkpoint.state import run_config
from loopctl.metrics.step_values import StepLogger, step_loss
from loopctl.optim.learning_rate import step_rates
from loopctl.report.terminal import one_line


@dataclass(eq=False)
class Wandb(StepLogger):
    """Log metrics, learning rates and the configuration to Weights & Biases.

    It is the library wandb: `pip install 'loopctl[wandb]'`. All metrics are logged at every evaluation, the loss and
    the learning rates of a step every so many steps, and what `norms` measures. The horizontal axis of the charts
    counts updates made and skipped. No step waits for the device. Files are in wandb/ in the run's folder.

    A resumed run continues the run that its checkpoint names. The steps that it makes again have the same values and
    the same places in the charts. Of a run in mode=offline each part has a folder of its own; `wandb sync --append`
    puts them together. The run is marked as failed after an error. wandb takes its other settings, such as the entity,
    from environment variables.

    project: the project
    name: of the run; that of the run's folder if left out
    mode: online, offline, or disabled; auto is what the environment variable WANDB_MODE says, or online
    every_steps: how often to log the loss and the learning rates of a step
    """

    project: str = "loopctl"
    name: str = ""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    every_steps: int = 50
    rank_zero_only: ClassVar[bool] = True
    failures: ClassVar[tuple[type[Exception], ...]] = (Exception,)      # a service that is away costs no training
    topic = "logging and reports"

    @hookimpl
    def train_start(self, run: Run) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError("wandb is not installed; install it with: pip install 'loopctl[wandb]'") from None
        self.library, self.id = wandb, secrets.token_hex(4)     # a checkpoint replaces the id
        # wandb itself would write to a temporary folder instead.
        claim_output(run.out / "wandb", True, "folder of the run", list)

    def begin(self, run: Run) -> None:
        run.out.mkdir(parents=True, exist_ok=True)
        try:
            self.session = self.library.init(
                project=self.project, name=self.name or run.out.resolve().name, id=self.id, resume="allow",
                dir=str(run.out), config=run.config or run_config(run), mode=None if self.mode == "auto" else self.mode,
                reinit="create_new", settings=self.library.Settings(console="off"))     # it leaves stdout alone
        except Exception as error:
            raise UsageError(f"wandb cannot start a run ({one_line(error)}); log in with `wandb login`, or use "
                             "mode=offline") from error
        # A step is a value like others, and the axis of the charts: wandb refuses a step of its own that goes back,
        # as it does after a resume.
        self.session.define_metric("step")
        self.session.define_metric("*", step_metric="step")

    def values(self, run: Run) -> dict[str, Any]:
        return {"epoch": run.epochs_done, **step_loss(run, "step_loss"), **step_rates(run.optimizer)}

    def write_values(self, run: Run, step: int, values: Mapping[str, Any]) -> None:
        self.session.log({"step": step, **values})

    def log_values(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Log values that another plugin has measured in a step."""
        if self.begun:
            self.attempt(self.write_values, run, step, values)

    def write_metrics(self, run: Run) -> None:
        numbers = {name: value for name, value in run.metrics.items() if isinstance(value, int | float)}
        self.write_values(run, run.attempts, {"epoch": run.epochs_done} | numbers)

    def end(self, run: Run, error: BaseException | None) -> None:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else int(error is not None)
        self.session.finish(exit_code=code)

    def target(self) -> str:
        return f"the run {self.id}"

    def state_dict(self) -> dict[str, Any]:
        return {"id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.id = state["id"]
