"""The files in docs/examples: each equals a loop written by hand, its command line, and itself after it was killed."""
import importlib.util
import math
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from loopctl import Run, fit, hookimpl
from loopctl.cli import main as command_line

DOCS = Path(__file__).parents[1] / "docs"
NAMES = sorted(path.stem for path in (DOCS / "examples").glob("*.py"))
NEEDS = {"hugging_face": "transformers", "regression": "torchmetrics", "segmentation": "torchmetrics"}


def example(name):
    """The module of an example."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    spec = importlib.util.spec_from_file_location(f"example_{name}", DOCS / "examples" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(module, plugins=(), **changed):
    """Train an example as it says, but with these arguments of `fit`, and with further plugins."""
    def changed_fit(*arguments, **given):
        return fit(*arguments, **(given | changed | {"plugins": [*given.get("plugins", []), *plugins]}))
    module.fit, before = changed_fit, module.fit
    try:
        return module.main()
    finally:
        module.fit = before


@pytest.fixture(scope="module")
def short():
    """Two epochs of an example. Each is trained once for all tests of this file."""
    done = {}

    def call(name):
        if name not in done:
            module = example(name)
            done[name] = module, train(module, epochs=2)
        return done[name]
    return call


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


# Each loop as it is written without loopctl, for two epochs. It returns the model and the last validation loss.


@torch.no_grad()
def validate(model, batches, loss_of_batch):
    """The mean loss over all samples."""
    model.eval()
    losses = [(loss_of_batch(batch).double(), len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])) for batch in batches]
    model.train()
    return (sum(loss * samples for loss, samples in losses) / sum(samples for _, samples in losses)).item()


def regression(example):
    train, valid = example.data()
    model, loss_fn = example.Model(), nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader, valid_loader = DataLoader(train, 32, shuffle=True), DataLoader(valid, 32)
    torch.manual_seed(0)
    for epoch in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + math.cos(math.pi * epoch / 2)) / 2
        for values, progression in loader:
            optimizer.zero_grad()
            loss_fn(model(values), progression).backward()
            optimizer.step()
        val_loss = validate(model, valid_loader, lambda batch: loss_fn(model(batch[0]), batch[1]))
    return model, val_loss


def language_model(example):
    """The loop of nanoGPT's train.py, with an evaluation on the same blocks each time."""
    train, valid = example.data()
    model = example.Model()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
         {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95))
    learning_rate, min_lr, warmup_iters, lr_decay_iters, gradient_accumulation_steps = 0.01, 0.001, 19, 200, 2

    def get_lr(it):
        if it < warmup_iters:
            return learning_rate * (it + 1) / (warmup_iters + 1)
        decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
        return min_lr + coeff * (learning_rate - min_lr)

    torch.manual_seed(0)
    blocks = iter(train)
    for it in range(200):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(it)
        for _ in range(gradient_accumulation_steps):
            text, following = next(blocks)
            loss = nn.functional.cross_entropy(model(text), following) / gradient_accumulation_steps
            loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if it % 100 == 99:
            val_loss = validate(model, valid, lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
    return model, val_loss


def hugging_face(example):
    loader, valid = example.data()
    model = example.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    steps = 2 * len(loader)
    warmup = steps * 0.1
    torch.manual_seed(0)
    step = 0
    for _ in range(2):
        model.train()
        for batch in loader:
            for group in optimizer.param_groups:
                started = math.ceil(warmup)
                group["lr"] = 0.005 * min(1.0, step / warmup) * (1 - max(0, step - started) / (steps - started))
            model(**batch).loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        val_loss = validate(model, valid, lambda batch: model(**batch).loss)
    return model, val_loss


def segmentation(example):
    train, valid = example.data()
    model, loss_fn = example.Model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader, valid_loader = DataLoader(train, 32, shuffle=True), DataLoader(valid, 32)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=2 * len(loader))
    torch.manual_seed(0)
    for _ in range(2):
        for pictures, classes in loader:
            optimizer.zero_grad()
            loss_fn(model(pictures), classes).backward()
            optimizer.step()
            scheduler.step()
        val_loss = validate(model, valid_loader, lambda batch: loss_fn(model(batch[0]), batch[1]))
    return model, val_loss


def lstm(example):
    train, valid = example.data()
    model = example.Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    steps, step = 2 * len(train), 0

    def run_through(batches):
        """The losses of a pass, which begins without a state."""
        state = None
        for text, following in batches:
            logits, state = model(text, state)
            state = tuple(part.detach() for part in state)
            yield nn.functional.cross_entropy(logits.transpose(1, 2), following)

    torch.manual_seed(0)
    for _ in range(2):
        for loss in run_through(train):
            for group in optimizer.param_groups:
                group["lr"] = 0.005 * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1)
            optimizer.step()
            step += 1
        with torch.no_grad():
            val_loss = torch.stack([loss.double() for loss in run_through(valid)]).mean().item()
    return model, val_loss


def vae(example):
    train, valid = example.data()
    model = example.Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    loader, valid_loader = DataLoader(train, 64, shuffle=True), DataLoader(valid, 64)

    def parts(images):
        mean, log_variance = model.encoder(images).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * torch.exp(log_variance / 2)
        output = model.decoder(code)
        reconstruction = nn.functional.binary_cross_entropy_with_logits(output, images, reduction="sum") / len(images)
        return reconstruction, (mean ** 2 + log_variance.exp() - 1 - log_variance).sum() / 2 / len(images)

    torch.manual_seed(0)
    for _ in range(2):
        for (images,) in loader:
            optimizer.zero_grad()
            sum(parts(images)).backward()
            optimizer.step()
        val_loss = validate(model, valid_loader, lambda batch: sum(parts(batch[0])))
    return model, val_loss


