"""What people met who used the command line for their own task for the first time."""
import json
from pathlib import Path

import pytest

from loopctl import fit

OWN = """
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

def numbers(count=40):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    return TensorDataset(x, x.sum(1, keepdim=True))

def named():
    return numbers(), {"clean": numbers(20), "noisy": numbers(30)}

def letters(names="ab"):
    data = TensorDataset(torch.randn(8, 1, 2, 2), torch.arange(8) % 2)
    data.classes = list(names)
    return data, data

def others():
    return letters("cd")

def parts():
    return {"train": numbers(), "valid": numbers(20)}

def model():
    return nn.Linear(4, 1)

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 3)
    def forward(self, ids, mask=None):
        return {"logits": self.table(ids).mean(1)}["logits"]

def tokens():
    ids = torch.arange(40).reshape(8, 5) % 9
    return [DataLoader([{"ids": row, "labels": torch.tensor(0)} for row in ids], 4)] * 2

class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.g, self.d = nn.Linear(2, 4), nn.Linear(4, 1)

forward = {"d": lambda model, batch: (softplus(model.d(batch[0])).mean(), None),
           "g": lambda model, batch: (softplus(-model.d(model.g(torch.ones(2, 2)))).mean(), None)}
optimizers = {name: lambda groups: torch.optim.SGD(groups, lr=0.1) for name in forward}
"""
LINEAR = ["--model", "own.py:model", "--loss", "mse", "--epochs", "2", "--without", "progress"]


@pytest.fixture(autouse=True)
def own_code(command):
    Path("own.py").write_text(OWN)


@pytest.mark.parametrize("more", [["--limit-valid", "1"], ["--limit-valid", "50%"], ["--fast-dev-run"], ["--overfit", "1"]])
def test_limits_apply_to_each_of_several_validation_sets(command, more):
    command("run", *LINEAR, "--data", "own.py:named", "--batch-size", "10", "--out", "a", *more)


def test_the_table_of_runs_shows_the_metric_that_is_monitored(command):
    command("run", *LINEAR, "--data", "own.py:named", "--name", "plain")
    command("run", *LINEAR, "--data", "own.py:named", "--name", "other", "--metric", "r2", "--monitor", "val_noisy_r2")
    shown = {row["name"]: row["metric"] for row in json.loads(command("runs", "--json"))}
    assert shown == {"plain": "val_clean_loss", "other": "val_noisy_r2"}


def test_a_gan_is_evaluated_and_tested(command):
    command("run", "--data", "own.py:numbers", "--model", "own.py:Gan", "--forward", "own.py:forward", "--optimizer",
            "own.py:optimizers", "--epochs", "1", "--out", "a", "--test", "own.py:numbers", "--without", "progress")
    found = json.loads(command("evaluate", "a", "--json"))
    assert found == json.loads(Path("a/test.json").read_text())
    assert set(found) == {"loss", "d_loss", "g_loss"}


def test_a_test_set_of_another_shape_or_other_classes_is_refused_before_training(command):
    quick = ["run", "--model", "linear", "--epochs", "1", "--without", "progress", "--data", "own.py:letters"]
    assert "inputs of shape (3, 32, 32), and the run was trained on (1, 2, 2)" in command(*quick, "--test", "fake", refused=True)
    assert "has the classes c, d, and the run a, b" in command(*quick, "--test", "own.py:others", refused=True)
    assert not Path("runs").exists()
    assert "--test: no data is called 'nope'" in command(*quick, "--fast-dev-run", "--test", "nope", refused=True)


def test_a_run_that_is_refused_in_its_first_step_leaves_no_folder(command):
    command("run", "--data", "own.py:numbers", "--model", "linear:num_classes=1,in_channels=1,image_size=2", "--loss",
            "cross_entropy", "--epochs", "1", "--name", "a", "--without", "progress", refused=True)
    assert not Path("runs").exists()


def test_predictions_for_dicts_and_for_validation_data_in_a_dict(command):
    command("run", "--data", "own.py:tokens", "--model", "own.py:Tokens", "--loss", "cross_entropy", "--epochs", "1", "--out",
            "a", "--without", "progress")
    assert len(command("predict", "a", "own.py:tokens").splitlines()) == 9
    command("run", *LINEAR, "--data", "own.py:parts", "--out", "b")
    assert len(command("predict", "b", "own.py:parts").splitlines()) == 21
    assert "several validation sets, clean, noisy" in command("predict", "b", "own.py:named", refused=True)
    assert "every tensor is equal" in command("export", "a", "--format", "torch")
    assert "shape of an input is not known" in command("export", "a", "--format", "exported", refused=True)


def test_layers_are_shown_of_a_model_whose_loss_is_not_named(command):
    assert "Linear" in command("summary", "--data", "own.py:numbers", "--model", "own.py:model")


def test_a_loss_class_and_a_list_of_loaders_are_refused_by_name():
    import torch
    from torch.utils.data import DataLoader

    batches = [(torch.zeros(2, 4), torch.zeros(2, 1))]
    with pytest.raises(Exception, match=r"loss_fn is the class MSELoss; pass an instance, MSELoss\(\)"):
        fit(torch.nn.Linear(4, 1), torch.nn.MSELoss, torch.optim.SGD, batches)
    loaders = [DataLoader(batches, None)] * 2
    with pytest.raises(Exception, match="valid is a list of DataLoaders; pass one, or several validation sets as a dict by name"):
        fit(torch.nn.Linear(4, 1), torch.nn.MSELoss(), torch.optim.SGD, batches, loaders)


@pytest.mark.parametrize(("words", "message"), [
    (["run", "--resume", "own.py"], "--resume own.py is a file; name the folder of the run, as in --resume runs/a"),
    (["run", "--resume", "a"], "--resume: there is no folder a; did you mean runs/a?"),
    (["run", "--metric", "R2"], "no metric is called 'R2'; did you mean 'r2'?"),
    (["run", "--data", "own.py:tokens", "--model", "own.py:Odd", "--loss", "cross_entropy"],
     "the model was called with ids; of the batch, labels is no argument of its forward"),
    (["run", "--data", "own.py:sequences", "--model", "own.py:Sequence", "--loss", "cross_entropy"],
     "if the last dimension is that of the classes, use output.transpose(1, -1)"),
])
def test_a_mistake_is_answered_with_what_to_use(command, words, message):
    with Path("own.py").open("a") as file:
        file.write("""
class Odd(Tokens):
    def forward(self, ids, mask=None):
        raise ValueError("odd")

class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 7)
    def forward(self, ids):
        return self.table(ids)

def sequences():
    ids = torch.arange(40).reshape(8, 5) % 7
    return TensorDataset(ids, ids)
""")
    if words[-1] == "a":
        command("run", *LINEAR, "--data", "own.py:numbers", "--name", "a")
    assert message in command(*words, refused=True)


def test_the_table_of_runs_shows_only_options_that_were_chosen(command):
    command("run", "--model", "linear", "--epochs", "1", "--name", "plain", "--without", "progress")
    command("run", "--model", "linear", "--epochs", "1", "--name", "other", "--without", "progress", "--metric", "top5", "--metric", "accuracy")
    text = command("runs")
    assert "metric=top5,accuracy" in text
    assert "loss=" not in text
    assert text.count("metric=") == 1
