"""`loopctl new-plugin`: the package it writes installs, passes its tests and trains; a wrong call leaves no files."""
import errno
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from loopctl.cli import main, scaffold

ROOT = Path(__file__).parents[2]
VERSION = version("loopctl")
KINDS = ["schedule", "observer", "wrapper", "replacer"]


def invoke(*arguments, status=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with a package of each kind."""
    folder = tmp_path_factory.mktemp("packages")
    for kind in KINDS:
        invoke("new-plugin", f"my-own-{kind}", "--kind", kind, "--out", folder / f"loopctl-my-own-{kind}")
    return folder


@pytest.fixture(scope="module")
def site(packages, install):
    return install(*sorted(packages.iterdir()))


@pytest.fixture
def _installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    yield
    for kind in KINDS:
        sys.modules.pop(f"loopctl_my_own_{kind}", None)


# The packages


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_has_four_files_with_the_plugins_name(packages, kind):
    folder, plugin = packages / f"loopctl-my-own-{kind}", f"my_own_{kind}"
    assert {path.name for path in folder.iterdir()} == {
        "pyproject.toml", "README.md", f"loopctl_{plugin}.py", f"test_{plugin}.py"}
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == f"loopctl-my-own-{kind}"
    assert project["project"]["entry-points"]["loopctl"] == {plugin: f"loopctl_{plugin}:MyOwn{kind.title()}"}
    for path in folder.iterdir():
        assert not re.search("my.plugin|myplugin", path.read_text(), re.IGNORECASE)
    source = (folder / f"loopctl_{plugin}.py").read_text()
    assert len(source.splitlines()) < 40, "a template should stay short"


def test_the_tests_of_the_packages_pass(packages, site):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "not composes", "-p", "no:cacheprovider", *sorted(packages.iterdir())], cwd=packages,
                          env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # All but the checks that compose the plugin with each built-in one. One is skipped because the wrapper draws random numbers.
    assert "48 passed, 1 skipped, 4 deselected" in done.stdout
    assert not [path for path in packages.rglob("*") if path.name.endswith(("egg-info", "build"))]


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_is_listed_described_and_trains(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"my_own_{kind}"
    lines = [line for line in invoke("plugins").stdout.splitlines() if line.startswith(f"  {name} ")]
    assert len(lines) == 1
    assert lines[0].endswith(f"[loopctl-my-own-{kind} 0.1.0]")
    page = invoke("plugins", name).stdout
    assert re.search(r"^options\n  \w+ +\w", page, re.MULTILINE)
    assert "; default " in page
    hook = {"schedule": "lr_scale", "observer": "setup, after_step", "wrapper": "compute_loss (wraps)", "replacer": "compute_loss"}
    assert f"hooks    {hook[kind]}\n" in page
    result = invoke("run", "--plugin", name, "--epochs", 1, "--model", "linear")
    assert "finished: 1 epoch" in result.stdout
    assert result.stderr == ""
    assert (kind == "observer") == ("my_own_observer" in result.stdout)


@pytest.mark.usefixtures("_installed")
def test_a_run_with_all_four_plugins_can_be_resumed(tmp_path, monkeypatch):
    """The observer's moving average is restored from the checkpoint."""
    monkeypatch.chdir(tmp_path)
    plugins = [word for kind in KINDS for word in ("--plugin", f"my_own_{kind}")]
    common = ["run", *plugins, "--model", "linear", "--without", "progress"]
    invoke(*common, "--epochs", 2, "--out", "whole")
    invoke(*common, "--epochs", 1, "--out", "cut")
    invoke("run", "--resume", "cut", "--epochs", 2)
    assert (tmp_path / "cut/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def test_the_output_lists_the_files_and_the_next_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("new-plugin", "weight-noise").stdout == """written:
  loopctl-weight-noise/pyproject.toml
  loopctl-weight-noise/README.md
  loopctl-weight-noise/loopctl_weight_noise.py
  loopctl-weight-noise/test_weight_noise.py
next:
  pip install -e 'loopctl-weight-noise[test]'
  python -m pytest loopctl-weight-noise
  loopctl run --plugin weight_noise
"""
    output = invoke("new-plugin", "weight_noise", "--out", "new/with a space").stdout
    assert "pip install -e 'new/with a space[test]'\n  python -m pytest 'new/with a space'\n" in output
    assert (tmp_path / "new" / "with a space" / "loopctl_weight_noise.py").is_file()


def test_the_packages_pass_the_linter(packages):
    pytest.importorskip("ruff")
    for options in ([], ["--config", ROOT / "pyproject.toml"]):
        done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", *options, packages], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_wheel_of_loopctl_has_the_templates(tmp_path, copy_of_the_source):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
                    "--no-build-isolation", "--wheel-dir", tmp_path, copy_of_the_source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    templates = {path.name for path in scaffold.TEMPLATES.iterdir()}
    assert templates == {"pyproject.txt", "readme.txt", *(f"{kind}{end}.txt" for kind in KINDS for end in ("", "_test"))}
    assert templates == {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("loopctl/cli/templates/")}


@pytest.fixture
def copy_of_the_source(tmp_path):
    copied = tmp_path / "source"
    copied.mkdir()
    for name in ("core", "plugins", "cli"):
        shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copied)
    return copied


def test_writing_a_package_does_not_import_torch(tmp_path):
    code = ("import sys; from loopctl.cli import main\n"
            "try: main(['new-plugin', 'quick'])\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "sys.exit('imports torch' if 'torch' in sys.modules else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loopctl-quick").is_dir()


def test_the_shell_completes_the_kinds():
    def completed(start):
        items = BashComplete(main, {}, "loopctl", "_LOOPCTL_COMPLETE").get_completions(["new-plugin", "x", "--kind"], start)
        return [item.value for item in items]
    assert completed("") == KINDS
    assert completed("s") == ["schedule"]


# Errors


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(folder, *arguments):
    """Run a command that must fail. Return its one-line error; assert that `folder` is unchanged."""
    before = contents(folder)
    result = invoke("new-plugin", *arguments, status=2)
    assert contents(folder) == before
    assert result.stdout == ""
    assert re.fullmatch("error: .{,480}\n", result.stderr), result.stderr
    return result.stderr


def test_an_existing_folder_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke("new-plugin", "mine")
    (tmp_path / "loopctl-mine" / "loopctl_mine.py").write_text("precious")
    assert "loopctl-mine exists and is not overwritten; choose another folder with --out" in refused(tmp_path, "mine")
    assert "loopctl-mine exists" in refused(tmp_path, "mine", "--kind", "wrapper")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for path in ("loopctl-mine/README.md", "empty", "link", "."):
        assert f"{path} exists and is not overwritten" in refused(tmp_path, "mine", "--out", path)


INVALID = "is not a valid plugin name, which has lower-case letters, digits and underscores and begins with a letter"


@pytest.mark.parametrize(("name", "words"), [
    ("GradNoise", [f"'GradNoise' {INVALID}; use grad_noise"]),
    ("grad noise", ["use grad_noise"]),
    ("grad.noise", ["use grad_noise"]),
    ("grad__noise", ["use grad_noise"]),
    ("_noise", ["use noise"]),
    ("noise_", ["use noise"]),
    ("../noise", ["use noise"]),
    ("noise:std=1", ["use noise_std_1"]),
    ("2nd", [f"'2nd' {INVALID}; choose another"]),
    ("é", [f"'é' {INVALID}; choose another"]),
    ("٣", ["choose another"]),
    ("", [f"'' {INVALID}; choose another"]),
    ("...", ["choose another"]),
    ("none", ["none: its class would be called None, a keyword of Python; choose another name"]),
    ("loopctl-noise", ["the prefix loopctl is added to the package's name anyway; use noise"]),
    ("clip", [f"clip: loopctl {VERSION} already has a plugin of this name; choose another"]),
    ("early-stopping", [f"early_stopping: loopctl {VERSION} already has a plugin of this name"]),
    ("a\nb", ["control character '\\n'"]),
    ("n" * 300, ["cannot be written: File name too long"]),
])
def test_an_invalid_name_is_refused(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(tmp_path, "--", name) if name else refused(tmp_path, name)
    for word in words:
        assert word in error


@pytest.mark.usefixtures("_installed")
def test_the_name_of_an_installed_plugin_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(tmp_path, "my-own-wrapper")
    assert "my_own_wrapper: loopctl-my-own-wrapper 0.1.0 already has a plugin of this name" in error


def test_an_unknown_kind_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'metric' is not one of 'schedule', 'observer', 'wrapper', 'replacer'" in refused(tmp_path, "mine", "--kind", "metric")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert "file/below cannot be written: Not a directory; choose another folder with --out" in refused(tmp_path, "mine", "--out", "file/below")
    assert "cannot be written: File name too long" in refused(tmp_path, "mine", "--out", f"new/and/{'n' * 300}")
    assert "'--out'" in refused(tmp_path, "mine", "--out", "")


@pytest.mark.parametrize("out", ["mine", "new/and/deep"])
def test_nothing_is_left_of_a_package_when_the_disk_is_full(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    original = Path.write_text

    def write_text(path, text, **settings):
        original(path, text[:3], **settings)
        if path.name.startswith("loopctl_"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_text", write_text)
    assert f"{out} cannot be written: No space left on device" in refused(tmp_path, "mine", "--out", out)
