"""distill against Hinton's formula in a plain loop, and what a teacher may be."""
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy as cross_entropy_of
from torch.nn.functional import kl_div, log_softmax, mse_loss

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.distill import Distill
from loopctl.testing import tiny_run

cross_entropy = nn.CrossEntropyLoss()


@pytest.fixture
def teacher():
    """A larger network with BatchNorm and Dropout, in training mode."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))


def by_hand(model, optimizer, batches, teacher, temperature=4.0, alpha=0.9, features=(), feature_weight=1.0, epochs=2,
            context=torch.enable_grad, total=False):
    """Distill in a plain loop. features: indices of modules of both models. Returns the mean divergence of the last epoch."""
    teacher.eval()
    torch.manual_seed(1)
    for _ in range(epochs):
        model.train()
        logged = []
        for input, target in batches:
            optimizer.zero_grad()
            with context():
                output, wanted, found = input, input, []
                for number, module in enumerate(model):
                    output = module(output)
                    with torch.no_grad():
                        wanted = teacher[number](wanted)
                    if number in features:
                        found.append(mse_loss(output, wanted))
                kl = kl_div(log_softmax(output / temperature, 1), log_softmax(wanted / temperature, 1), reduction="batchmean", log_target=True)
                logged.append((temperature**2 * kl).item() * len(target))
                scale, reduction = (len(target), "sum") if total else (1, "mean")
                loss = alpha * (scale * (temperature**2 * kl)) + (1 - alpha) * cross_entropy_of(output, target, reduction=reduction)
                if features:
                    loss = loss + feature_weight * torch.stack(found).sum()
            loss.backward()
            optimizer.step()
    return sum(logged) / sum(len(target) for _, target in batches)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 2.0, "alpha": 0.5}, {"alpha": 1.0}, {"features": {"0": "0", "2": "2"}, "feature_weight": 0.5},
    {"alpha": 0.0, "features": {"[02]": "[02]"}},
], ids=str)
@pytest.mark.compares(use="distill", technique="divergence from the teacher's outputs at a temperature, and of features", source="arXiv:1503.02531", tolerance="to the bit")
def test_equals_the_formula_in_a_plain_loop_to_the_bit(net, batches, valid, sgd, clone, same, teacher, options):
    other, untouched = clone(net), clone(teacher)
    indices = {"features": (0, 2)} if "features" in options else {}
    logged = by_hand(other, sgd(other.parameters()), batches, clone(teacher), **options | indices)
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=[Distill(teacher, **options)], seed=1)
    same(net, other)
    same(teacher, untouched)            # neither its weights nor its BatchNorm statistics have changed
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    # Tolerance 1e-6: the plain loop adds the values in float64.
    assert run.history[-1].get("train_distill", logged) == pytest.approx(logged, rel=1e-6)
    assert ("train_distill" in run.history[-1]) == (options.get("alpha") != 0)
    assert ("train_features" in run.history[-1]) == bool(indices)
    assert not any(name.startswith("val_") and name != "val_loss" for name in run.history[-1])
    other.eval()
    with torch.no_grad():
        losses = [cross_entropy(other(input), target).item() * len(target) for input, target in valid]
    assert run.history[-1]["val_loss"] == pytest.approx(sum(losses) / 13, rel=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_the_teacher_computes_under_autocast_in_both_orders(net, batches, sgd, clone, same, teacher, order):
    other = clone(net)
    by_hand(other, sgd(other.parameters()), batches, clone(teacher), context=partial(torch.autocast, "cpu", torch.bfloat16))
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["amp:dtype=bfloat16", Distill(teacher)][::order], seed=1)
    same(net, other)


def test_with_accumulation_compilation_and_parts_of_batches(plain, batches, sgd, clone, same):
    """The plain network has no BatchNorm, so every way has the gradient of the whole batch, but for rounding."""
    torch.manual_seed(6)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    halves = [(part, label) for input, target in batches[:4] for part, label in zip(input.split(4), target.split(4), strict=True)]
    whole = clone(plain)
    by_hand(whole, sgd(whole.parameters()), batches[:4], teacher, features=(0,))
    for data, plugins in ((halves, ["accumulate:every=2"]), (batches[:4], ["split:into=2"]), (batches[:4], ["compile:backend=eager"])):
        model = clone(plain)
        fit(model, cross_entropy, sgd, data, epochs=2, plugins=[*plugins, Distill(teacher, features={"0": "0"})], seed=1)
        same(model, whole, 1e-5)        # sums are added in another order


def test_a_loss_that_is_a_sum_has_the_sum_of_the_divergences(plain, batches, sgd, clone, same):
    torch.manual_seed(6)
    teacher, other = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), clone(plain)
    by_hand(other, sgd(other.parameters(), lr=0.01), batches, teacher, total=True)
    fit(plain, nn.CrossEntropyLoss(reduction="sum"), partial(sgd, lr=0.01), batches, epochs=2, plugins=[Distill(teacher)], seed=1)
    same(plain, other)


def test_every_pixel_and_every_token_is_a_distribution():
    random = torch.Generator().manual_seed(0)
    own, wanted = (torch.randn(2, 5, 4, 3, generator=random) for _ in range(2))

    class Fixed(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = nn.Parameter(value.clone())

        def forward(self, input):
            return self.value * 1

    found = []
    for dim, change in ((1, lambda value: value), (-1, lambda value: value.movedim(1, -1))):
        teacher = Fixed(change(wanted))
        run = fit(Fixed(change(own)), lambda output, target: output.sum() * 0, partial(torch.optim.SGD, lr=0.1), [(torch.zeros(2), torch.zeros(2))],
                  plugins=[Distill(teacher, temperature=1.0, dim=dim)])
        found.append(run.history[0]["train_distill"])
    rows = [value.movedim(1, -1).reshape(-1, 5) for value in (own, wanted)]
    by_formula = (rows[1].softmax(1) * (rows[1].log_softmax(1) - rows[0].log_softmax(1))).sum(1).mean().item()
    assert found == pytest.approx([by_formula] * 2, rel=1e-5)           # the formula in another order


class Hugging(nn.Module):
    """A model that takes named entries and returns its loss."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"logits": logits} | ({} if labels is None else {"loss": cross_entropy(logits, labels)})


