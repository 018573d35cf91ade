"""Losses and forward functions on the command line, and data without classes: compared with the plain loop, bit for bit."""
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from loopctl.cli import losses, main
from loopctl.errors import UsageError

TASK = """
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from loopctl import Data

def samples():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 8, generator=random)
    return inputs, inputs.sum(1, keepdim=True) + 3

def data():
    inputs, targets = samples()
    return TensorDataset(inputs[:40], targets[:40]), TensorDataset(inputs[40:], targets[40:])

def alone():
    return data()[0]

def without_valid():
    return data()[0], None

def loaders():
    train, valid = data()
    return DataLoader(train, 16, shuffle=True), DataLoader(valid, 16)

def dicts():
    return {name: [{"x": x, "labels": y, "index": 3} for x, y in part] for name, part in zip(("train", "val"), data())}

class Stream:
    def __iter__(self):
        while True:
            yield from zip(*(part.split(10) for part in samples()))

def stream():
    return Stream(), list(zip(*samples()))

def one_class():
    train, valid = data()
    train.classes = ["y"]
    return train, valid

def together(samples):
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

def own(**more):
    train, valid = data()
    return Data(train, valid, collate_fn=together, valid_batch_size=3, **more)

def sampled():
    return own(sampler=range(39), drop_last=True)

def batched():
    return own(batch_sampler=[[0, 1, 2], [5, 7, 9, 11]])

class Model(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x):
        return self.net(x)

class OwnLoss(Model):
    def forward(self, x, labels=None):
        output = self.net(x)
        return {"loss": nn.functional.mse_loss(output, labels), "logits": output}

class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x)

def forward(model, batch, power=2):
    output = model.net(batch[0])
    return ((output - batch[1]).abs() ** power).mean(), output

def stateful(model, batch, state, other):
    return forward(model, batch)

turns = {"net": forward}
optimizers = {"net": torch.optim.SGD}

def scaled(output, target, factor=1.0):
    return factor * nn.functional.mse_loss(output, target)

class Scaled:
    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, output, target):
        return scaled(output, target, self.factor)

class Uncallable:
    pass
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a command in a folder with the file task.py, and returns the result."""
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)

    def call(*arguments, status=0):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        return result
    return call


def train(run, data, *arguments, model="Model", status=0):
    return run("run", "--data", f"task.py:{data}", "--model", f"task.py:{model}", "--epochs", 2, "--without", "progress", "--optimizer", "sgd",
               "--lr", 0.1, "--out", "a", *arguments, status=status)


def expected(batches, compute, valid=True):
    """The weights after a plain loop over the batches that `batches` returns in each of two epochs, from the same seed.

    valid: read the validation data after each epoch with a DataLoader, which draws a random number
    """
    scope = {}
    exec(TASK, scope)
    torch.manual_seed(0)
    model = scope["Model"]()
    # `fit` seeds again, before the first epoch.
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for input, target in batches(scope):
            optimizer.zero_grad()
            compute(model(input), target).backward()
            optimizer.step()
        list(torch.utils.data.DataLoader(scope["data"]()[1], 16) if valid else ())
    return {name: value.detach() for name, value in model.state_dict().items()}


def plain_batches(scope):
    return torch.utils.data.DataLoader(scope["data"]()[0], 16, shuffle=True)


def equal(weights, file="a/weights.safetensors"):
    found = load_file(file)
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)


# Losses by name


def test_every_loss_of_torch_that_compares_an_output_with_a_target_has_a_name():
    two = {name for name, cls in vars(nn).items() if name.endswith("Loss") and issubclass(cls, nn.modules.loss._Loss)
           and [*inspect.signature(cls.forward).parameters][2:] == ["target"]}
    assert losses.known_names() == sorted([*(losses.snake_case(name.removesuffix("Loss")) for name in two), "model"])
    assert {"mse", "l1", "smooth_l1", "cross_entropy", "bce_with_logits", "kl_div", "poisson_nll"} < set(losses.known_names())


def test_the_names_are_completed_without_importing_torch():
    code = "import sys; from loopctl.cli.options import loss_names; print(*loss_names()); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == losses.known_names()


@pytest.mark.parametrize("spec", ["cross_entropy", "crossentropy", "CrossEntropy", "CrossEntropyLoss", "torch.nn:CrossEntropyLoss"])
def test_a_loss_may_be_written_as_torch_writes_it(spec):
    assert losses.make(f"{spec}:label_smoothing=0.1,reduction=sum").__dict__.items() >= {"label_smoothing": 0.1, "reduction": "sum"}.items()


def test_weights_of_classes_are_tensors():
    loss = losses.make("cross_entropy:weight=1,2.5,1")
    assert torch.equal(loss.weight, torch.tensor([1, 2.5, 1]))
    assert torch.equal(losses.make("bce_with_logits:pos_weight=3").pos_weight, torch.tensor(3.0))


