"""The pages in docs/: their commands and examples work as written, and the names on them exist."""
import ast
import html
import inspect
import re
import shlex
import subprocess
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

import loopctl
from loopctl import available, fit, hooks, load
from loopctl.cli import main
from loopctl.composition.compose import SPECS
from loopctl.composition.discovery import build_plugin, plugin_name
from loopctl.composition.options import plugin_options

DOCS = Path(__file__).parents[1] / "docs"


def blocks(text, kind="python"):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


PAGE = (DOCS / "hooks.md").read_text()
IMPORTS = blocks(PAGE)[0]
HOOKS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))


def test_the_page_of_hooks_has_all_hooks_in_order():
    assert list(HOOKS) == list(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_the_page_shows_the_signature_of_a_hook(name):
    signature = inspect.signature(getattr(hooks, name))
    shown, example = blocks(HOOKS[name])
    assert shown == f"def {name}{signature}\n".replace("'", "")
    assert f"    def {name}(self" in example
    replaces = SPECS[name].loopctl_spec["firstresult"] and name != "train"
    assert not replaces or re.search("[Rr]eplace", HOOKS[name]) or name == "micro_step"


@pytest.mark.parametrize("name", SPECS)
def test_the_example_of_a_hook_trains(name, net, batches, valid, sgd):
    scope = {}
    exec(IMPORTS, scope)
    before = set(scope)
    exec(blocks(HOOKS[name])[1], scope)
    (cls,) = (scope[found] for found in set(scope) - before if isinstance(scope[found], type))
    run = fit(net, scope["nn"].CrossEntropyLoss(), sgd, batches, valid, epochs=2, plugins=[cls()])
    assert run.hook.acting[name] == [plugin_name(cls)]
    assert run.epoch == 2
    assert cls.__doc__


# The hooks whose example changes neither the weights nor the statistics nor the losses of a run.
UNCHANGED = {"wrap_model", "train", "train_start", "micro_step", "after_backward", "after_step", "safe_point",
             "evaluate", "after_evaluate", "epoch_end"}


def small_network():
    """A network with BatchNorm and dropout, and an optimizer with momentum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.25), nn.Linear(12, 3))
    inputs, targets = torch.randn(40, 6), torch.arange(40) % 3
    return model, list(zip(inputs.split(8), targets.split(8), strict=True)), partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def plain_loop():
    """The state of the small network, and the mean loss of each epoch, after a training loop written by hand."""
    model, batches, sgd = small_network()
    optimizer, losses = sgd(model.parameters()), []
    torch.manual_seed(7)
    for _ in range(2):
        model.train()
        total = torch.zeros(())
        for input, target in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(input), target)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(input)
        losses.append(total.item() / 40)
    return model.state_dict(), losses


@pytest.mark.parametrize("name", SPECS)
def test_the_example_of_a_hook_changes_the_result_only_if_that_is_its_purpose(name, plain_loop):
    scope = {}
    exec(IMPORTS, scope)
    before = set(scope)
    exec(blocks(HOOKS[name])[1], scope)
    (cls,) = (scope[found] for found in set(scope) - before if isinstance(scope[found], type))
    model, batches, sgd = small_network()
    run = fit(model, nn.CrossEntropyLoss(), sgd, batches, batches, epochs=2, plugins=[cls()], seed=7)
    state, losses = plain_loop
    same_state = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    same_losses = [row["train_loss"] for row in run.history] == pytest.approx(losses, rel=1e-6)
    assert (same_state and same_losses) == (name in UNCHANGED)


TUTORIAL = (DOCS / "tutorial.md").read_text()


def test_the_tutorial_works_as_written(tmp_path, monkeypatch):
    """Its files are written, and its commands and its Python are run, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    for kind, block in re.findall(r"```(console|python)\n(.*?)```", TUTORIAL, re.DOTALL):
        if "def model(" in block:
            Path("mine.py").write_text(block)
        elif kind == "python":
            exec(block, scope)
        else:
            for command in re.findall(r"^\$ (loopctl .*)$", block, re.MULTILINE):
                done = CliRunner().invoke(main, shlex.split(command)[1:])
                assert done.exit_code == 0, done.output
    assert scope["run"].history[-1]["val_loss"] < 0.05
    listed = set(re.findall(r"^\| `([\w./]+)`", TUTORIAL, re.MULTILINE))
    assert {path.name for path in (tmp_path / "runs" / "first").iterdir()} == {name.rstrip("/") for name in listed}


def test_the_first_page_works_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, scope = (DOCS / "index.md").read_text(), {}
    (command,) = re.findall(r"^\$ (loopctl .*)$", page, re.MULTILINE)
    done = CliRunner().invoke(main, [*shlex.split(command)[1:], "--epochs", "1"])
    assert done.exit_code == 0, done.output
    exec(blocks(page)[0], scope)
    assert len(scope["run"].history) == 20
    assert all((DOCS / link).exists() for link in re.findall(r"\]\(([\w-]+\.md)", page))

def test_the_commands_of_the_page_on_fine_tuning_run_in_order(tmp_path, monkeypatch):
    """With tiny images, and random weights in place of those that would be downloaded."""
    from PIL import Image
    from torchvision.models import ResNet18_Weights, resnet18

    monkeypatch.chdir(tmp_path)
    for part, number in (("train", 4), ("val", 2)):
        for kind, colour in (("cat", "red"), ("dog", "blue")):
            Path("photos", part, kind).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (32, 32), colour).save(Path("photos", part, kind, f"{index}.jpg"))
    state = resnet18(weights=None).state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, **arguments: state)
    (*commands,) = re.findall(r"^\$ (loopctl .*)$", (DOCS / "fine-tuning.md").read_text(), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        done = CliRunner().invoke(main, [*shlex.split(command.replace("imagefolder", "imagefolder:size=32"))[1:], "--epochs", "1"])
        assert done.exit_code == 0, done.output
    head, whole = (load_file(f"runs/{name}/weights.safetensors") for name in ("head", "all"))
    assert {name for name in state if "fc" not in name and not torch.equal(state[name], head[name])} == set()
    assert any(not torch.equal(head[name], whole[name]) for name in head if "fc" not in name)

def test_the_page_on_tasks_works_as_written(tmp_path, monkeypatch):
    """The file of its command-line section is written, and its commands and its other Python are run."""
    monkeypatch.chdir(tmp_path)
    ran, scope = 0, {"__name__": "page"}        # the Python goes on from block to block
    for kind, block in re.findall(r"```(console|python)\n(.*?)```", (DOCS / "tasks.md").read_text(), re.DOTALL):
        if "def data(" in block:
            Path("regression.py").write_text(block)
        elif kind == "python":
            exec(block, scope)
        else:
            for command in re.findall(r"^\$ (loopctl .*)$", block, re.MULTILINE):
                done = CliRunner().invoke(main, shlex.split(command)[1:])
                assert done.exit_code == 0, done.output
                ran += 1
    assert ran > 2


def specs(text):
    """The plugin specs in the right column of a page's tables."""
    cells = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ") and " | " in line]
    words = [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]
    return sorted({word for word in words if word.split(":")[0] in available()})


@pytest.mark.parametrize("spec", specs((DOCS / "coming-from.md").read_text()))
def test_a_plugin_spec_on_the_page_for_users_of_other_libraries_is_valid(spec):
    build_plugin(spec)


def test_the_hooks_and_options_on_the_page_for_users_of_other_libraries_exist():
    page = (DOCS / "coming-from.md").read_text()
    cells = " ".join(line.split(" | ")[1] for line in page.splitlines() if line.startswith("| ") and " | " in line)
    known = {*available(), *SPECS, "fit", "until", *inspect.signature(fit).parameters}
    assert set(re.findall(r"`([a-z_]+)`", cells)) <= known
    options = {option for command in main.commands.values() for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(--[a-z-]+)", cells)) <= options


def test_each_row_of_a_catalogue_has_a_name_here_or_says_why_not():
    text = (DOCS / "coming-from.md").read_text().partition("\n## Their catalogues\n")[2]
    rows = re.findall(r"^\| (`.*|loggers: .*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| ", text, re.MULTILINE)) - text.count("| there | in loopctl |") > 90
    for there, here in rows:
        assert re.search(r"`[^`]+`|\]\(\S+\.md\)", here) or re.search(r"not here(?: as options)?: \w.{20}", here), there


def test_the_page_on_what_is_around_a_run_works_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, scope = (DOCS / "runs.md").read_text(), {}
    for kind, block in re.findall(r"```(console|python)\n(.*?)```", page, re.DOTALL):
        if kind == "python":
            exec(block, scope)
        for command in re.findall(r"^\$ (loopctl .*)$", block, re.MULTILINE) if kind == "console" else ():
            done = CliRunner().invoke(main, shlex.split(command)[1:])
            assert done.exit_code == 0, done.output
    assert scope["run"].history[-1]["val_loss"] < 0.01


# docs/api.md


def rooms_of_plugins():
    """The modules of loopctl that the built-in plugins import, besides loopctl itself."""
    found = set()
    for path in (DOCS.parent / "plugins").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [(node.module, alias.name) for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for module, name in names:
                if module.startswith("loopctl."):
                    inner = f"{module}.{name}"
                    found.add(inner if find_spec(module).submodule_search_locations and find_spec(inner) else module)
    return sorted(found)



def test_the_code_of_the_page_of_tapes_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "why.md").read_text().partition("## Tapes")[2].partition("\n## ")[0], re.DOTALL):
        exec(block, scope)
    assert "['backward 1', 'update']" in capsys.readouterr().out


