"""Logs for MLflow."""
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import Any, ClassVar

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import save_weights
from loopctl.checkpoint.sharded_tensors import is_sharded
from loopctl.checkpoint.state import run_config
from loopctl.metrics.step_values import StepLogger, step_loss
from loopctl.optim.learning_rate import step_rates
from loopctl.report.terminal import one_line

LONGEST = 6000          # characters of a parameter's value, which MLflow refuses beyond


@dataclass(eq=False)
class Mlflow(StepLogger):
    """Log metrics, learning rates, the configuration and the final weights to MLflow.

    It is the library mlflow or mlflow-skinny: `pip install 'loopctl[mlflow]'`. All metrics are logged at every
    evaluation, the loss and the learning rates of a step every so many steps, and what `norms` measures; the options of
    the run are its parameters. Values are sent in the background, and no step waits for the device. When training is
    over, the weights are logged as model/weights.safetensors, unless they are sharded.

    A resumed run continues the run that its checkpoint names, and logs no step twice; options that have changed are its
    tags. The status is FAILED after an error, KILLED after a signal or Ctrl-C, and SCHEDULED where the run is to be
    resumed.

    experiment: the experiment; it is made if there is none of this name
    name: of the run; that of the run's folder if left out
    tracking_uri: the server or the store; what MLFLOW_TRACKING_URI says, or MLflow's default, if left out
    every_steps: how often to log the loss and the learning rates of a step
    model: log the final weights
    system_metrics: log the load of processors, memory, disk and network, and of GPUs; needs the package psutil
    """

    experiment: str = "loopctl"
    name: str = ""
    tracking_uri: str = ""
    every_steps: int = 50
    model: bool = True
    system_metrics: bool = False
    rank_zero_only: ClassVar[bool] = True
    failures: ClassVar[tuple[type[Exception], ...]] = (Exception,)      # a server that is away costs no training
    topic = "logging and reports"

    @hookimpl
    def train_start(self, run: Run) -> None:
        try:
            import mlflow
            import mlflow.entities
        except ImportError:
            raise UsageError("mlflow is not installed; install it with: pip install 'loopctl[mlflow]'") from None
        self.library, self.id = mlflow, ""      # a checkpoint replaces the id
        self.monitor: Any = None
        self.sent: list[Any] = []               # batches on their way
        self.known: dict[str, int] = {}         # the last step of each metric, of an earlier part of a resumed run
        try:
            self.client = mlflow.MlflowClient(self.tracking_uri or None)
            found = self.client.get_experiment_by_name(self.experiment)
            self.experiment_id = found.experiment_id if found else self.client.create_experiment(self.experiment)
        except Exception as error:
            raise UsageError(f"MLflow cannot be used ({one_line(error)}); start its server, or choose another "
                             "tracking_uri") from error

    def begin(self, run: Run) -> None:
        config = {key: str(value)[:LONGEST] for key, value in (run.config or run_config(run)).items()}
        entities = self.library.entities
        if self.id:
            before = self.client.get_run(self.id).data
            self.known = {name: max(point.step for point in self.client.get_metric_history(self.id, name))
                          for name in before.metrics}
            self.client.update_run(self.id, status="RUNNING")
            for key, value in config.items():
                if before.params.get(key) != value:         # MLflow refuses another value of a parameter
                    self.client.set_tag(self.id, f"{key} from step {run.attempts}", value)
        else:
            name = self.name or run.out.resolve().name
            self.id = self.client.create_run(self.experiment_id, run_name=name).info.run_id
            self.client.log_batch(self.id, params=[entities.Param(key, value) for key, value in config.items()])
        if self.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
            self.monitor = SystemMetricsMonitor(self.id, resume_logging=bool(self.known),
                                                tracking_uri=self.tracking_uri or None)
            self.monitor.start()

    def values(self, run: Run) -> dict[str, Any]:
        return {"epoch": run.epochs_done, **step_loss(run, "step_loss"), **step_rates(run.optimizer)}

    def write_values(self, run: Run, step: int, values: Mapping[str, Any]) -> None:
        now = int(time() * 1000)
        named = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}     # what MLflow takes
        metrics = [self.library.entities.Metric(name, float(value), now, step) for name, value in named.items()
                   if step > self.known.get(name, -1)]
        if metrics:
            self.sent.append(self.client.log_batch(self.id, metrics=metrics, synchronous=False))

    def log_values(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Log values that another plugin has measured in a step."""
        if self.begun:
            self.attempt(self.write_values, run, step, values)

    def write_metrics(self, run: Run) -> None:
        self.write_values(run, run.attempts, {name: value for name, value in run.metrics.items()
                                              if isinstance(value, int | float)})
        self.flush()

    def flush(self) -> None:
        sent, self.sent = self.sent, []
        for batch in sent:
            batch.wait()                        # raises what has gone wrong in the background

    def end(self, run: Run, error: BaseException | None) -> None:
        if self.monitor:
            self.monitor.finish()
        self.flush()
        if self.model and not error and not run.leaving and not any(map(is_sharded, run.model.parameters())):
            with TemporaryDirectory() as folder:
                save_weights(run.model, Path(folder) / "weights.safetensors")
                self.client.log_artifact(self.id, str(Path(folder) / "weights.safetensors"), "model")
        status = "FAILED" if isinstance(error, Exception) else "KILLED" if error else (
            "SCHEDULED" if run.leaving else "FINISHED")
        self.client.set_terminated(self.id, status)

    def target(self) -> str:
        return f"the run {self.id}"

    def state_dict(self) -> dict[str, Any]:
        return {"id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.id = state["id"]
