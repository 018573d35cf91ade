"""Whatever is wrong is said in one line that names the culprit and the way out, and nothing is left behind.

Each case is a command line and words that its message must have. `{tmp}` is a folder of files that the tests write, the
working directory is another one, which is empty before and after.
"""
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from loopctl.cli import main

HEAD = "from dataclasses import dataclass\nfrom loopctl import UsageError, hookimpl\n"

PLUGINS = {
    "misspelt": """
        class Mine:
            @hookimpl
            def epoch_strat(self, run): pass
    """,
    "argument": """
        class Mine:
            @hookimpl
            def epoch_start(self, rnu): pass
    """,
    "default": """
        class Mine:
            @hookimpl
            def epoch_start(self, run=None): pass
    """,
    "unmarked": """
        class Mine:
            @hookimpl
            def setup(self, run): pass
            def epoch_end(self, run): pass
    """,
    "hookless": """
        class Mine:
            def watch(self, run): pass
    """,
    "equal": """
        @dataclass
        class Mine:
            depth: int = 1
            @hookimpl
            def setup(self, run): pass
    """,
    "replace": """
        class One:
            @hookimpl
            def backward(self, loss): pass
        class Two:
            @hookimpl
            def backward(self, loss): pass
    """,
    "needs": "import a_package_that_is_not_there",
    "broken": "class Mine(",
    "raises": "1 / 0",
    "unplugged": """
        class Mine:
            @hookimpl
            def setup(self, run): raise RuntimeError("the cable\\nis unplugged")
    """,
    "refuses": """
        class Mine:
            @hookimpl
            def setup(self, run): raise UsageError("not on a Sunday; wait until Monday")
    """,
    "measures": """
        class Mine:
            @hookimpl
            def setup(self, run): run.metrics["heat"] = 0.0
    """,
    "wants": """
        @dataclass(eq=False)
        class Mine:
            depth: int
            @hookimpl
            def setup(self, run): pass
    """,
}

CONFIGS = {
    "key": "epoch = 3",
    "section": "[run]\nepochs = 3",
    "text": "epochs = 'three'",
    "list": "epochs = [1, 2]",
    "one": "plugin = 'clip'",
    "name": "optimizer = 'adamm'",
    "broken": "epochs = = 3",
}

MINE = """
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset
    from loopctl.cli.data import Data

    def part(count):
        return TensorDataset(torch.zeros(count, 1, 8, 8), torch.zeros(count, dtype=torch.long))

    def no_training():
        return Data(part(0), part(2), 10, (1, 8, 8))

    def no_validation():
        return Data(part(2), part(0), 10, (1, 8, 8))

    def nothing():
        return None

    class Narrow(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3]

    pi = 3.14
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder of wrong files. Its module `mine_for_wrong_input` can be imported."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, text in PLUGINS.items():
        (folder / f"{name}.py").write_text(HEAD + textwrap.dedent(text))
    for name, text in CONFIGS.items():
        (folder / f"{name}.toml").write_text(text + "\n")
    (folder / "bytes.toml").write_bytes(b"\xff\xfe")
    (folder / "mine_for_wrong_input.py").write_text(textwrap.dedent(MINE))
    (folder / "file").write_text("not a folder")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("the only copy")
    (folder / "empty").mkdir()
    (folder / "begun").mkdir()
    (folder / "begun" / "run.toml").write_text("epochs = 1\n")
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("mine_for_wrong_input", "nebula", "quasar"):
        sys.modules.pop(name, None)


@pytest.fixture
def refused(files, tmp_path, monkeypatch):
    """Run a command that must fail, and return the line it says; check that it left nothing behind."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)

    def call(command, status=2):
        before = contents(files)
        result = CliRunner().invoke(main, [word.format(tmp=files) for word in command.split()])
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == status, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.endswith("\n")
        assert result.stderr.count("\n") == 1, result.stderr
        assert len(result.stderr) < 500, "nobody reads so much"
        assert not list(place.iterdir())
        assert contents(files) == before
        return result.stderr
    return call


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if "__pycache__" not in path.parts}


def case(command, *words):
    return pytest.param(command, words, id=command.replace("{tmp}/", ""))


