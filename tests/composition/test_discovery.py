"""Finding plugins by name without importing them, and loading them by name, import path or file."""
import subprocess
import sys
from importlib.util import spec_from_file_location

import pytest

from loopctl import UsageError, available, load
from loopctl.cli import listing
from loopctl.composition.discovery import build_plugin, entry_point, plugin_name, split_spec

PLUGIN = """
from dataclasses import dataclass
from loopctl import hookimpl

@dataclass(eq=False)
class MyPlugin:
    rate: "float | None" = 1.0

    @hookimpl
    def before_step(self):
        pass
"""


def test_finding_and_listing_plugins_imports_neither_a_plugin_nor_torch():
    code = ("import sys, loopctl, loopctl.cli; loopctl.available(); "
            "from loopctl.cli import listing; listing.table(False); "
            "found = [m for m in sys.modules if m == 'torch' or m.startswith('loopctl.plugins.')]; sys.exit(str(found) if found else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plugins_are_loaded_by_name_by_import_path_and_by_file(tmp_path, monkeypatch):
    (tmp_path / "pkg_one").mkdir()
    (tmp_path / "pkg_one" / "mod.py").write_text(PLUGIN)
    (tmp_path / "pkg_one" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert load("clip").__name__ == "Clip"
    name, plugin = build_plugin("pkg_one.mod:MyPlugin:rate=3")
    assert (name, plugin.rate) == ("my_plugin", 3.0)
    name, plugin = build_plugin(f"{tmp_path}/pkg_one/mod.py:MyPlugin:rate=none")
    assert (name, plugin.rate) == ("my_plugin", None)


@pytest.mark.parametrize(("spec", "parts"), [
    ("clip", ("clip", "")), ("clip:a=1,b=2", ("clip", "a=1,b=2")), ("a.b:C", ("a.b:C", "")), ("a.b:C:x=1", ("a.b:C", "x=1")),
    ("dir/f.py:C:x=a:b", ("dir/f.py:C", "x=a:b")), ("lambda:lr_lambda=a.b:f", ("lambda", "lr_lambda=a.b:f")),
])
def test_split_spec_separates_the_class_from_the_options(spec, parts):
    assert split_spec(spec) == parts


def test_a_plugin_is_called_by_its_entry_point_or_by_its_class_in_snake_case():
    class EarlyStop2Much:
        pass

    assert plugin_name(load("early_stopping")) == "early_stopping"
    assert plugin_name(EarlyStop2Much) == "early_stop2_much"


@pytest.mark.parametrize(("name", "message"), [
    ("clp", "no plugin is called 'clp'; did you mean 'clip'"),
    ("zzzz", "there are: accumulate, activation_checkpointing"),
    ("no_such_package.x:C", "no_such_package.x:C: no_such_package.x cannot be imported"),
    ("json.decoder:JSONDecodr", "json.decoder has no 'JSONDecodr'; did you mean 'JSONDecoder'"),
    ("nowhere/file.py:C", "there is no file nowhere/file.py"),
])
def test_a_plugin_that_does_not_exist_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        load(name)


def test_a_file_that_cannot_be_imported_is_refused(tmp_path):
    (tmp_path / "bad.py").write_text("import no_such_thing")
    with pytest.raises(UsageError, match=r"bad.py cannot be imported \(ModuleNotFoundError: No module named 'no_such_thing'\)"):
        load(f"{tmp_path}/bad.py:C")


def test_a_name_that_two_packages_use_is_refused(tmp_path, monkeypatch):
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[loopctl]\nclip = other:Clip\nnoise = other:Noise\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "noise" in available()
    with pytest.raises(UsageError, match="clip: more than one package has a plugin of this name"):
        entry_point("clip")


def test_a_package_that_only_an_import_finder_knows_is_listed_with_its_help(tmp_path, monkeypatch):
    """An editable install may be such a package. It is not imported."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "far_away.py").write_text(PLUGIN.replace("class MyPlugin:", "class MyPlugin:\n    \"Far away.\"") + "1 / 0\n")
    info = tmp_path / "near" / "far-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: far\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[loopctl]\nfar = far_away:MyPlugin\n")

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return spec_from_file_location(name, tmp_path / "far" / "far_away.py") if name == "far_away" else None
    monkeypatch.syspath_prepend(tmp_path / "near")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    (line,) = [line for line in listing.table(False)[0].splitlines() if line.startswith("  far ")]
    assert line.split() == ["far", "Far", "away.", "[far", "1.0]"]
    assert "far_away" not in sys.modules
