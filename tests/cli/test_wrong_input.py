"""Wrong command lines: each gets a one-line error that names the culprit and the way out, and leaves no files behind.

Each case is a command line and texts that must be in its error. `{tmp}` is a folder with files that the tests write.
The working directory is another folder, which must be empty before and after.
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
    "exits": "raise SystemExit('usage: a script')",
    "typed": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from torch import nn
        @dataclass(eq=False)
        class Mine:
            head: "nn.Module | None" = None
            @hookimpl
            def setup(self, run): pass
    """,
    "lost": """
        @dataclass(eq=False)
        class Mine:
            colour: str = "red"
            def __post_init__(self): {"red": 1}[self.colour]
            @hookimpl
            def setup(self, run): pass
    """,
    "short": """
        class Mine:
            @hookimpl
            def setup(self, run): raise EOFError("10 bytes of 20")
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
    "control": 'data_root = "a\\u0000b"',
    "underscore": "lr = '1_0'",
}

BYTES = {
    "huge.toml": b"epochs = " + b"9" * 5000,
    "hex.toml": b"epochs = 0x" + b"f" * 5000,
    "list.of.hex.toml": b"epochs = [0x" + b"f" * 5000 + b"]",
    "deep.toml": b"plugin = " + b"[" * 3000 + b"]" * 3000,
}

MINE = """
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset
    from loopctl import Data

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
    """A folder of faulty plugins and configurations. Its module `mine_for_wrong_input` can be imported."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, text in PLUGINS.items():
        (folder / f"{name}.py").write_text(HEAD + textwrap.dedent(text))
    for name, text in CONFIGS.items():
        (folder / f"{name}.toml").write_text(text + "\n")
    (folder / "bytes.toml").write_bytes(b"\xff\xfe")
    for name, content in BYTES.items():
        (folder / name).write_bytes(content)
    (folder / "mine_for_wrong_input.py").write_text(textwrap.dedent(MINE))
    (folder / "file").write_text("not a folder")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("the only copy")
    (folder / "empty").mkdir()
    (folder / "begun").mkdir()
    (folder / "begun" / "run.toml").write_text("epochs = 1\n")
    (folder / "other").mkdir()
    (folder / "other" / "run.toml").write_text("epochs = 2\n")
    (folder / "page.html").write_text("not loopctl's")
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("mine_for_wrong_input", "nebula", "quasar"):
        sys.modules.pop(name, None)


@pytest.fixture
def refused(files, tmp_path, monkeypatch):
    """Run a command that must fail. Return its one-line error; assert that it left no files behind."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(command, status=2):
        before = contents(files)
        words = command.split() if isinstance(command, str) else command
        result = CliRunner().invoke(main, [word.replace("{tmp}", str(files)) for word in words])
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == status, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.endswith("\n")
        assert result.stderr.count("\n") == 1, result.stderr
        assert len(result.stderr) < 500, "the message is too long"
        assert not list(folder.iterdir())
        assert contents(files) == before
        return result.stderr
    return call


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if "__pycache__" not in path.parts}


def case(command, *words):
    text = command if isinstance(command, str) else ascii(command)
    return pytest.param(command, words, id=text.replace("{tmp}/", "")[:100])