@pytest.mark.parametrize(("command", "words"), [
    # plugins by name
    case("run --plugin clp", "no plugin is called 'clp'", "did you mean 'clip'?"),
    case("run --plugin qqq", "no plugin is called 'qqq'", "there are: accumulate, amp, "),
    case("explain --plugin clp", "no plugin is called 'clp'", "did you mean 'clip'?"),
    case("plugins clp", "no plugin is called 'clp'", "did you mean 'clip'?"),
    case("run --plugin clip:max_nrm=1", "clip: no option 'max_nrm'", "did you mean 'max_norm'?"),
    case("run --plugin clip:max_norm=big", "clip: max_norm takes a number, not 'big'"),
    case("run --plugin early_stopping:patience=1.5", "early_stopping: patience takes a whole number, not '1.5'"),
    case("run --plugin early_stopping:restore_best=maybe", "restore_best takes true|false, not 'maybe'"),
    case("run --plugin amp:dtype=int8", "amp: dtype takes auto|float16|bfloat16, not 'int8'"),
    case("run --plugin warmup:length=soon", "warmup: length takes a length, not 'soon'", "write 30, 5ep, 500st or 10%"),
    case("run --plugin warmup:length=-3", "warmup: length takes a length above 0, not '-3'"),
    case("run --plugin clip:max_norm=-1", "clip: max_norm is above 0, not -1.0"),
    case("run --plugin checkpoint:every_epochs=0", "checkpoint: every_epochs is at least 1, not 0"),
    case("run --plugin early_stopping:patience=0", "early_stopping: patience is at least 1"),
    case("run --plugin clip:max_norm=1,max_norm=2", "clip: option max_norm is given twice"),
    case("run --without clip", "'--without'", "'clip' is not one of 'csv', 'checkpoint', 'progress'"),
    # plugins of one's own
    case("run --plugin {tmp}/misspelt.py:Mine", "mine: no hook is called 'epoch_strat'", "did you mean 'epoch_start'?"),
    case("run --plugin {tmp}/argument.py:Mine", "mine: epoch_start has no argument 'rnu'", "did you mean 'run'?"),
    case("run --plugin {tmp}/default.py:Mine", "mine: epoch_start gives 'run' a default", "hook's arguments have none"),
    case("run --plugin {tmp}/unmarked.py:Mine", "mine: epoch_end", "not marked", "write @hookimpl above it"),
    case("run --plugin {tmp}/hookless.py:Mine", "mine: has no hooks", "mark its methods with @hookimpl"),
    case("run --plugin {tmp}/equal.py:Mine", "mine: equal instances", "write @dataclass(eq=False)"),
    case("run --plugin {tmp}/wants.py:Mine", "mine: ", "depth"),
    case("run --plugin {tmp}/replace.py:One --plugin {tmp}/replace.py:Two",
         "one and two both replace backward", "choose one"),
    case("run --plugin {tmp}/absent.py:Mine", "there is no file {tmp}/absent.py"),
    case("run --plugin {tmp}/needs.py:Mine", "{tmp}/needs.py cannot be imported", "'a_package_that_is_not_there'"),
    case("run --plugin {tmp}/broken.py:Mine", "{tmp}/broken.py cannot be imported (SyntaxError: "),
    case("run --plugin {tmp}/raises.py:Mine", "{tmp}/raises.py cannot be imported (ZeroDivisionError: "),
    case("run --plugin {tmp}/misspelt.py:Mime", "{tmp}/misspelt.py has no 'Mime'", "did you mean 'Mine'?"),
    case("run --plugin no.such.package:Mine", "no.such.package cannot be imported (ModuleNotFoundError"),
    case("run --plugin {tmp}/refuses.py:Mine", "mine: not on a Sunday; wait until Monday"),
    # models, data sets and optimizers
    case("run --model resnet81", "no model is called 'resnet81'", "did you mean 'resnet18'?"),
    case("run --model qqq", "no model is called 'qqq'", "there are cnn, linear, mlp, vit, ", "or package.module:name"),
    case("run --data digts", "no data is called 'digts'", "did you mean 'digits'?"),
    case("run --data qqq", "no data is called 'qqq'", "there are digits, mnist, ", "or package.module:name"),
    case("run --optimizer adamm", "no optimizer is called 'adamm'", "did you mean 'adam'?"),
    case("run --optimizer qqq", "no optimizer is called 'qqq'", "there are adadelta, ", "or package.module:name"),
    case("run --model cnn:widht=3", "model cnn: no option 'widht'", "did you mean 'width'?"),
    case("run --data digits:chanels=3", "data digits: no option 'chanels'", "did you mean 'channels'?"),
    case("run --optimizer sgd:momentm=1", "optimizer sgd: no option 'momentm'", "did you mean 'momentum'?"),
    case("run --model cnn:width=wide", "model cnn: width takes a whole number, not 'wide'"),
    case("run --data digits:channels=three", "data digits: channels takes a whole number, not 'three'"),
    case("run --data cifar10:augment=maybe", "data cifar10: augment takes true|false, not 'maybe'"),
    case("run --optimizer sgd:momentum=much", "optimizer sgd: momentum takes a number, not 'much'"),
    case("run --optimizer adamw:betas=0.9", "optimizer adamw: betas takes 2 values, as in betas=0.9,0.999, not 0.9"),
    case("run --model cnn:width=0", "model cnn: width is at least 1, not 0"),
    case("run --data fake:classes=0", "data fake: classes is at least 1, not 0"),
    case("run --optimizer sgd:momentum=-1", "optimizer sgd: ", "momentum", "-1"),
    case("run --optimizer muon", "optimizer muon: ", "2D"),
    case("run --model no.such:Net", "model no.such:Net: no.such cannot be imported (ModuleNotFoundError"),
    case("run --model mine_for_wrong_input:Narow", "model mine_for_wrong_input", "did you mean 'Narrow'?"),
    case("run --model {tmp}/absent.py:Net", "model ", "there is no file {tmp}/absent.py"),
    case("run --model {tmp}/mine_for_wrong_input.py:pi", "pi is a float", "name a class or a function"),
    case("run --model mine_for_wrong_input:nothing", "model mine_for_wrong_input:nothing made a NoneType"),
    case("run --model mine_for_wrong_input:Narrow", "shape (1, 3)", "has 10 classes", "fit its last layer"),
    case("run --model resnet18", "model resnet18 cannot take images of 1x8x8", "channels=3"),
    case("run --model vit:patch_size=3", "model vit: patch_size=3 does not divide", "8 pixels"),
    case("run --data mnist", "data mnist is not in ", "place/data", "add --download to get it, or --data-root DIR"),
    case("run --data cifar10 --data-root {tmp}/full", "data cifar10 is not in {tmp}/full", "--download", "--data-root"),
    case("run --data imagefolder", "there is no folder", "place/data/train", "train/CLASS and val/CLASS"),
    case("run --data imagenet", "data imagenet is not in", "put ILSVRC2012_devkit_t12.tar.gz, ", "--data-root DIR"),
    case("run --data mine_for_wrong_input:no_training", "data mine_for_wrong_input:no_training has no training images"),
    case("run --data mine_for_wrong_input:no_validation", "has no validation images"),
    case("run --data mine_for_wrong_input:nothing", "made a NoneType", "return a pair (train, valid) or a"),
    # numbers
    case("run --batch-size 0", "'--batch-size'", "0 is not in the range x>=1"),
    case("run --epochs 0", "'--epochs'", "0 is not in the range x>=1"),
    case("run --epochs -3", "'--epochs'", "-3 is not in the range x>=1"),
    case("run --epochs many", "'--epochs'", "'many' is not a valid"),
    case("run --max-steps 0", "'--max-steps'", "0 is not in the range x>=1"),
    case("run --eval-every 0", "'--eval-every'", "0 is not in the range x>=1"),
    case("run --workers -1", "'--workers'", "-1 is not in the range x>=0"),
    case("run --seed -1", "'--seed'", "-1 is not in the range"),
    case("run --lr -1", "lr is -1.0", "a learning rate is a number from 0"),
    case("run --lr nan", "lr is nan", "a learning rate is a number from 0"),
    case("run --lr inf", "lr is inf", "a learning rate is a number from 0"),
    case("run --lr fast", "'--lr'", "'fast' is not a valid float"),
    case("run --lr 0.1 --optimizer sgd:lr=0.2", "optimizer sgd: lr is given twice", "leave one out"),
    case("run --optimizer sgd:lr=-1", "lr is -1", "a learning rate is a number from 0"),
    # the rest of the command line
    case("runn", "No such command 'runn'"),
    case("run --epohcs 3", "No such option '--epohcs'", "--epochs"),
    case("run digits", "unexpected extra argument (digits)"),
    case("run --device gpu", "device 'gpu' is unknown", "there are auto, cpu, mps, cuda and cuda:1"),
    # config files
    case("run --config {tmp}/absent.toml", "--config: there is no file {tmp}/absent.toml"),
    case("run --config {tmp}/full", "--config: {tmp}/full cannot be read"),
    case("run --config {tmp}/bytes.toml", "--config: {tmp}/bytes.toml cannot be read"),
    case("run --config {tmp}/broken.toml", "--config: {tmp}/broken.toml is not TOML", "line 1"),
    case("run --config {tmp}/key.toml", "--config: {tmp}/key.toml", "'epoch'", "did you mean 'epochs'?"),
    case("run --config {tmp}/section.toml", "--config: {tmp}/section.toml", "'run'"),
    case("run --config {tmp}/list.toml", "{tmp}/list.toml: epochs takes one value, not [1, 2]"),
    case("run --config {tmp}/one.toml", "{tmp}/one.toml: plugin takes a list, not 'clip'"),
    case("run --config {tmp}/text.toml", "epochs", "'three' is not a valid"),
    case("run --config {tmp}/name.toml", "no optimizer is called 'adamm'", "did you mean 'adam'?"),
    # folders
    case("run --out {tmp}/file/below", "--out {tmp}/file/below cannot be written", "say another folder"),
    case("run --out {tmp}/file", "--out {tmp}/file exists and is not overwritten", "say another folder"),
    case("run --out {tmp}/full", "--out {tmp}/full exists and is not overwritten", "or --resume {tmp}/full"),
    case("run --resume {tmp}/full", "--resume: there is no file {tmp}/full/run.toml"),
    case("run --resume {tmp}/begun", "{tmp}/begun: no checkpoint there"),
    case("run --resume {tmp}/begun --out elsewhere", "a resumed run goes on in its own folder", "leave out --out"),
    # what only the composition shows
    case("run --plugin early_stopping:monitor=val_acuracy", "early_stopping: monitor=val_acuracy",
         "the run has no such metric", "did you mean 'val_accuracy'?"),
    case("run --plugin checkpoint:monitor=val_acuracy", "checkpoint: monitor=val_acuracy",
         "the run has no such metric", "did you mean 'val_accuracy'?"),
    case("run --plugin early_stopping:monitor=qqq", "no such metric", "train_accuracy, train_loss, val_"),
    case("run --plugin amp:dtype=float16 --optimizer lbfgs", "amp: float16", "LBFGS", "use dtype=bfloat16"),
])
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_left(refused, files, command, words):
    said = refused(command)
    for word in words:
        assert word.format(tmp=files) in said


