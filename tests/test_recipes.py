"""Known recipes as one command: each equals the loop that somebody who knows the recipe would write, to the bit."""
import re
import shlex
import shutil
from math import cos, pi
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import v2

from loopctl.cli import main as command_line

NETWORK = '''
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, images):
        return torch.relu(images + self.norm(self.conv(images)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 4)

    def forward(self, images):
        return self.head(self.drop(self.blocks(self.stem(images)).mean((2, 3))))


def data():
    generator = torch.Generator().manual_seed(0)

    def loader(samples, shuffle):
        images, classes = torch.randn(samples, 3, 12, 12, generator=generator), torch.randint(0, 4, (samples,), generator=generator)
        return DataLoader(TensorDataset(images, classes), 8, shuffle=shuffle)

    return loader(44, True), loader(16, False)
'''


PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
LOOKAHEAD = Path(__file__).parents[1] / "docs" / "examples" / "loopctl-lookahead" / "loopctl_lookahead.py"
DATA_AND_LENGTH = ("--data", "--model", "--batch-size", "--epochs")


def command_of(title):
    """The options of a command on the page, without data, model and length; 5 epochs of warmup are one here."""
    text = re.search(rf"^## {title}\n.*?```console\n\$ loopctl run (.*?)```", PAGE, re.DOTALL | re.MULTILINE)[1]
    words = shlex.split(text.replace("\\\n", " ").replace("5ep", "1ep"))
    pairs = [words[number:number + 2] for number in range(0, len(words), 2)]
    return [word for pair in pairs if pair[0] not in DATA_AND_LENGTH for word in pair]