@pytest.mark.parametrize(("command", "words"), [
    # plugins by name
    case("run --plugin clp", "no plugin is called 'clp'", "did you mean 'clip'?"),
    case("run --plugin qqq", "no plugin is called 'qqq'", "there are: accumulate, activation_checkpointing, "),
    case("explain --plugin clp", "no plugin is called 'clp'", "did you mean 'clip'?"),
    case("plugins clp", "no plugin is called 'clp'", "did you mean 'clip'?"),
    case("run --plugin clip:max_nrm=1", "clip: no option 'max_nrm'", "did you mean 'max_norm'?"),
    case("run --plugin clip:max_norm=big", "clip: max_norm takes a number, not 'big'"),
    case("run --max-time 2", "Invalid value for '--max-time': takes a time, not '2': write 90s, 30m, 2h, 1h30m or 1d"),
    case("run --max-time 2h --without checkpoint", "--max-time 2h without the plugin checkpoint", "leave out --without checkpoint"),
    *[case(f"run --limit-{part} {text}", f"Invalid value for '--limit-{part}': a limit is a number of batches, at least 1", "such as 10%")
      for part, text in (("train", "0"), ("train", "1.5"), ("valid", "101%"), ("valid", "few"))],
    case("run --fast-dev-run --plugin cosine:t_max=0", "cosine"),
    case("run --overfit 2 --limit-valid 3", "--overfit 2 with --limit-valid", "leave out one of the two"),
    case("run --overfit 2 --limit-train 50%", "--overfit 2 with --limit-train", "leave out one of the two"),
    case("run --plugin early_stopping:patience=1.5", "early_stopping: patience takes a whole number, not '1.5'"),
    case("run --plugin early_stopping:restore_best=maybe", "restore_best takes true|false, not 'maybe'"),
    case("run --plugin amp:dtype=int8", "amp: dtype takes auto|float16|bfloat16, not 'int8'"),
    case("run --plugin compile:mode=fast", "compile: mode takes default|reduce-overhead|max-autotune", "not 'fast'"),
    case("run --plugin compile:mode=default,backend=eager", "compile: mode is an option of inductor, not of eager; leave out mode or backend"),
    case("run --plugin compile:backend=qqq", "compile: no backend is called 'qqq'; choose one of aot_eager, eager, "),
    case("run --plugin compile:per_block=true", "compile: per_block: the model has no repeated blocks"),
    case("run --plugin channels_last:format=x", "channels_last: no option 'format'; it has no options"),
    case("run --plugin warmup:length=soon", "warmup: length takes a duration, not 'soon'", "write 30, 5ep, 500st or 10%"),
    case("run --plugin warmup:length=-3", "warmup: length takes a duration above 0, not '-3'"),
    case("run --plugin clip:max_norm=-1", "clip: max_norm is above 0, not -1.0"),
    case("run --plugin checkpoint:every_epochs=0", "checkpoint: every_epochs is at least 1, not 0"),
    case("run --plugin early_stopping:patience=0", "early_stopping: patience is at least 1"),
    case("run --plugin clip:max_norm=1,max_norm=2", "clip: option max_norm is given twice"),
    case("run --plugin accumulate:every=1_0", "accumulate: every takes a whole number of at least 1, not '1_0'"),
    case("run --plugin accumulate:every=٣", "accumulate: every takes a whole number of at least 1, not '٣'"),
    case("run --plugin accumulate:every=99999999999999999999", "accumulate: every takes a whole number below 2**63"),
    case("run --plugin exponential:gamma=inf", "exponential: gamma takes a number of at most 3.4e38, not 'inf'"),
    case("run --plugin cosine:eta_min=1e39", "cosine: eta_min takes a number of at most 3.4e38, not '1e39'"),
    case("run --plugin sam:rho=1e400", "sam: rho takes a number of at most 3.4e38, not '1e400'"),
    case("run --plugin swa:swa_lr=inf", "swa: swa_lr takes a number of at most 3.4e38, not 'inf'"),
    case("run --plugin onecycle:max_lr=inf", "onecycle: max_lr takes a number of at most 3.4e38, not 'inf'"),
    case("run --plugin progress:interval=nan", "progress: interval takes a number of at most 3.4e38, not 'nan'"),
    case("run --plugin progress:interval=-1", "progress: interval is at least 0, not -1.0"),
    case("run --plugin lr_finder:start_lr=1,end_lr=0.1", "lr_finder: start_lr is above 0 and below end_lr, not 1.0 with end_lr=0.1"),
    case("run --plugin lr_finder:num_steps=1", "lr_finder: num_steps is at least 3, not 1"),
    case("run --plugin lr_finder:beta=1", "lr_finder: beta is from 0 to below 1, not 1.0"),
    case("run --plugin lr_finder:diverge=0.5", "lr_finder: diverge is above 1, not 0.5"),
    case("run --plugin lr_finder:use=true,only=true", "lr_finder: only=true ends the run before the rate can be used"),
    case("run --plugin lr_finder:path=rates", "lr_finder: path is a .png, .svg or .pdf file, not 'rates'"),
    case("run --plugin lr_finder --lr 0", "lr_finder: every learning rate is 0", "choose one above 0"),
    case("run --plugin tensorboard:every_steps=0", "tensorboard: every_steps is at least 1, not 0"),
    case("run --plugin clip:norm_type=1e-308", "clip: norm_type is at least 1, not 1e-308"),
    case("run --plugin amp:dtype=float16,init_scale=1e-320", "amp: init_scale is at least 1, not 1e-320"),
    case("run --plugin warmup:length=٣", "warmup: length takes a duration, not '٣'"),
    case("run --plugin warmup:length=1e-323%", "warmup: length takes a duration from 1e-9 to 1e15, not '1e-323%'"),
    case("run --plugin freeze:patterns=1,until=1e308ep", "freeze: until takes a duration from 1e-9 to 1e15"),
    case("run --plugin swa:start=1e308%", "swa: start takes a duration from 1e-9 to 1e15, not '1e308%'"),
    case("run --plugin multistep:milestones=", "multistep: milestones needs at least one duration, such as 30,80"),
    case("run --plugin multistep:milestones=30,,80", "multistep: milestones takes a duration, not ''", "write 30, "),
    case("run --plugin clip:,", "clip: '' is not option=value", "it has: auto, max_norm, norm_type, value"),
    case("run --plugin clip:max_norm=1,", "clip: max_norm takes a number, not '1,'"),
    case("run --plugin layerwise_lr:rates=0=0.1,0=0.2", "layerwise_lr: rates takes each name only once; '0' is given twice"),
    case("run --plugin layerwise_lr:rates=0=x1_0", "layerwise_lr: rates takes conv1.*=0.01", "not 0=x1_0"),
    case("run --plugin lambda:lr_lambda=math:pi", "lambda: lr_lambda takes a function", "math:pi is a float"),
    case("run --plugin lambda:lr_lambda=math", "lr_lambda takes", "an import path, package.module:name or file.py:name, not 'math'"),
    case("explain --plugin lambda:lr_lambda=builtins:complex", "lr_lambda returned 0j; it must return a number"),
    case("explain --plugin multiplicative:lr_lambda=builtins:range", "lr_lambda returned range(0, 1); it must return a number"),
    case("run --plugin torch_scheduler:cls=torch.optim.lr_scheduler:ExponentialLR,gamma=nan",
         "torch_scheduler: gamma takes a number of at most 3.4e38, not 'nan'"),
    case("run --plugin torch_scheduler:gamma=1,cls=torch.optim.lr_scheduler:StepLR,options=gamma=0.5",
         "torch_scheduler: option gamma is given twice"),
    case("explain --plugin torch_scheduler:cls=torch.optim.lr_scheduler:StepLR,step_size=0",
         "cls=StepLR: integer modulo by zero"),
    case(f"run --plugin clip:max_norm={'9' * 5000}big", "clip: max_norm takes a number, not '999", "99big'"),
    case(f"run --plugin {'clip' * 1000}", "no plugin is called 'clipclip", "there are: accumulate, activation_checkpointing, "),
    case(["run", "--plugin", "early_stopping:monitor=loss\n[31m"], "'--plugin'", "control character '\\n'; leave it out"),
    case(["run", "--plugin", "csv:path=a\0b"], "'--plugin'", "control character '\\x00'; leave it out"),
    case("plugins builtins:int", "builtins:int has no hooks, so it is not a plugin", "mark its methods with @hookimpl"),
    case("plugins os:path", "os:path is a module, not a class; name the class of a plugin"),
    case("plugins clip:max_nrm=1", "clip: no option 'max_nrm'", "did you mean 'max_norm'?"),
    case(["plugins", ""], "no plugin is called ''", "there are: accumulate, activation_checkpointing, "),
    case("run --without clip", "'--without'", "'clip' is not one of 'csv', 'checkpoint', 'progress'"),
    case("explain --plugin exponential:gamma=1e38 --epochs 40",
         "exponential: the learning rate is 1e+73 at step 47; choose other numbers"),
    case("run --plugin exponential:gamma=1e38,by=step --plugin warmup",
         "exponential and warmup: the learning rate is ", " at step 3; choose other numbers"),
    case("lr --plugin onecycle:max_lr=0.1,final_div_factor=1e-308", "onecycle: the learning rate is "),
    case("run --plugin cyclic:base_lr=1,2,max_lr=3 --optimizer sgd:momentum=0.9", "cyclic: base_lr has 2 values"),
    case("explain --plugin lambda:lr_lambda=", "lambda: lr_lambda has 0 values; parameter groups: 1"),
    case("run --plugin freeze:patterns=/[[a]/", "freeze: '/[[a]/' is not a regular expression (Possible nested set"),
    case("run --plugin freeze:patterns=/a{9999999999999}/", "freeze: '/a{{9999999999999}}/' is not a regular expression"),
    # plugins from files and import paths
    case("run --plugin {tmp}/misspelt.py:Mine", "mine: no hook is called 'epoch_strat'", "did you mean 'epoch_start'?"),
    case("run --plugin {tmp}/argument.py:Mine", "mine: epoch_start has no argument 'rnu'", "did you mean 'run'?"),
    case("run --plugin {tmp}/default.py:Mine", "mine: epoch_start gives 'run' a default value", "remove the default"),
    case("run --plugin {tmp}/unmarked.py:Mine", "mine: epoch_end has the name of a hook but no @hookimpl", "add it, or rename the method"),
    case("run --plugin {tmp}/hookless.py:Mine", "mine: has no hooks", "mark its methods with @hookimpl"),
    case("run --plugin {tmp}/equal.py:Mine", "mine: two equal instances could not be told apart", "use @dataclass(eq=False)"),
    case("run --plugin {tmp}/wants.py:Mine", "mine: ", "depth"),
    case("run --plugin {tmp}/replace.py:One --plugin {tmp}/replace.py:Two",
         "one and two both replace backward", "choose one"),
    case("run --plugin {tmp}/absent.py:Mine", "there is no file {tmp}/absent.py"),
    case("run --plugin {tmp}/needs.py:Mine", "{tmp}/needs.py cannot be imported", "'a_package_that_is_not_there'"),
    case("run --plugin {tmp}/broken.py:Mine", "{tmp}/broken.py cannot be imported (SyntaxError: "),
    case("run --plugin {tmp}/raises.py:Mine", "{tmp}/raises.py cannot be imported (ZeroDivisionError: "),
    case("run --plugin {tmp}/misspelt.py:Mime", "{tmp}/misspelt.py has no 'Mime'", "did you mean 'Mine'?"),
    case("run --plugin {tmp}/exits.py:Mine", "{tmp}/exits.py cannot be imported (SystemExit: "),
    case("run --plugin {tmp}/typed.py:Mine", "Mine: the types of its options cannot be read (NameError: ", "import what"),
    case(f"run --plugin {'n' * 300}.py:Mine", ".py cannot be read: File name too long"),
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
    case("run --data cifar10:augment=maybe", "data cifar10: augment takes true|false or trivial|rand|augmix|none, not 'maybe'"),
    case("run --optimizer sgd:momentum=much", "optimizer sgd: momentum takes a number, not 'much'"),
    case("run --optimizer adamw:betas=0.9", "optimizer adamw: betas takes 2 values, as in betas=0.9,0.999, not 0.9"),
    case("run --model cnn:width=0", "model cnn: width is at least 1, not 0"),
    case("run --data fake:classes=0", "data fake: classes is at least 1, not 0"),
    case("run --model cnn:width=1_0", "model cnn: width takes a whole number, not '1_0'"),
    case("run --model cnn:width=10000000", "model cnn: its weights and their gradients would take 50,400,008 GB of memory",
         "this machine has ", "make it smaller"),
    case("run --model linear --data fake:classes=9000000,image=200", "model linear: its weights and their gradients"),
    case("run --model vit:depth=1000000", "model vit: depth is at most 1,000, not 1,000,000"),
    case("run --model cnn:dropout=nan", "model cnn: dropout takes a number of at most 3.4e38, not 'nan'"),
    case("run --model cnn:num_classes=0", "returned a tensor of shape (1, 0) for one sample", "change its last layer"),
    case("run --model resnet18:weights=mine", "model resnet18: weights takes none, IMAGENET1K_V1, DEFAULT or a file; there is no file mine"),
    case("run --model googlenet:aux_logits=true", "model googlenet: with aux_logits=true it returns a second output", "leave it out"),
    case("run --model mobilenet_v2:round_nearest=0", "model mobilenet_v2: ZeroDivisionError"),
    case("run --model mobilenet_v2:width_mult=1e308", "model mobilenet_v2: width_mult takes a number of at most 3.4e38"),
    case("run --model builtins:dict", "model builtins:dict: no signature found", "name a function of your own"),
    case(["run", "--model", "a\u200bb.py:Net"], "there is no file a\\u200bb.py"),
    case("run --model {tmp}/exits.py:Net", "model {tmp}/exits.py:Net: ", "cannot be imported (SystemExit: "),
    case("run --data digits:channels=100000000", "data digits: 100,000,000 channels would take 138,010 GB", "use fewer"),
    case("run --data fake:size=1000000000000", "data fake: size is at most 10,000,000, not 1,000,000,000,000"),
    case("run --data fake:image=1000000", "data fake: a network on images of image=1000000 would take 600,000 GB",
         "use a smaller one"),
    case("run --data fake:channels=100000000000", "data fake: a network on images of image=32 would take "),
    case("run --data imagefolder:size=1000000", "data imagefolder: a network on images of size=1000000 would take "),
    case("run --data mnist:channels=2", "data mnist: channels is 1 or 3, not 2"),
    case(f"run --data imagefolder --data-root {'n' * 300}", "data imagefolder: [Errno 36] File name too long"),
    case("run --optimizer sgd:momentum=nan", "optimizer sgd: momentum takes a number of at most 3.4e38, not 'nan'"),
    case("run --optimizer adamw:weight_decay=1e39", "optimizer adamw: weight_decay takes a number of at most 3.4e38"),
    case("run --optimizer adamw:betas=0.9,0.99,0.9", "optimizer adamw: betas takes 2 values, as in betas=0.9,0.999"),
    case("run --optimizer sgd:lr=true", "optimizer sgd: lr takes a number, not True"),
    case(f"run --optimizer sgd:lr={'9' * 400}", "optimizer sgd: lr takes a whole number below 2**63"),
    case("run --optimizer lbfgs:line_search_fn=armijo", "optimizer lbfgs: only 'strong_wolfe' is supported"),
    case("run --optimizer lbfgs:history_size=0", "optimizer lbfgs: pop from empty list"),
    case("run --optimizer sgd:differentiable=true", "optimizer sgd: a leaf Variable that requires grad"),
    case("run --optimizer adam:capturable=true --device cpu", "optimizer adam: If capturable=True, params and"),
    case("run --optimizer sgd:momentum=-1", "optimizer sgd: ", "momentum", "-1"),
    case("run --optimizer muon", "optimizer muon: ", "2D"),
    case("run --model no.such:Net", "model no.such:Net: no.such cannot be imported (ModuleNotFoundError"),
    case("run --model mine_for_wrong_input:Narow", "model mine_for_wrong_input", "did you mean 'Narrow'?"),
    case("run --model {tmp}/absent.py:Net", "model ", "there is no file {tmp}/absent.py"),
    case("run --model {tmp}/mine_for_wrong_input.py:pi", "pi is a float", "name a class or a function"),
    case("run --model mine_for_wrong_input:nothing", "model mine_for_wrong_input:nothing returned a NoneType"),
    case("run --model mine_for_wrong_input:Narrow", "shape (1, 3)", "has 10 classes", "change its last layer so that it is (1, 10)"),
    case("run --model resnet18", "model resnet18 cannot take inputs of 1x8x8", "channels=3"),
    case("run --model vit:patch_size=3", "model vit: patch_size=3 does not divide", "8 pixels"),
    case("run --data mnist", "data mnist is missing or incomplete in ", "folder/data", "pass --download to get it, or --data-root DIR"),
    case("run --data cifar10 --data-root {tmp}/full", "data cifar10 is missing or incomplete in {tmp}/full", "--download", "--data-root"),
    case("run --data imagefolder", "there is no folder", "folder/data/train", "train/CLASS and val/CLASS"),
    case("run --data digits:on_device=perhaps", "data digits: on_device takes true|false, not 'perhaps'"),
    case("run --data digits:on_devise=true", "data digits: no option 'on_devise'; did you mean 'on_device'?"),
    case("run --data digits:on_device=true --workers 2", "--workers 2 would have nothing to load", "leave out one of"),
    case("run --data fake:size=2000000,image=224,on_device=true", "data fake: 2,400,000 samples of 3x224x224 take 1,445.1 GB",
         "GB free; leave out on_device, or use smaller samples"),
    case("run --data imagenet", "data imagenet is missing or incomplete in", "put ILSVRC2012_devkit_t12.tar.gz, ", "--data-root DIR"),
    case("run --data mine_for_wrong_input:no_training", "data mine_for_wrong_input:no_training has no training samples"),
    case("run --data mine_for_wrong_input:no_validation", "has no validation samples"),
    case("run --data mine_for_wrong_input:nothing", "returned a NoneType", "or a pair (train, valid) of them"),
    # numbers
    case("run --batch-size 0", "'--batch-size'", "0 is not in the range x>=1"),
    case("run --epochs 0", "'--epochs'", "0 is not in the range x>=1"),
    case("run --epochs -3", "'--epochs'", "-3 is not in the range x>=1"),
    case("run --epochs many", "'--epochs'", "'many' is not a valid"),
    case("run --max-steps 0", "'--max-steps'", "0 is not in the range x>=1"),
    case("run --eval-every 0", "'--eval-every'", "0 is not in the range x>=1"),
    case("run --workers -1", "'--workers'", "-1 is not in the range x>=0"),
    case("run --seed -1", "'--seed'", "-1 is not in the range"),
    case("run --epochs 1_0", "'--epochs'", "'1_0' is not a valid whole number"),
    case("run --epochs ٣", "'--epochs'", "'٣' is not a valid whole number"),
    case(f"run --epochs 1{'0' * 400}", "'--epochs'", "is too large; use a number below 2**63"),
    case(f"explain --max-steps {2**63}", "'--max-steps'", "9223372036854775808 is too large; use a number below 2**63"),
    case(f"run --batch-size {2**63}", "'--batch-size'", "9223372036854775808 is too large; use a number below 2**63"),
    case("run --batch-size 1000000000 --data fake:size=10000000,image=256",
         "a batch of 10,000,000 samples of 3x256x256 would take 7,864 GB of memory", "use a smaller --batch-size"),
    case("run --workers 1000000", "--workers 1,000,000 is too many processes for this machine; use "),
    case("run --lr 1_0", "'--lr'", "'1_0' is not a valid float"),
    case("run --lr 1e39", "lr is 1e+39", "use a number from 0 to 3.4e38, such as 1e-3"),
    case("run --lr -1", "lr is -1.0", "use a number from 0 to 3.4e38, such as 1e-3"),
    case("run --lr nan", "lr is nan", "use a number from 0 to 3.4e38, such as 1e-3"),
    case("run --lr inf", "lr is inf", "use a number from 0 to 3.4e38, such as 1e-3"),
    case("run --matmul low", "'--matmul'", "'low' is not one of 'highest', 'high', 'medium'"),
    case("run --lr fast", "'--lr'", "'fast' is not a valid float"),
    case("run --lr 0.1 --optimizer sgd:lr=0.2", "optimizer sgd: lr is given twice", "leave one out"),
    case("run --optimizer sgd:lr=-1", "lr is -1", "use a number from 0 to 3.4e38, such as 1e-3"),
    # the rest of the command line
    case("runn", "No such command 'runn'"),
    case("run --epohcs 3", "No such option '--epohcs'", "--epochs"),
    case("run digits", "unexpected extra argument (digits)"),
    case("run --device cpu:99", "device 'cpu:99' does not exist; use 'cpu'"),
    case("run --device mkldnn", "device 'mkldnn' cannot be used"),
    case("run --devices 0,x", "'0,x' is not a list of device numbers, such as 0,1"),
    case("run --devices 1,1", "'1,1' names a device twice"),
    case("run --devices 0,1 --device mps", "--devices 0,1 with --device mps", "leave out one of the two"),
    case("run --devices 0,1 --device cpu --plugin nothing", "no plugin is called 'nothing'"),
    case("explain --devices 0,1 --device cpu --plugin ddp --plugin fsdp", "ddp: fsdp trains in several processes already"),
    case("run --plugin ddp:bucket_cap_mb=0", "bucket_cap_mb is at least 1, not 0"),
    case("run --plugin fsdp:param_dtype=int8", "param_dtype"),
    case("run --device gpu", "device 'gpu' is unknown", "use auto, cpu, mps, cuda or cuda:1"),
    case(["run", "--model", "a\0b"], "'--model'", "control character '\\x00'"),
    case(["run", "--data", "a\nb.py:data"], "'--data'", "control character '\\n'"),
    case(["run", "--data-root", "a\x7fb"], "'--data-root'", "control character '\\x7f'"),
    case(["run", "--data-root", ""], "'--data-root'", "'' is not a path; use . for the current folder"),
    case("lr --out lr", "--out lr has no extension to choose the image format by; use lr.png or lr.svg"),
    case("lr --out {tmp}/full", "use {tmp}/full.png or {tmp}/full.svg"),
    # a new plugin
    case("new-plugin", "Missing argument 'NAME'"),
    case("new-plugin clip", "clip: loopctl ", " already has a plugin of this name; choose another"),
    case("new-plugin GradNoise", "'GradNoise' is not a valid plugin name", "use grad_noise"),
    case("new-plugin 3d", "'3d' is not a valid plugin name, which has lower-case letters, digits", "choose another"),
    case("new-plugin true", "true: its class would be called True, a keyword of Python; choose another name"),
    case("new-plugin loopctl-mine", "the prefix loopctl is added to the package's name anyway; use mine"),
    case("new-plugin mine --kind metric", "'--kind'", "'metric' is not one of 'schedule', 'observer', 'wrapper', 'replacer'"),
    case("new-plugin mine --out {tmp}/full", "{tmp}/full exists and is not overwritten; choose another folder with --out"),
    case("new-plugin mine --out {tmp}/file", "{tmp}/file exists and is not overwritten; choose another folder with --out"),
    case("new-plugin mine --out {tmp}/file/below", "{tmp}/file/below cannot be written: Not a directory; choose another folder"),
    case("new-plugin mine --out /proc/mine", "/proc/mine cannot be written: ", "choose another folder with --out"),
    case(["new-plugin", "mine", "--out", ""], "'--out'", "'' is not a path; use . for the current folder"),
    # config files
    case(["run", "--config", ""], "'--config'", "'' is not a path"),
    case(["run", "--config", "a\0b"], "'--config'", "control character '\\x00'"),
    case("run --config {tmp}/control.toml", "--config: {tmp}/control.toml: data_root: ", "control character '\\x00'"),
    case("run --config {tmp}/underscore.toml", "--config: {tmp}/underscore.toml: lr: ", "'1_0' is not a valid float"),
    case("run --config {tmp}/huge.toml", "--config: {tmp}/huge.toml is not TOML: Exceeds the limit (4300 digits)"),
    case("run --config {tmp}/hex.toml", "--config: {tmp}/hex.toml is not TOML: Exceeds the limit (4300 digits)"),
    case("run --config {tmp}/list.of.hex.toml", "--config: {tmp}/list.of.hex.toml is not TOML: Exceeds the limit"),
    case("run --config {tmp}/deep.toml", "--config: {tmp}/deep.toml is not TOML: maximum recursion depth exceeded"),
    case("run --config /dev/zero", "--config: /dev/zero is not TOML: it is larger than 1 MiB"),
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
    case(["run", "--out", ""], "'--out'", "'' is not a path; use . for the current folder"),
    case(["run", "--out", "a\nepochs = 3"], "'--out'", "control character '\\n'"),
    case(["run", "--out", "\udcff"], "'--out'", "control character '\\udcff'"),
    case(["run", "--resume", " "], "'--resume'", "' ' is not a path"),
    case(f"run --out {'n' * 300}", "cannot be written: File name too long; choose another folder"),
    case(f"run --out new/{'n' * 300}", "cannot be written: File name too long; choose another folder"),
    case("run --plugin csv:path=/dev/null/x", "csv: /dev/null/x cannot be written (/dev/null is not a writable folder", "choose another path"),
    case(f"run --plugin csv:path={'n' * 300}", "cannot be written (File name too long); choose another path"),
    case("run --plugin csv:path=run.toml", "csv: ", "run.toml exists and is not overwritten"),
    case("run --plugin report:path=/dev/null/x", "report: /dev/null/x cannot be written (/dev/null is not a writable folder", "choose another"),
    case(f"run --plugin report:path={'n' * 300}", "cannot be written (File name too long); choose another path"),
    case("run --plugin report:path=explain.txt", "report: ", "explain.txt exists and is not overwritten"),
    case("run --plugin report:path=", "report: ", "cannot be written"),
    case("run --plugin report:dir=x", "report: no option 'dir'", "it has: path"),
    case("compare", "Missing argument 'RUNS...'"),
    case("compare {tmp}/begun", "compare takes two runs or more; name their folders"),
    case("compare {tmp}/begun {tmp}/full/../begun", "begun is given twice; name each run once"),
    case("compare {tmp}/begun {tmp}/absent", "there is no folder {tmp}/absent; name the folders of runs"),
    case("compare {tmp}/begun {tmp}/file", "there is no folder {tmp}/file; name the folders of runs"),
    case(f"compare {{tmp}}/begun {'n' * 300}", "there is no folder nnn"),
    case("compare {tmp}/begun {tmp}/full", "{tmp}/full is not the folder of a run: it has neither run.toml nor metrics.csv"),
    case(["compare", "{tmp}/begun", " "], "'RUNS...'", "' ' is not a path"),
    case("compare {tmp}/begun {tmp}/other --out page.png", "--out page.png: the comparison is an HTML page; use page.png.html"),
    case("compare {tmp}/begun {tmp}/other --out {tmp}/page.html", "--out {tmp}/page.html exists and was not written by loopctl, so it is not overwritten"),
    case("compare {tmp}/begun {tmp}/other --out {tmp}/file/page.html", "page.html cannot be written: Not a directory; choose another"),
    case(f"compare {{tmp}}/begun {{tmp}}/other --out {'n' * 300}.html", "cannot be written: File name too long; choose another"),
    case("run --plugin csv:path=explain.txt", "csv: ", "explain.txt exists and is not overwritten"),
    case(f"run --plugin checkpoint:dir={'n' * 300}", "cannot be written (File name too long); choose another dir"),
    case("run --plugin checkpoint:dir=/dev/null", "checkpoint: /dev/null cannot be written (/dev/null is not a writable folder"),
    case("run --plugin lr_finder:path=/dev/null/x.png", "lr_finder: /dev/null/x.png cannot be written (/dev/null is not a writable folder"),
    case("run --plugin tensorboard:dir=/dev/null", "tensorboard: /dev/null cannot be written (/dev/null is not a writable folder", "choose another dir"),
    case("run --plugin tensorboard --plugin tensorboard:every_steps=5",
         "tensorboard: tensorboard.2 writes to dir=tensorboard too; choose another dir in one of them"),
    case("run --plugin checkpoint --plugin checkpoint:monitor=val_accuracy",
         "checkpoint: checkpoint.2 writes to dir=checkpoints too; choose another dir in one of them"),
    case("run --out {tmp}/file/below", "--out {tmp}/file/below cannot be written", "choose another folder"),
    case("run --out {tmp}/file", "--out {tmp}/file exists and is not overwritten", "choose another folder"),
    case("run --out {tmp}/full", "--out {tmp}/full exists and is not overwritten", "choose another folder"),
    case("run --resume {tmp}/full", "--resume: there is no file {tmp}/full/run.toml"),
    case("run --resume {tmp}/begun --out elsewhere", "--resume with --out: a resumed run writes to its own folder; leave out --out"),
    # checks that need the whole composition
    case("run --plugin early_stopping:monitor=val_acuracy", "early_stopping: monitor=val_acuracy",
         "the run has no such metric", "did you mean 'val_accuracy'?"),
    case("run --plugin checkpoint:monitor=val_acuracy", "checkpoint: monitor=val_acuracy",
         "the run has no such metric", "did you mean 'val_accuracy'?"),
    case("run --plugin early_stopping:monitor=qqq", "no such metric", "train_accuracy, train_loss, val_"),
    case("run --plugin amp:dtype=float16 --optimizer lbfgs", "amp: float16", "LBFGS", "use dtype=bfloat16"),
])
def test_the_error_is_one_line_and_no_files_are_left(refused, files, command, words):
    error = refused(command)
    for word in words:
        assert word.format(tmp=files) in error