@pytest.mark.parametrize(("spec", "words"), [
    ("crossentropie", "no loss is called 'crossentropie'; did you mean 'cross_entropy'"),
    ("huber:delt=1", "loss huber: no option 'delt'; did you mean 'delta'"),
    ("huber:delta=high", "loss huber: delta takes a number, not 'high'"),
    ("mse:reduction=none", "loss mse: reduction is 'none'; use mean or sum"),
    ("triplet_margin", "loss triplet_margin is not one of an output and a target; .*--forward file.py:function"),
    ("model:scale=2", "loss model has no options, because the model computes it"),
    ("math:sqrt", "loss math:sqrt is called with .output, target.: too many positional arguments"),
    ("math:pi", "loss math:pi is a float; name a class or a function"),
    ("math:sqr", "loss math:sqr: math has no 'sqr'; did you mean 'sqrt'"),
    ("nowhere.py:loss", "there is no file nowhere.py"),
])
def test_a_wrong_loss_is_refused_in_one_line(spec, words):
    with pytest.raises(UsageError, match=words):
        losses.make(spec)


# Trained


@pytest.mark.parametrize(("loss", "compute"), [
    ("mse", functional.mse_loss),
    ("huber:delta=0.5", lambda output, target: functional.huber_loss(output, target, delta=0.5)),
    ("mse:reduction=sum", lambda output, target: functional.mse_loss(output, target, reduction="sum")),
    ("torch.nn.functional:l1_loss", functional.l1_loss),
    ("task.py:scaled:factor=0.5", lambda output, target: 0.5 * functional.mse_loss(output, target)),
    ("task.py:Scaled:factor=0.5", lambda output, target: 0.5 * functional.mse_loss(output, target)),
])
def test_a_run_with_a_loss_gives_the_weights_of_the_plain_loop(run, loss, compute):
    result = train(run, "data", "--loss", loss, "--batch-size", 16, *(["--plugin", "clip:max_norm=9e9"] if "sum" not in loss else []))
    assert equal(expected(plain_batches, compute))
    assert "task.py:Model (61 parameters) on task.py:data (40 + 10 samples), sgd, cpu" in result.stdout
    assert tomllib.loads(Path("a/run.toml").read_text())["loss"] == loss


@pytest.mark.parametrize(("data", "model", "loss"), [("dicts", "Model", "mse"), ("dicts", "OwnLoss", "model"), ("data", "OwnLoss", "model")])
def test_dicts_and_losses_of_the_model_give_the_weights_of_the_plain_loop(run, data, model, loss):
    train(run, data, "--loss", loss, "--batch-size", 16, model=model)
    assert equal(expected(plain_batches, functional.mse_loss))


@pytest.mark.parametrize(("spec", "power"), [("task.py:forward", 2), ("task.py:forward:power=3", 3)])
def test_a_forward_function_gives_the_weights_of_the_plain_loop(run, spec, power):
    train(run, "data", "--forward", spec, "--batch-size", 16)
    assert equal(expected(plain_batches, lambda output, target: ((output - target).abs() ** power).mean()))


def test_loaders_are_used_as_they_are(run):
    result = train(run, "loaders", "--loss", "mse")
    assert equal(expected(plain_batches, functional.mse_loss))
    assert "(40 + 10 samples)" in result.stdout
    assert "batch_size" not in tomllib.loads(Path("a/run.toml").read_text())


@pytest.mark.parametrize("data", ["alone", "without_valid"])
def test_data_without_a_validation_part_trains_without_validation(run, data):
    result = train(run, data, "--loss", "mse", "--batch-size", 16)
    assert equal(expected(plain_batches, functional.mse_loss, valid=False))
    assert "(40 samples)" in result.stdout
    assert "val_loss" not in Path("a/metrics.csv").read_text()


def test_endless_data_trains_with_steps_per_epoch(run):
    result = train(run, "stream", "--loss", "mse", "--steps-per-epoch", 7)
    assert "finished: 2 epochs, 14 updates" in result.stdout
    inputs = lambda scope: list(zip(*(part.split(10) for part in scope["samples"]()), strict=True)) * 2      # noqa: E731
    assert equal(expected(lambda scope: inputs(scope)[:7], functional.mse_loss))


@pytest.mark.parametrize(("data", "indices"), [
    ("sampled", [range(16), range(16, 32)]), ("batched", [[0, 1, 2], [5, 7, 9, 11]])])
def test_the_users_sampler_batch_sampler_collate_function_and_batch_sizes_are_used(run, data, indices):
    train(run, data, "--loss", "mse", "--batch-size", 16) if data == "sampled" else train(run, data, "--loss", "mse")

    def batches(scope):
        inputs, targets = scope["samples"]()
        return [(inputs[list(rows)], targets[list(rows)]) for rows in indices]
    assert equal(expected(batches, functional.mse_loss))
    scope = {}
    exec(TASK, scope)
    _, valid = scope[data]().loaders(16, 0, torch.device("cpu"))
    assert [len(target) for _, target in valid] == [3, 3, 3, 1]


@pytest.mark.parametrize("data", ["data", "dicts"])
def test_data_on_the_device_gives_the_same_weights(run, data):
    train(run, f"{data}:on_device=true", "--loss", "mse", "--batch-size", 16)
    assert equal(expected(plain_batches, functional.mse_loss))