class Output(dict):
    __getattr__ = dict.__getitem__


class Named(Hugging):
    def forward(self, x, labels=None):
        return Output(super().forward(x, labels))


def test_batches_of_other_kinds_reach_the_teacher_as_they_reach_the_model(net, batches, sgd, clone, same, teacher):
    other = clone(net)
    by_hand(other, sgd(other.parameters()), batches, clone(teacher))
    dicts = [{"x": input, "labels": target} for input, target in batches]

    def forward(model, batch):
        output = model(batch[0])
        return cross_entropy(output, batch[1]), output

    for model, loss_fn, data, distill, more in (
        (Named(clone(net)), None, dicts, Distill(Named(clone(teacher))), {}),
        (Named(clone(net)), cross_entropy, dicts, Distill(Named(clone(teacher))), {}),
        (clone(net), None, batches, Distill(clone(teacher)), {"forward": forward}),
    ):
        fit(model, loss_fn, sgd, data, epochs=2, plugins=[distill], seed=1, **more)
        same(getattr(model, "net", model), other)


def test_a_resumed_run_has_the_same_bits_and_checkpoints_have_nothing_of_the_teacher(net, batches, sgd, clone, same, teacher, tmp_path):
    class Interrupt:
        @hookimpl
        def after_step(self, run: Run):
            if run.step == 5:
                raise KeyboardInterrupt

    resumed, whole = clone(net), clone(net)
    distill = partial(Distill, features={"0": "0"})
    fit(whole, cross_entropy, sgd, batches, epochs=2, plugins=[distill(clone(teacher))], seed=1)
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint:every_steps=4", distill(clone(teacher)), Interrupt()], seed=1, out=tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "step-00000004.pt")
    assert saved["model"].keys() == whole.state_dict().keys()
    assert "distill" not in saved["plugins"]
    run = fit(resumed, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint:every_steps=4", distill(teacher)], seed=1, resume=tmp_path, out=tmp_path)
    assert run.step == 16
    same(resumed, whole)
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [6]


def replicated(teacher, net, batches):
    return fit(net, cross_entropy, partial(torch.optim.SGD, lr=0.1), batches, epochs=2, plugins=["ddp", Distill(teacher)], seed=1).model.state_dict()


def test_processes_distill_as_one(plain, batches, ranks, clone):
    torch.manual_seed(6)
    teacher, whole = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), clone(plain)
    halves = [(part, label) for input, target in batches[:4] for part, label in zip(input.split(4), target.split(4), strict=True)]
    by_hand(whole, torch.optim.SGD(whole.parameters(), lr=0.1), batches[:4], teacher)
    for state in ranks(2, replicated, teacher.train(), plain, halves):
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)        # gradients are added in another order


