"""What MLflow reads back of what a run has logged, from a local store."""
import contextlib
import sys
import threading

import pytest
from safetensors.torch import load_file
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.mlflow import LONGEST, Mlflow

cross_entropy = nn.CrossEntropyLoss()


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A client of a local store, which is the default one of the plugin."""
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install 'loopctl[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return mlflow.MlflowClient()


def logged(client):
    """The runs of the experiment, the first one last."""
    return client.search_runs([client.get_experiment_by_name("loopctl").experiment_id])


def history(client, run, name):
    """The points of a metric by step: MLflow sends batches in several threads, and does not keep their order."""
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


class Watch:
    def __init__(self):
        self.losses, self.rates = [], []

    @hookimpl
    def after_step(self, run: Run):
        if run.attempts == 1 or run.attempts % 3 == 0:
            self.losses.append((run.attempts, run.loss.item()))
            self.rates.append((run.attempts, float(run.optimizer.param_groups[1]["lr"])))


def test_metrics_losses_rates_options_and_weights(net, batches, valid, sgd, tmp_path, client):
    watch = Watch()
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=2, out=tmp_path / "first",
              plugins=["mlflow:every_steps=3", "layerwise_lr:decay=0.5,no_decay=true", "cosine:by=step", "clip", watch])
    found, = logged(client)
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert history(client, found, name) == [(row["step"], row[name]) for row in run.history]
    assert history(client, found, "step_loss") == watch.losses
    assert history(client, found, "lr_layer 2 _no decay_") == watch.rates           # MLflow takes no brackets
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params["epochs"] == "2"
    assert "clip" in found.data.params["plugin"]
    weights = load_file(client.download_artifacts(found.info.run_id, "model/weights.safetensors", str(tmp_path)))
    assert all(weights[name].equal(value) for name, value in net.state_dict().items())


class Kill:
    def __init__(self, at, error):
        self.at, self.error = at, error

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == self.at:
            raise self.error


def test_a_resumed_run_continues_the_same_run_with_each_step_once(net, batches, valid, clone, sgd, tmp_path, client):
    def train(model, out, *more, epochs=2, **settings):
        return fit(model, cross_entropy, sgd, batches, valid, epochs=epochs, seed=1, out=out,
                   plugins=["checkpoint:every_steps=5", "mlflow:every_steps=2", *more], **settings)

    train(clone(net), tmp_path / "whole", epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train(clone(net), tmp_path / "cut", Kill(13, KeyboardInterrupt()))
    assert logged(client)[0].info.status == "KILLED"
    train(net, tmp_path / "cut", epochs=3, resume=tmp_path / "cut")
    cut, whole = logged(client)
    for name in ("step_loss", "lr", "train_loss", "val_loss"):
        assert history(client, cut, name) == history(client, whole, name)
    assert (cut.info.status, cut.data.params["epochs"], cut.data.tags["epochs from step 10"]) == ("FINISHED", "2", "3")


@pytest.mark.parametrize(("plugin", "status"), [(Kill(3, RuntimeError("an accident")), "FAILED"), ("max_time:limit=0.001s", "SCHEDULED")],
                         ids=["error", "leaves"])
def test_the_status_says_how_the_run_ended(net, batches, sgd, tmp_path, client, plugin, status):
    """Others' runs stay RUNNING for ever."""
    with contextlib.suppress(RuntimeError):
        fit(net, cross_entropy, sgd, batches, plugins=["mlflow", plugin], out=tmp_path)
    found, = logged(client)
    assert found.info.status == status
    assert client.list_artifacts(found.info.run_id) == []                   # the weights are not final


def test_options_that_are_too_long_for_mlflow_are_cut_and_are_the_same_after_a_resume(net, batches, sgd, tmp_path, client):
    plugins = ["checkpoint", "mlflow", f"freeze:patterns=0,{'0,' * 2 * LONGEST}1"]
    for epochs in (1, 2):
        fit(net, cross_entropy, sgd, batches, epochs=epochs, plugins=plugins, out=tmp_path, resume=tmp_path if epochs > 1 else None)
    found, = logged(client)
    assert len(found.data.params["plugin"]) == LONGEST
    assert [tag for tag in found.data.tags if "from step" in tag] == ["epochs from step 8"]


def test_a_server_that_is_away_costs_no_training(net, batches, sgd, tmp_path, client, caplog):
    plugin = Mlflow(every_steps=1)

    class Away:
        @hookimpl
        def before_step(self, run: Run):
            if run.attempts == 2:
                plugin.client.log_batch = None

    assert fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[plugin, Away()], out=tmp_path).epoch == 2
    assert [text.endswith("cannot be written ('NoneType' object is not callable); nothing more is") for text in caplog.messages] == [True]
    assert logged(client)[0].info.status == "FINISHED"


def test_a_store_that_cannot_be_used_is_refused_before_any_step(net, batches, sgd, tmp_path, client):
    with pytest.raises(UsageError, match=r"^mlflow: MLflow cannot be used \(.*\); start its server, or choose another tracking_uri$"):
        fit(net, cross_entropy, sgd, batches, plugins=["mlflow:tracking_uri=nothing://here", Kill(0, AssertionError("a step"))], out=tmp_path)


def test_system_metrics_are_those_of_mlflow_and_their_thread_ends(net, batches, sgd, tmp_path, client, monkeypatch):
    pytest.importorskip("psutil")
    monitors = []

    class Look:
        @hookimpl
        def before_step(self, run: Run):
            monitors.append([thread.name for thread in threading.enumerate() if "SystemMetrics" in thread.name])

    fit(net, cross_entropy, sgd, batches, plugins=["mlflow:system_metrics=true", Look()], out=tmp_path)
    assert all(monitors)
    assert not [thread for thread in threading.enumerate() if "SystemMetrics" in thread.name]


def test_without_mlflow_it_says_how_to_get_it(net, batches, sgd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match=r"^mlflow: mlflow is not installed; install it with: pip install 'loopctl\[mlflow\]'$"):
        fit(net, cross_entropy, sgd, batches, plugins=["mlflow"], out=tmp_path)
