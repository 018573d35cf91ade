"""`run.log`: means of named values over an epoch, weighted as the loss is."""
import csv
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import UsageError, fit, hookimpl

SGD = partial(torch.optim.SGD, lr=0.1)
SIZES = (4, 4, 2, 4)


def data(sizes=SIZES):
    torch.manual_seed(0)
    return [(torch.randn(size, 3), torch.randn(size, 1)) for size in sizes]


def model():
    torch.manual_seed(1)
    return nn.Linear(3, 1)


class LogsInput:
    """Log the mean of the inputs of each micro-batch."""

    observer_only = True

    @hookimpl(wrapper=True)
    def compute_loss(self, run, batch):
        loss = yield
        run.log("input", batch[0].mean())
        return loss


def logs_at(hook):
    """A plugin that logs the number of the step at a hook."""
    def log(self, run):
        run.log("number", float(run.attempts))

    log.__name__ = hook
    return type("Logs", (), {hook: hookimpl(log), "observer_only": True})()


def weighted_mean(values, weights):
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


INPUTS = [x.double().mean().item() for x, _ in data()]


@pytest.mark.parametrize("plugins", [[], ["accumulate:every=2"], ["sam"], ["ema"], ["amp:dtype=bfloat16"], ["ddp"]])
def test_a_logged_value_is_a_mean_weighted_by_samples(plugins):
    run = fit(model(), nn.MSELoss(), SGD, data(), valid=data()[1:], epochs=2, plugins=[*plugins, LogsInput()])
    for row in run.history:
        assert row["train_input"] == pytest.approx(weighted_mean(INPUTS, SIZES), rel=1e-6)      # float32 means
        assert row["val_input"] == pytest.approx(weighted_mean(INPUTS[1:], SIZES[1:]), rel=1e-6)


def test_a_part_of_a_split_batch_weighs_its_samples():
    run = fit(model(), nn.MSELoss(), SGD, data((5, 3)), plugins=[LogsInput(), "split:into=2"])
    inputs = torch.cat([x for x, _ in data((5, 3))]).double()
    assert run.history[-1]["train_input"] == pytest.approx(inputs.mean().item(), rel=1e-6)


@pytest.mark.parametrize("hook", ["before_step", "after_backward", "grads_ready", "after_step"])
def test_a_value_of_a_step_weighs_what_the_step_does(hook):
    run = fit(model(), nn.MSELoss(), SGD, data(), plugins=[logs_at(hook), "accumulate:every=3"])
    first = 1.0 if hook == "after_step" else 0.0
    assert run.history[-1]["train_number"] == pytest.approx(weighted_mean([first, first + 1], [10, 4]))


def test_a_closure_that_is_called_again_logs_once():
    values = []

    class Logs(LogsInput):
        @hookimpl
        def grads_ready(self, run):
            values.append(float(len(values)))
            run.log("call", values[-1])

    fitted = fit(model(), nn.MSELoss(), SGD, data(), plugins=[Logs(), "sam"])
    assert len(values) == 8
    assert fitted.history[-1]["train_call"] == pytest.approx(weighted_mean(values[::2], SIZES))


def test_forward_may_return_values_to_log():
    def forward(model, batch):
        output = model(batch[0])
        return nn.functional.mse_loss(output, batch[1]), output, {"size": batch[0].abs().mean(), "one": 1}

    run = fit(model(), None, SGD, data(), valid=data()[:1], forward=forward)
    row = run.history[-1]
    sizes = [x.double().abs().mean().item() for x, _ in data()]
    assert row["train_size"] == pytest.approx(weighted_mean(sizes, SIZES), rel=1e-6)
    assert row["val_one"] == 1
    assert row["val_size"] == pytest.approx(sizes[0], rel=1e-6)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("loss", 1.0, "'loss' is the name of the loss"), ("m", 1.0, "'m' is the name of a metric"), ("", 1.0, "use another"),
    ("x", torch.ones(2), r"tensor of shape \(2,\)"), ("x", "text", "returned a str"),
])
def test_a_wrong_name_or_value_is_refused(name, value, message):
    class Logs:
        observer_only = True

        @hookimpl
        def before_step(self, run):
            run.log(name, value)

    with pytest.raises(UsageError, match=message):
        fit(model(), nn.MSELoss(), SGD, data(), metrics={"m": lambda output, target: 0.0}, plugins=[Logs()])


def test_logging_outside_of_a_step_is_discarded():
    class Logs:
        observer_only = True

        @hookimpl
        def train_start(self, run):
            run.log("x", 1.0)

    assert "train_x" not in fit(model(), nn.MSELoss(), SGD, data(), plugins=[Logs()]).history[-1]


def test_logged_values_are_in_the_csv_file(tmp_path):
    fit(model(), nn.MSELoss(), SGD, data(), valid=data(), plugins=[LogsInput(), "csv"], out=tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["train_input"]) == float(row["val_input"]) != 0


def test_a_run_that_is_resumed_within_an_epoch_has_the_same_means(tmp_path):
    class Stops:
        observer_only = True

        @hookimpl
        def safe_point(self, run):
            if run.attempts == 6:
                raise KeyboardInterrupt

    arguments = {"loss_fn": nn.MSELoss(), "optimizer": SGD, "train": data(), "epochs": 3}
    whole = fit(model(), **arguments, plugins=[LogsInput()])
    with pytest.raises(KeyboardInterrupt):
        fit(model(), **arguments, plugins=[LogsInput(), "checkpoint:every_steps=1", Stops()], out=tmp_path)
    resumed = fit(model(), **arguments, plugins=[LogsInput(), "checkpoint:every_steps=1"], out=tmp_path, resume=tmp_path)
    assert resumed.history == whole.history


@pytest.mark.parametrize("monitor", ["train_size", "val_size"])
def test_a_value_that_forward_logs_can_be_monitored(monitor):
    def forward(model, batch):
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        return loss, None, {"size": loss.detach()}

    run = fit(model(), None, SGD, data(), valid=data(), epochs=9, forward=forward,
              plugins=[f"early_stopping:monitor={monitor},mode=max,patience=2"])
    assert run.epoch < 9
    with pytest.raises(UsageError, match=f"monitor={monitor}x: the run has no such metric; did you mean"):
        fit(model(), None, SGD, data(), valid=data(), forward=forward,
            plugins=[f"early_stopping:monitor={monitor}x,mode=max"])


def log_in_processes():
    class Logs(LogsInput):
        @hookimpl
        def before_step(self, run):
            if run.rank:            # a name that only one process has
                run.log("rank", 1.0)

    loader = torch.utils.data.DataLoader([(x, y) for batch in data() for x, y in zip(*batch, strict=True)], batch_size=2)
    return fit(model(), nn.MSELoss(), SGD, loader, epochs=1, plugins=["ddp", Logs()]).history[-1]


def test_logged_values_are_means_over_all_processes(ranks):
    inputs = torch.cat([x for x, _ in data()]).double()
    for row in ranks(2, log_in_processes):
        assert row["train_input"] == pytest.approx(inputs.mean().item(), rel=1e-6)
        assert row["train_rank"] == 1
