"""The plugin checkpoint: what it saves and keeps, and resuming from it."""
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint.finding import find_checkpoint

cross_entropy = nn.CrossEntropyLoss()
adam = partial(torch.optim.Adam, lr=1e-2)


def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(50, 6, generator=generator), torch.randint(0, 3, (50,), generator=generator))
    return DataLoader(data, batch_size=8, shuffle=True)


PLUGINS = ["amp:dtype=float16", "accumulate:every=2", "clip", "warmup:length=2ep", "cosine:t_max=8", "early_stopping:patience=3"]


def test_a_resumed_run_equals_an_uninterrupted_one(net, clone, same, tmp_path):
    """To the bit, with shuffled data, dropout, momentum and loss scaling."""
    whole, other = net, clone(net)
    uninterrupted = fit(whole, cross_entropy, adam, loader(), loader(), epochs=8, plugins=PLUGINS, seed=1)
    fit(clone(other), cross_entropy, adam, loader(), loader(), epochs=3, plugins=[*PLUGINS, "checkpoint"], seed=1, out=tmp_path)
    torch.rand(7)
    resumed = fit(other, cross_entropy, adam, loader(), loader(), epochs=8, plugins=[*PLUGINS, "checkpoint"], seed=1,
                  out=tmp_path, resume=tmp_path)
    same(whole, other)
    assert repr(resumed.history) == repr(uninterrupted.history)      # a norm may be NaN, which is unequal to itself
    assert (resumed.step, resumed.seen, resumed.stop) == (uninterrupted.step, uninterrupted.seen, uninterrupted.stop)


def test_early_stopping_keeps_its_count_over_a_resume(net, clone, tmp_path):
    class FixedLoss:
        @hookimpl
        def evaluate(self, run: Run):
            return {"val_loss": 1.0 + run.epoch}

    plugins = ["early_stopping:patience=4", FixedLoss(), "checkpoint"]
    fit(clone(net), cross_entropy, adam, loader(), loader(), epochs=3, plugins=plugins, out=tmp_path)
    resumed = fit(net, cross_entropy, adam, loader(), loader(), epochs=9, out=tmp_path, resume=tmp_path / "checkpoints" / "step-00000021.pt",
                  plugins=["early_stopping:patience=4", FixedLoss(), "checkpoint"])
    assert resumed.epoch == 5


def test_a_step_is_evaluated_once_even_at_an_epoch_end_and_after_a_resume(net, batches, valid, sgd, clone, tmp_path):
    """Both eval_every and the epoch's end ask for an evaluation after step 8, and the run is resumed there."""
    class Recorder:
        def __init__(self):
            self.steps = []

        @hookimpl
        def after_evaluate(self, run: Run):
            self.steps.append(run.step)

    whole, before, after = Recorder(), Recorder(), Recorder()
    fit(clone(net), cross_entropy, sgd, batches, valid, epochs=3, eval_every=4, plugins=[whole])
    fit(clone(net), cross_entropy, sgd, batches, valid, epochs=1, eval_every=4, plugins=[before, "checkpoint"], out=tmp_path)
    fit(net, cross_entropy, sgd, batches, valid, epochs=3, eval_every=4, plugins=[after, "checkpoint"], out=tmp_path, resume=tmp_path)
    assert whole.steps == before.steps + after.steps == [4, 8, 12, 16, 20, 24]


def test_the_best_and_the_last_checkpoint_are_kept(net, batches, valid, sgd, tmp_path, clone, same):
    evaluated = []

    class FixedLoss:
        values = [3, 1, 2, 2]

        @hookimpl
        def evaluate(self, run: Run):
            evaluated.append(clone(run.model))
            return {"val_loss": self.values[run.epoch - 1]}

    fit(net, cross_entropy, sgd, batches, valid, epochs=4, plugins=["checkpoint:every_epochs=3", FixedLoss()], out=tmp_path)
    folder, other = tmp_path / "checkpoints", clone(net)
    other.load_state_dict(load_file(folder / "best.safetensors"))
    same(other, evaluated[1])
    best, last = (torch.load(folder / name, weights_only=True) for name in ("best.pt", "step-00000032.pt"))
    other.load_state_dict(best["model"])
    same(other, evaluated[1])
    assert best["counters"]["epoch"] == 2
    other.load_state_dict(last["model"])
    same(other, net)
    assert last["counters"]["epoch"] == 4             # saved at the end of the run, although every_epochs=3
    assert names(folder) == {"best.safetensors", "best.pt", "step-00000024.pt", "step-00000032.pt"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def steps(folder):
    return sorted(int(path.stem[5:]) for path in folder.glob("step-*.pt"))


@pytest.mark.parametrize(("options", "expected"), [
    ("every_epochs=2,keep=9", [16, 24]), ("every_steps=5,keep=9", [5, 8, 10, 15, 16, 20, 24]), ("every_steps=5", [20, 24]),
    ("every_steps=5,keep=1", [24]), ("every_minutes=1e-9,keep=99", list(range(1, 25))), ("every_minutes=60,keep=9", [8, 16, 24])])
def test_options_decide_when_it_saves_and_what_it_keeps(net, batches, sgd, tmp_path, options, expected):
    """Three epochs of eight steps, with a metric that is best in the first epoch."""
    class FixedLoss:
        @hookimpl
        def evaluate(self, run: Run):
            return {"val_loss": float(run.epoch)}

    fit(net, cross_entropy, sgd, batches, epochs=3, plugins=[f"checkpoint:{options}", FixedLoss()], out=tmp_path)
    first = {8} if "every_epochs" in options else set()       # the best checkpoint is saved too
    assert set(steps(tmp_path / "checkpoints")) == set(expected) | first


def test_the_best_weights_are_those_of_the_evaluation_within_an_epoch(net, batches, valid, sgd, tmp_path, clone, same):
    evaluated = []

    class FixedLoss:
        @hookimpl
        def evaluate(self, run: Run):
            evaluated.append(clone(run.model))
            return {"val_loss": 0.5 if run.step == 3 else 1.0}

    fit(net, cross_entropy, sgd, batches, valid, eval_every=3, plugins=["checkpoint", FixedLoss()], out=tmp_path)
    other = clone(net)
    other.load_state_dict(load_file(tmp_path / "checkpoints" / "best.safetensors"))
    same(other, evaluated[0])


def test_existing_checkpoints_are_not_overwritten(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, plugins=["checkpoint"], out=tmp_path)
    last = tmp_path / "checkpoints" / "step-00000008.pt"
    before = last.read_bytes()
    with pytest.raises(UsageError, match="checkpoint: .* exists and is not overwritten"):
        fit(net, cross_entropy, sgd, batches, plugins=["checkpoint"], out=tmp_path)
    assert last.read_bytes() == before


def test_resuming_from_another_checkpoint_overwrites_nothing(net, batches, sgd, tmp_path, clone):
    """Neither the checkpoints of another run, nor those later than the one resumed from."""
    for name in "ab":
        fit(clone(net), cross_entropy, sgd, batches, plugins=["checkpoint:every_steps=3"], out=tmp_path / name)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for resume in (tmp_path / "b", tmp_path / "a" / "checkpoints" / "step-00000006.pt"):
        with pytest.raises(UsageError, match=r"a/checkpoints/step-00000008.pt exists and is not overwritten"):
            fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], out=tmp_path / "a", resume=resume)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_checkpoint_has_the_configuration_of_the_run(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["clip:max_norm=2", "checkpoint"], out=tmp_path)
    _, saved = find_checkpoint(tmp_path)
    assert saved["config"]["epochs"] == 2
    assert [spec.partition(":")[0] for spec in saved["config"]["plugin"]] == ["clip", "checkpoint"]
    assert "max_norm=2.0" in saved["config"]["plugin"][0]