def gan(example):
    model = example.Model()
    discriminator = torch.optim.Adam(model.discriminator.parameters(), lr=0.002, betas=(0.5, 0.999))
    generator = torch.optim.Adam(model.generator.parameters(), lr=0.001, betas=(0.5, 0.999))
    loader = DataLoader(example.data(), 128, shuffle=True)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / (2 * len(loader)))) / 2)
                 for optimizer in (discriminator, generator)]
    torch.manual_seed(0)
    for _ in range(2):
        for (real,) in loader:
            discriminator.zero_grad()
            fake = model.generator(torch.randn(len(real), 8)).detach()
            (nn.functional.softplus(-model.discriminator(real)).mean() + nn.functional.softplus(model.discriminator(fake)).mean()).backward()
            discriminator.step()
            generator.zero_grad()
            nn.functional.softplus(-model.discriminator(model.generator(torch.randn(len(real), 8)))).mean().backward()
            generator.step()
            for schedule in schedules:
                schedule.step()
    return model, None


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_the_weights_of_the_plain_loop(name, short):
    module, run = short(name)
    torch.manual_seed(0)
    model, val_loss = globals()[name](module)
    assert_equal(run.model.state_dict(), model.state_dict())
    assert val_loss is None or run.history[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-12)


PAGE = (DOCS / "examples.md").read_text()


def command_of(name):
    (command,) = re.findall(rf"^\$ loopctl (run --data {name}.py:.*)$", PAGE, re.MULTILINE)
    return shlex.split(command)


@pytest.fixture
def in_folder_of_examples(monkeypatch):
    monkeypatch.chdir(DOCS / "examples")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_gives_the_weights_and_the_metrics_of_the_file(name, short, tmp_path, in_folder_of_examples):
    _, run = short(name)
    arguments = [*command_of(name), "--epochs", "2", "--out", str(tmp_path / "run"), "--without", "progress", "--without", "checkpoint"]
    done = CliRunner().invoke(command_line, arguments)
    assert done.exit_code == 0, done.output
    assert_equal(load_file(tmp_path / "run" / "weights.safetensors"), run.model.state_dict())
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows] == [
        {key: str(value) for key, value in row.items()} for row in run.history]


class Kill:
    """Ends training some steps into the second epoch, in place of a signal that kills the process."""

    @hookimpl
    def safe_point(self, run: Run):
        if run.epoch == 1 and run.attempts == run.planned_steps // 2 + 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lstm"])
def test_an_example_killed_within_an_epoch_and_resumed_has_the_same_weights_and_metrics(name, short, tmp_path):
    module, run = short(name)
    save = "checkpoint:every_steps=3"           # the last one is of a step before the one that is killed
    with pytest.raises(KeyboardInterrupt):
        train(module, [save, Kill()], epochs=2, out=tmp_path)
    torch.rand(7)                               # a new process has other random numbers
    resumed = train(example(name), [save], epochs=2, out=tmp_path, resume=tmp_path)
    assert_equal(resumed.model.state_dict(), run.model.state_dict())
    assert resumed.history == run.history


def test_a_process_killed_with_sigkill_is_resumed_with_the_same_weights(short, forked, tmp_path, in_folder_of_examples):
    """The LSTM, in whose checkpoints is the state that its `forward` carries."""
    _, run = short("lstm")
    arguments = [*command_of("lstm"), "--epochs", "2", "--plugin", "checkpoint:every_steps=3", "--without", "progress"]
    folder = tmp_path / "run"
    process, last = forked(*arguments, "--out", folder, cwd=Path.cwd()), 0
    while process.poll() is None and last < run.step // 2 + 4:
        time.sleep(0.01)
        last = max((int(file.stem[5:]) for file in folder.glob("checkpoints/step-*.pt")), default=0)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "weights.safetensors").exists()
    done = CliRunner().invoke(command_line, ["run", "--resume", str(folder)])
    assert done.exit_code == 0, done.output
    assert_equal(load_file(folder / "weights.safetensors"), run.model.state_dict())


# What the page says that each reaches: the metric, from, to. The others take longer.
RESULTS = {"regression": ("val_r2", 0.47, 0.53), "hugging_face": ("val_accuracy", 0.91, 0.95), "segmentation": ("val_iou", 0.87, 0.91),
           "vae": ("val_loss", 24.2, 25.2)}


@pytest.mark.parametrize("name", RESULTS)
def test_an_example_reaches_the_result_on_the_page(name):
    metric, low, high = RESULTS[name]
    assert low <= example(name).main().history[-1][metric] <= high


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_at_most_sixty_lines_and_is_on_the_page(name):
    assert len((DOCS / "examples" / f"{name}.py").read_text().splitlines()) <= 60
    assert f"```{{literalinclude}} examples/{name}.py\n" in PAGE


def in_two_processes(names):
    """Train the examples with ddp, and with `progress`, which asks for the plan on rank 0 alone; return the weights."""
    sharded = {"lstm": "ddp:shard=false"}
    return {name: train(example(name), [sharded.get(name, "ddp"), "progress"], epochs=1).model.state_dict() for name in names}


def test_the_examples_train_in_two_processes(ranks):
    names = [name for name in NAMES if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    one, other = ranks(2, in_two_processes, names)
    for name in names:
        assert_equal(one[name], other[name])
        assert all(tensor.isfinite().all() for tensor in one[name].values())