def test_a_new_folder_is_taken_away_when_nothing_could_begin(refused):
    """Also the folders above it; the message is one that comes after the folder is made."""
    assert "monitor=qqq" in refused("run --plugin early_stopping:monitor=qqq --out new/and/deep")


def test_an_empty_folder_of_the_users_is_left_as_it_was(refused):
    assert "monitor=qqq" in refused("run --plugin early_stopping:monitor=qqq --out {tmp}/empty")


def test_a_failed_run_takes_nothing_of_its_neighbours_away(files, tmp_path, monkeypatch):
    """Another run may have begun in the same new folder, runs/, in the meantime."""
    monkeypatch.chdir(tmp_path)
    (files / "neighbour.py").write_text(HEAD + textwrap.dedent("""
        from pathlib import Path
        class Mine:
            @hookimpl
            def setup(self, run):
                Path("runs/neighbour").mkdir()
                Path("runs/neighbour/metrics.csv").write_text("precious")
                raise UsageError("no")
    """))
    result = CliRunner().invoke(main, ["run", "--plugin", f"{files}/neighbour.py:Mine"])
    assert result.stderr == "error: mine: no\n"
    assert contents(tmp_path / "runs") == {Path("neighbour"): None, Path("neighbour/metrics.csv"): b"precious"}