def test_the_folder_of_a_run_is_a_teacher_from_any_folder(tmp_path, monkeypatch, same):
    from click.testing import CliRunner

    from loopctl import load_run
    from loopctl.cli import main

    def run(*arguments):
        done = CliRunner().invoke(main, ["run", "--data", "fake:size=20,image=8", "--epochs", "1", "--model", "mlp", *arguments])
        assert done.exit_code == 0, done.output

    monkeypatch.chdir(tmp_path)
    run("--out", "teacher", "--seed", "1")
    distill = Distill("teacher")
    run("--out", "student", "--plugin", "distill:teacher=teacher")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("--config", "../student/run.toml", "--out", "again")
    assert (tmp_path / "student" / "metrics.csv").read_text() == (tmp_path / "elsewhere" / "again" / "metrics.csv").read_text()
    images = [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))]
    fit(load_run("../student").model, cross_entropy, partial(torch.optim.SGD, lr=0.1), images, plugins=[distill])
    same(distill.module, load_run("../teacher").model)


WIDE = nn.Sequential(nn.Linear(6, 5))


def not_a_model():
    return "a model"


@pytest.mark.parametrize(("options", "message"), [
    ({"teacher": "nowhere"}, "distill: there is no folder .*nowhere; name the folder of a run"),
    ({"teacher": WIDE}, r"distill: the teacher gives a tensor of shape \(8, 5\) for a batch, and the model a tensor of shape \(8, 3\); both"),
    ({"teacher": nn.Sequential(nn.Linear(6, 3)), "dim": 2}, r"distill: the outputs are a tensor of shape \(8, 3\), without classes in dimension 2; choose"),
    ({"teacher": not_a_model}, "distill: teacher is a str, not a torch.nn.Module; name one"),
    ({"teacher": nn.Linear}, "distill: teacher: Linear cannot be called without arguments"),
    ({"teacher": WIDE, "temperature": 0.0}, "temperature is above 0, not 0"),
    ({"teacher": WIDE, "alpha": 1.5}, "alpha is between 0 and 1, not 1.5"),
    ({"teacher": WIDE, "alpha": 0.0}, "with alpha=0 and without features, nothing of the teacher is used"),
    ({"teacher": WIDE, "features": {"9": "0"}}, "features: '9' matches 0 modules of the model, and '0' 1 module of the teacher; they are paired"),
    ({"teacher": WIDE, "features": {"[01]": "0"}}, r"features: '\[01\]' matches 2 modules of the model, and '0' 1 module"),
    ({"teacher": nn.Sequential(nn.Linear(6, 3)), "features": {"0": "0"}},
     r"features: 0 gives a tensor of shape \(8, 16\) in the model and a tensor of shape \(8, 3\) in the teacher"),
])
def test_a_teacher_that_does_not_fit_is_refused(options, message):
    with pytest.raises((UsageError, ValueError), match=message):
        tiny_run(Distill(**options))


def test_the_model_is_not_its_own_teacher(net, batches, sgd):
    with pytest.raises(UsageError, match="the teacher shares parameters with the model; pass a copy"):
        fit(net, cross_entropy, sgd, batches, plugins=[Distill(net)])


def test_building_the_teacher_draws_no_random_numbers_of_the_run(net, batches, sgd, clone, same):
    def random_teacher():
        torch.manual_seed(9)
        return nn.Sequential(nn.Linear(6, 3))

    other = clone(net)
    fit(net, cross_entropy, sgd, batches, plugins=[Distill(random_teacher())], seed=1)
    fit(other, cross_entropy, sgd, batches, plugins=[Distill(random_teacher)], seed=1)
    same(net, other)