def test_resuming_in_its_own_folder_without_a_checkpoint_begins_at_the_start(net, batches, sgd, tmp_path, clone, same, caplog):
    """Such a run was killed before its first checkpoint."""
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, plugins=["checkpoint"], seed=1, out=tmp_path / "whole")
    (tmp_path / "own").mkdir()
    run = fit(other, cross_entropy, sgd, batches, plugins=["checkpoint"], seed=1, out=tmp_path / "own",
              resume=tmp_path / "own")
    same(net, other)
    assert run.epoch == 1
    assert caplog.messages == [f"{tmp_path / 'own'} has no checkpoint yet; training from the beginning"]
    with pytest.raises(UsageError, match="no checkpoint found"):
        fit(other, cross_entropy, sgd, batches, plugins=["checkpoint"], out=tmp_path / "new", resume=tmp_path)


def test_metrics_of_an_epoch_are_restored_on_resume(plain, clone, tmp_path):
    """With more steps than are summed at a time, metric objects that keep a state, and one without a value yet."""
    # Sums of float32 losses are exact in float64, wherever the run is interrupted.
    plain, data = plain.double(), [(torch.randn(2, 6).double(), torch.randint(0, 3, (2,))) for _ in range(300)]
    torchmetrics = pytest.importorskip("torchmetrics")

    class Count:
        def reset(self):
            self.samples = 0

        def update(self, output, target):
            self.samples += len(target)

        __call__ = update

        def to(self, device):
            return self

        def compute(self):
            return torch.tensor(float(self.samples))

    def train(net, kill, resume=None):
        class Kill:
            @hookimpl
            def safe_point(self, run: Run):
                if run.step == kill:
                    raise KeyboardInterrupt

        metrics = {"accuracy": torchmetrics.Accuracy("multiclass", num_classes=3), "count": Count(),
                    "right": lambda output, target: (output.argmax(1) == target).float().mean()}
        saving = ["checkpoint:every_steps=7"] if kill or resume else []
        return fit(net, cross_entropy, adam, data, metrics=metrics, plugins=[*saving, Kill()],
                   out=tmp_path / str(resume or kill), resume=resume)

    whole = train(clone(plain), 0)
    with pytest.raises(KeyboardInterrupt):
        train(clone(plain), 266)
    (tmp_path / "266").rename(tmp_path / "resumed")
    assert train(clone(plain), 0, tmp_path / "resumed").history == whole.history


def test_resuming_a_finished_run_trains_nothing(net, batches, sgd, tmp_path, clone, same):
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], out=tmp_path)
    before = clone(net)
    run = fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], out=tmp_path, resume=tmp_path)
    same(net, before)
    assert (run.epoch, len(run.history)) == (2, 2)


def test_the_best_weights_may_be_written_while_a_checkpoint_is(net, batches, valid, sgd, tmp_path):
    """In the background, a checkpoint of sharded tensors removes old files, and none that is being written."""
    half = tmp_path / "checkpoints" / "best.other.new"          # a name that the run itself does not write

    class Writing:
        @hookimpl
        def after_step(self):
            half.parent.mkdir(exist_ok=True)
            half.write_bytes(b"being written")

        @hookimpl
        def epoch_end(self):
            assert half.exists()

    fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=2, plugins=[Writing(), "checkpoint:every_steps=2,monitor=train_loss"], eval_every=3, out=tmp_path)
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"left by a killed run")
    fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=3, plugins=["checkpoint:every_steps=2,monitor=train_loss"], eval_every=3, resume=tmp_path, out=tmp_path)
    assert not half.exists()