def test_a_metric_whose_better_side_is_not_plain_from_its_name(refused):
    said = refused("run --plugin {tmp}/measures.py:Mine --plugin early_stopping:monitor=heat")
    assert "early_stopping: monitor=heat" in said
    assert "better" in said
    assert "mode=min" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_where_there_is_none(refused):
    said = refused("run --device cuda")
    assert "device 'cuda' is not here" in said
    assert "no CUDA device" in said
    assert "'auto' takes what there is" in said


def test_a_cuda_device_beyond_those_there_are(refused):
    assert "device 'cuda:99' is not here: this machine has " in refused("run --device cuda:99")


def test_an_error_in_a_plugin_names_the_plugin_and_the_hook(refused):
    said = refused("run --plugin {tmp}/unplugged.py:Mine", status=1)
    assert "RuntimeError: the cable is unplugged, raised by plugin 'mine' in its hook setup" in said
    assert "--traceback shows where" in said


# Packages that offer plugins, as pip leaves them


@pytest.fixture
def installed(files):
    """Packages with a plugin each: one that does not import, and one whose class is gone."""
    for package, target in (("nebula", "nebula.plugin:Nebula"), ("quasar", "quasar:Quasar")):
        info = files / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[loopctl]\n{package} = {target}\n")
    (files / "nebula").mkdir()
    (files / "nebula" / "__init__.py").write_text("raise ImportError('it needs\\na telescope')\n")
    (files / "quasar.py").write_text("class Pulsar:\n    pass\n")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("command", "words"), [
    case("run --plugin nebula", "nebula: nebula.plugin cannot be imported (ImportError: it needs a telescope)"),
    case("explain --plugin nebula", "nebula: nebula.plugin cannot be imported (ImportError: it needs a telescope)"),
    case("plugins nebula", "nebula: nebula.plugin cannot be imported (ImportError: it needs a telescope)"),
    case("run --plugin quasar", "quasar: quasar has no 'Quasar'", "Pulsar"),
    case("run --plugin nebla", "no plugin is called 'nebla'", "did you mean 'nebula'?"),
])
def test_a_broken_package_is_named_when_it_is_asked_for(refused, command, words):
    said = refused(command)
    for word in words:
        assert word in said