def test_a_run_is_repeated_from_its_run_toml_and_resumed(run, tmp_path):
    task = ["--forward", "task.py:forward:power=1.5", "--plugin", "accumulate:every=2"]
    train(run, "data", *task, "--batch-size", 8)
    run("run", "--config", "a/run.toml", "--out", "b", "--epochs", 4)
    run("run", "--resume", "a", "--epochs", 4)
    assert (tmp_path / "a/metrics.csv").read_text() == (tmp_path / "b/metrics.csv").read_text()
    assert equal(load_file("b/weights.safetensors"))
    assert tomllib.loads(Path("a/run.toml").read_text())["forward"] == "task.py:forward:power=1.5"


def test_a_run_is_not_resumed_with_another_loss(run):
    train(run, "data", "--loss", "mse")
    assert "loss is mse in the checkpoint and l1 in this run" in run("run", "--resume", "a", "--epochs", 4, "--loss", "l1", status=2).stderr


def test_explain_lr_and_summary_work_without_classes(run):
    for data, model, more in (("dicts", "OwnLoss", ["--loss", "model"]), ("data", "Model", ["--forward", "task.py:forward"]),
                              ("stream", "Model", ["--loss", "mse", "--steps-per-epoch", 4])):
        arguments = ["--data", f"task.py:{data}", "--model", f"task.py:{model}", *more]
        assert "learning rate    0.001" in run("explain", *arguments).stdout
        assert "start 0.001" in run("lr", *arguments).stdout
        assert "[16, 6]" in run("summary", *arguments).stdout.replace("[40, 6]", "[16, 6]").replace("[10, 6]", "[16, 6]")


# Refused


@pytest.mark.parametrize(("data", "arguments", "words"), [
    ("data", [], "data task.py:data has no `classes`, so its loss is not known; pass --loss mse"),
    ("data", ["--loss", "mse", "--forward", "task.py:forward"], "the function computes the loss itself; leave out one of the two"),
    ("data", ["--loss", ""], "no loss is called ''; there are bce, "),
    ("data", ["--forward", ""], "--forward : name a function in a file or a module"),
    ("data", ["--forward", "forward"], "--forward forward: name a function in a file or a module"),
    ("data", ["--forward", "task.py:forward:pow=2"], "forward task.py:forward: no option 'pow'; did you mean 'power'?"),
    ("data", ["--forward", "task.py:Uncallable"], "an instance of it cannot be called; define __call__(model, batch)"),
    ("data", ["--loss", "task.py:Uncallable"], "an instance of it cannot be called; define __call__(output, target)"),
    ("data", ["--forward", "task.py:data"], "forward task.py:data is called with (model, batch): too many positional arguments"),
    ("data", ["--forward", "task.py:stateful"], "forward task.py:stateful is called with (model, batch, state): missing a required argument"),
    ("data", ["--forward", "task.py:turns"], "forward is a dict, of a loss for each optimizer; pass a dict of optimizers with the same names"),
    ("data", ["--forward", "task.py:turns:power=3"], "forward task.py:turns: no option 'power'"),
    ("data", ["--loss", "mse", "--optimizer", "task.py:optimizers", "--lr", 0.1],
     "optimizer task.py:optimizers is a dict of optimizers with their own learning rates; leave out --lr"),
    ("loaders", ["--loss", "mse", "--batch-size", 8], "--batch-size 8: data task.py:loaders makes its batches itself"),
    ("loaders", ["--loss", "mse", "--workers", 2], "--workers 2 would have nothing to load: data task.py:loaders has loaders of its own"),
    ("loaders:on_device=true", ["--loss", "mse"], "on_device=true makes batches of samples, and task.py:loaders has loaders of its own"),
    ("stream", ["--loss", "mse"], "data task.py:stream has no length, so the end of an epoch is unknown; pass --steps-per-epoch N"),
    ("one_class", [], "has one class, so there is nothing to learn; it needs two or more, or for numbers no `classes` and --loss mse"),
])
def test_what_does_not_fit_together_is_refused_in_one_line(run, tmp_path, data, arguments, words):
    result = train(run, data, *arguments, status=2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_model_that_takes_no_target_is_refused_as_one_that_returns_its_loss(run):
    message = train(run, "data", "--loss", "model", status=2).stderr
    assert "loss_fn is None, so the model is called with input and target and returns the loss, but Model takes one argument" in message


def test_a_model_that_needs_classes_is_refused_for_data_without(run):
    message = run("run", "--data", "task.py:data", "--loss", "mse", status=2).stderr
    assert "model cnn needs num_classes, in_channels, which the data does not have; pass --model cnn:num_classes=...,in_channels=..." in message


@pytest.mark.parametrize("data", ["data", "dicts"])
def test_a_last_batch_of_one_sample_is_refused_without_classes_too(run, data):
    message = train(run, data, "--loss", "mse", "--batch-size", 13, model="Normed", status=2).stderr
    assert "the last batch of an epoch has 1 sample, of 40 in batches of 13, and BatchNorm cannot train on 1" in message