def test_the_commands_of_the_page_on_differences_print_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "why.md").read_text()
    for command in re.findall(r"^\$ (loopctl .*)$", "".join(blocks(page, "console")), re.MULTILINE):
        done = CliRunner().invoke(main, shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
    assert done.stdout in page


API = (DOCS / "api.md").read_text()


@pytest.mark.parametrize("name", loopctl.__all__)
def test_every_exported_name_is_on_the_api_page(name):
    assert re.search(rf"^\.\. (?:auto|py:)\w+:: loopctl\.{name}\b", API, re.MULTILINE)


@pytest.mark.parametrize("module", rooms_of_plugins())
def test_every_module_that_a_plugin_imports_is_on_the_api_page(module):
    assert f"### `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n" in API


def dense(text):
    """The text without spaces, backticks and the dashes of lists, which differ between a docstring and its page."""
    return re.sub(r"[\s`]+|^\s*- ", "", text, flags=re.MULTILINE)


def documented(module):
    """The functions and classes of a module that have a docstring, by their full names."""
    return {f"{module.__name__}.{name}": one for name, one in vars(module).items()
            if name[0] != "_" and getattr(one, "__module__", "") == module.__name__ and callable(one) and vars(one).get("__doc__", one.__doc__)}


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", DOCS, site, "-d", tmp_path / "trees"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = (site / "plugins.html").read_text()
    pictures = re.findall(r"!\[\w+\]\(gallery/(\w+)\.svg\)", (DOCS / "gallery.md").read_text())
    for name in available():
        text = (site / "generated" / f"{name}.html").read_text()
        shown = html.unescape(re.sub(r"<[^>]+>", "", text))
        for paragraph in inspect.getdoc(load(name)).split("\n\n")[:-1]:            # with every asterisk and backslash
            assert dense(paragraph) in dense(shown)
        assert all(dense(option.help) in dense(shown) for option in plugin_options(load(name)).values())
        assert f'href="generated/{name}.html"' in listed
        (command,) = re.findall(r"\$ (loopctl run .*)", shown)
        built = [build_plugin(spec)[0] for spec in re.findall(r"--plugin (\S+)", command)]
        assert name in built
        assert (f"_images/{name}.svg" in text) == (name in pictures)
    assert all((site / "_images" / f"{picture}.svg").exists() for picture in pictures)
    page = (site / "api.html").read_text()
    shown = dense(html.unescape(re.sub(r"<[^>]+>", "", page)))
    known = {f"loopctl.{name}": getattr(loopctl, name) for name in loopctl.__all__}
    assert [name for name in known if f'id="{name}"' not in page] == []
    known = {name: one for name, one in known.items() if name not in ("loopctl.__version__", "loopctl.Duration", "loopctl.hookimpl")}
    for module in rooms_of_plugins():
        found = documented(import_module(module))
        assert [name for name in found if f'id="{name}"' not in page] == []
        known |= found
    for one in known.values():                          # word for word
        for paragraph in inspect.getdoc(one).split("\n\n"):
            assert dense(paragraph) in shown


def test_the_page_about_use_works_as_written(tmp_path, monkeypatch):
    """Its commands and its Python are run, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    for kind, block in re.findall(r"```(console|python)\n(.*?)```", (DOCS / "after-training.md").read_text(), re.DOTALL):
        if kind == "python":
            exec(block, scope)
        else:
            for command in re.findall(r"^\$ (loopctl .*)$", block, re.MULTILINE):
                if command.endswith("onnx") and not find_spec("onnxruntime"):
                    continue
                done = CliRunner().invoke(main, shlex.split(command)[1:])
                assert done.exit_code == 0, done.output
    assert scope["outputs"].shape == (1, 10)