@pytest.mark.usefixtures("installed")
def test_a_broken_package_disturbs_nobody_who_does_not_ask_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(main, ["plugins"])
    assert (listed.exit_code, listed.stderr) == (0, "")
    assert "BROKEN" not in listed.stdout
    assert any(line.startswith("nebula ") and "[nebula 1.2]" in line for line in listed.stdout.splitlines())
    run = CliRunner().invoke(main, ["run", "--model", "linear", "--max-steps", "1", "--out", "new", "--plugin", "clip"])
    assert (run.exit_code, run.stderr) == (0, "")
    assert (tmp_path / "new" / "metrics.csv").is_file()


@pytest.mark.usefixtures("installed")
def test_the_check_marks_the_broken_packages():
    result = CliRunner().invoke(main, ["plugins", "--check"])
    assert result.exit_code == 1
    assert result.stderr == "error: broken plugins: nebula, quasar; their lines above say why\n"
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "BROKEN  nebula: nebula.plugin cannot be imported (ImportError: it needs a telescope)" in lines["nebula"]
    assert "BROKEN  quasar: quasar has no 'Quasar'" in lines["quasar"]
    assert [name for name, line in lines.items() if "BROKEN" in line] == ["nebula", "quasar"]


def test_the_check_finds_nothing_wrong_with_what_comes_along():
    result = CliRunner().invoke(main, ["plugins", "--check"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "BROKEN" not in result.stdout