@pytest.fixture
def run_recipe(tmp_path, monkeypatch):
    """Run a recipe of the page in a folder with the network above; return its weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    shutil.copy(LOOKAHEAD, tmp_path)

    def call(title, epochs):
        loss = [] if "--loss" in command_of(title) else ["--loss", "cross_entropy"]
        arguments = ["run", "--model", "net.py:Network", "--data", "net.py:data", "--seed", "1", "--device", "cpu", "--without", "progress",
                     "--epochs", str(epochs), "--out", "out", *loss, *command_of(title)]
        done = CliRunner().invoke(command_line, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return load_file(tmp_path / "out" / "weights.safetensors")
    return call


def start():
    """The network and the data of the command, at the start of its training; seeds torch as the command does."""
    scope = {}
    exec(NETWORK, scope)
    torch.manual_seed(1)
    model = scope["Network"]()
    torch.manual_seed(1)
    return model, *scope["data"]()


class Average:
    """An exponential moving average of weights and batch statistics, as torch.optim.swa_utils has it."""

    def __init__(self, model, decay):
        self.model, self.decay, self.values = model, decay, {}

    @torch.no_grad()
    def update(self):
        for name, tensor in self.model.state_dict().items():
            if not self.values.get(name, tensor).is_floating_point() or name not in self.values:
                self.values[name] = tensor.clone()
            else:
                self.values[name].lerp_(tensor, 1 - self.decay)


def pass_over(model, batches):
    """What is left of an evaluation: its loader has drawn a random number."""
    model.eval()
    with torch.no_grad():
        for images, _ in batches:
            model(images)
    model.train()


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def layers(model):
    """The layers from input to output, as BEiT counts them."""
    return [model.stem, model.blocks[0], model.blocks[1], model.head]


@pytest.mark.compares(use="mixup, cutmix, label_smoothing, ema, warmup, cosine, layerwise_lr, agc", technique="timm's recipe in one command",
                      source="the loop by hand", tolerance="to the bit")
def test_timm_s_recipe_is_one_command(run_recipe):
    """Mixup and cutmix, label smoothing, weight averages, warmup then cosine, layer-wise decay, adaptive clipping."""
    found = run_recipe("timm's recipe for transformers", epochs=3)
    model, train, valid = start()
    groups = [{"params": [p for p in layer.parameters() if (p.ndim <= 1) == vector], "lr": 0.001 * 0.75 ** (3 - depth), "weight_decay": 0.0 if vector else 0.05}
              for depth, layer in enumerate(layers(model)) for vector in (False, True)]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.001)
    rates = [group["lr"] for group in optimizer.param_groups]
    mixup, cutmix, average = v2.MixUp(alpha=0.8, num_classes=4), v2.CutMix(alpha=1.0, num_classes=4), Average(model, 0.9998)
    step, total = 0, 3 * len(train)
    for _ in range(3):
        for images, classes in train:
            factor = (0.001 + (1 - 0.001) * min(1.0, step / len(train))) * ((1 + cos(pi * step / total)) / 2)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            images, soft = (cutmix if torch.rand(()) < 0.5 else mixup)(images, classes)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), soft, label_smoothing=0.1).backward()
            for name, parameter in model.named_parameters():
                if not name.startswith("head"):
                    clip_by_units(parameter, 0.02)
            optimizer.step()
            average.update()
            step += 1
        pass_over(model, valid)
    assert_equal(found, average.values)


@torch.no_grad()
def clip_by_units(parameter, factor):
    """Adaptive gradient clipping of one parameter, formula 3 of arXiv:2102.06171."""
    dims = tuple(range(1, parameter.ndim)) or 0
    limit = torch.linalg.vector_norm(parameter, dim=dims, keepdim=True).clamp(min=1e-3) * factor
    norm = torch.linalg.vector_norm(parameter.grad, dim=dims, keepdim=True)
    parameter.grad.mul_(torch.where(norm < limit, 1.0, limit / norm.clamp(min=1e-6)))


@pytest.mark.compares(use="mixup, cutmix, label_smoothing, ema, warmup, cosine, layerwise_lr", technique="torchvision's ResNet recipe in one command",
                      source="the loop by hand", tolerance="to the bit")
def test_torchvision_s_recipe_is_one_command(run_recipe):
    """SGD without weight decay of norms, label smoothing, mixup or cutmix, a linear warmup and a cosine by epoch, and
    weight averages from the end of the warmup on, here of every update."""
    found = run_recipe("torchvision's recipe for ResNet", epochs=4)
    model, train, valid = start()
    norms = [p for module in model.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()]
    others = [p for p in model.parameters() if not any(p is norm for norm in norms)]
    optimizer = torch.optim.SGD([{"params": others}, {"params": norms, "weight_decay": 0.0}], lr=0.5, momentum=0.9, weight_decay=2e-5)
    mixup, cutmix, average = v2.MixUp(alpha=0.2, num_classes=4), v2.CutMix(alpha=1.0, num_classes=4), Average(model, 0.9998)
    for epoch in range(4):
        factor = 0.01 if epoch < 1 else (1 + cos(pi * (epoch - 1) / 3)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * factor
        for number, (images, classes) in enumerate(train, 1):
            images, soft = (cutmix if torch.rand(()) < 0.5 else mixup)(images, classes)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), soft, label_smoothing=0.1).backward()
            optimizer.step()
            if epoch >= 1 or number == len(train):
                average.update()
        pass_over(model, valid)
    assert_equal(found, average.values)


@pytest.mark.compares(use="label_smoothing, freeze, layerwise_lr, channels_last", technique="the speed run's recipe for CIFAR-10 in one command",
                      source="the loop by hand", tolerance="to the bit")
def test_the_speed_run_s_recipe_is_one_command(run_recipe):
    """As airbench has it: summed losses, Nesterov momentum, a frozen first convolution, norm biases 64 times as fast, a
    triangular rate, channels last, Lookahead with a factor that falls."""
    found = run_recipe("The speed run for CIFAR-10", epochs=3)
    model, train, valid = start()
    model = model.to(memory_format=torch.channels_last)
    model.stem.weight.requires_grad_(False)
    fast = [block.norm.bias for block in model.blocks]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is bias for bias in fast)]
    optimizer = torch.optim.SGD([{"params": others, "lr": 0.002}, {"params": fast, "lr": 0.002 * 64}], lr=0.002, momentum=0.85, nesterov=True, weight_decay=5e-4)
    rates, step = [group["lr"] for group in optimizer.param_groups], 0
    moved = [p.detach() for p in model.parameters()] + [b for b in model.buffers() if b.is_floating_point()]
    slow = [tensor.clone() for tensor in moved]
    for _ in range(3):
        for images, classes in train:
            factor = 0.2 + 0.8 * (step / 3.6) if step < 4 else 1 + (0.07 - 1) * min(step - 4, 14.4) / 14.4
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()
            images = images.to(memory_format=torch.channels_last)
            nn.functional.cross_entropy(model(images), classes, label_smoothing=0.2, reduction="sum").backward()
            optimizer.step()
            step += 1
            if step % 5 == 0:
                with torch.no_grad():
                    for slow_one, fast_one in zip(slow, moved, strict=True):
                        slow_one.lerp_(fast_one, 1 - 0.774 * (step / 18) ** 3)
                        fast_one.copy_(slow_one)
        pass_over(model, valid)
    with torch.no_grad():
        for slow_one, fast_one in zip(slow, moved, strict=True):
            fast_one.copy_(slow_one)
    assert_equal(found, model.state_dict())