def test_new_folders_are_removed_if_training_does_not_start(refused):
    """Parent folders are removed too. This error is raised after the folder was made."""
    assert "monitor=qqq" in refused("run --plugin early_stopping:monitor=qqq --out new/and/deep")


def test_an_empty_folder_that_existed_before_is_kept(refused):
    assert "monitor=qqq" in refused("run --plugin early_stopping:monitor=qqq --out {tmp}/empty")


def test_a_failed_run_keeps_the_folder_of_another_run(files, tmp_path, monkeypatch):
    """Another run may have started in the new folder runs/ in the meantime."""
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


def test_mode_is_required_for_a_metric_whose_name_does_not_tell_what_is_better(refused):
    error = refused("run --plugin {tmp}/measures.py:Mine --plugin early_stopping:monitor=heat")
    assert "early_stopping: monitor=heat" in error
    assert "better" in error
    assert "mode=min" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_without_a_cuda_device(refused):
    error = refused("run --device cuda")
    assert "device 'cuda' does not exist" in error
    assert "no CUDA device" in error
    assert "use another, or 'auto'" in error


def test_the_number_of_a_missing_cuda_device_is_refused(refused):
    assert "device 'cuda:99' does not exist: this machine has " in refused("run --device cuda:99")


def test_an_error_in_a_plugin_names_the_plugin_and_the_hook(refused):
    error = refused("run --plugin {tmp}/unplugged.py:Mine", status=1)
    assert "RuntimeError: the cable is unplugged, raised by plugin 'mine' in its hook setup" in error
    assert "--traceback shows where" in error


def test_an_error_in_the_constructor_of_a_plugin_names_the_plugin(refused):
    error = refused("run --plugin {tmp}/lost.py:Mine:colour=blue", status=1)
    assert "KeyError: 'blue', raised by plugin 'mine' when it was built" in error
    assert "--traceback shows where" in error


def test_an_eof_error_is_not_reported_as_an_interruption(refused):
    """click would report every EOFError as if the user had interrupted the command."""
    error = refused("run --plugin {tmp}/short.py:Mine", status=1)
    assert "a file ends too early (EOFError: 10 bytes of 20, raised by plugin 'mine' in its hook setup)" in error


def test_no_file_is_left_of_an_image_that_cannot_be_drawn(refused, monkeypatch):
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    def fail(self, file, **settings):
        file.write(b"<svg>")
        raise RuntimeError("no such\nfont")
    monkeypatch.setattr(FigureCanvasSVG, "print_svg", fail)
    assert "--out lr.svg cannot be written: no such font" in refused("lr --out lr.svg")


def test_markup_in_a_unit_is_printed_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["run", "--model", "linear", "--max-steps", "1", "--plugin", "progress:unit=[/x]:cat:"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "[/x]:cat:/s" in result.stdout


# Installed packages with plugins


@pytest.fixture
def installed(files):
    """Two packages with a plugin each: one that cannot be imported, and one without the class of its entry point."""
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
def test_the_error_for_a_broken_plugin_names_its_package(refused, command, words):
    error = refused(command)
    for word in words:
        assert word in error


@pytest.mark.usefixtures("installed")
def test_a_broken_package_does_not_affect_runs_without_its_plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(main, ["plugins"])
    assert (listed.exit_code, listed.stderr) == (0, "")
    assert "BROKEN" not in listed.stdout
    assert any(line.startswith("  nebula ") and "[nebula 1.2]" in line for line in listed.stdout.splitlines())
    run = CliRunner().invoke(main, ["run", "--model", "linear", "--max-steps", "1", "--out", "new", "--plugin", "clip"])
    assert (run.exit_code, run.stderr) == (0, "")
    assert (tmp_path / "new" / "metrics.csv").is_file()


@pytest.mark.usefixtures("installed")
def test_plugins_check_marks_the_broken_plugins():
    result = CliRunner().invoke(main, ["plugins", "--check"])
    assert result.exit_code == 1
    assert result.stderr == "error: broken plugins: nebula, quasar; see their lines above\n"
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert "BROKEN  nebula: nebula.plugin cannot be imported (ImportError: it needs a telescope)" in lines["nebula"]
    assert "BROKEN  quasar: quasar has no 'Quasar'" in lines["quasar"]
    assert [name for name, line in lines.items() if "BROKEN" in line] == ["nebula", "quasar"]


def test_plugins_check_finds_no_broken_built_in_plugin():
    result = CliRunner().invoke(main, ["plugins", "--check"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "BROKEN" not in result.stdout
