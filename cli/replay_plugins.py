"""The plugins that take part in a replay of a run: which are added, and what becomes of the run's own."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loopctl import hookimpl
from loopctl.checkpoint.state import acts_in_training
from loopctl.checkpoint.step_guard import StepGuard
from loopctl.composition.discovery import build_plugin, load_class, split_spec
from loopctl.composition.options import parse_options, plugin_options
from loopctl.errors import UsageError
from loopctl.plugins.checkpoint import Checkpoint
from loopctl.plugins.max_time import MaxTime

LOGGING = "logging and reports"             # the topic of plugins that write or print and change nothing


def complete(spec: str, first: int, last: int, entered: int) -> str:
    """The spec of a plugin to add, with the options that have it record step `first` where none are given."""
    head, text = split_spec(spec)
    known = plugin_options(cls := load_class(head))
    given = parse_options(head, text, known)
    wanted = {"every_steps": 1} if "every_steps" in known and not issubclass(cls, Checkpoint) else {}
    if head == "profile" and not given.keys() & {"start", "steps"}:
        wanted = {"start": first - 1 - entered, "steps": last - first + 1}
    options = [*[text] * bool(text), *(f"{name}={value}" for name, value in wanted.items() if name not in given)]
    return f"{head}:{','.join(options)}" if options else head


def check_observer(spec: str, text: str) -> None:
    """Raise UsageError where a plugin acts in training, or has a state, which no checkpoint of the run has."""
    name, plugin = build_plugin(text)
    if acts_in_training(plugin) and not getattr(plugin, "observer_only", False):
        raise UsageError(f"--plugin {spec}: {name} acts in training, so it would be another run; add observers only, "
                         "such as norms, tape or profile")
    if hasattr(plugin, "state_dict"):
        raise UsageError(f"--plugin {spec}: {name} has a state, which the run's checkpoints do not hold; add observers "
                         "only, such as norms, tape or profile")


def check_outside(folder: Path, out: Path, plugins: Iterable[Any]) -> None:
    """Raise UsageError where something would be written to the run's folder."""
    written = [getattr(plugin, name, None) for plugin in plugins for name in ("dir", "path", "steps_path")]
    for path in [out, *(out / path for path in written if isinstance(path, str))]:
        if path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{path} is in {folder}, which is left as it is; choose another place")


def rolls_back(plugin: Any) -> bool:
    """Whether a plugin goes back to checkpoints while it trains."""
    return isinstance(plugin, StepGuard) and plugin.action == "rollback"


def in_replay(plugin: Any, saving: bool) -> Any:
    """What takes part in a replay for a plugin of the run: itself, a stand-in with its state, or nothing.

    What only writes, saves or ends the run by the clock takes no part, unless it acts in training.

    saving: whether checkpoints are needed
    """
    acts = acts_in_training(plugin) and not getattr(plugin, "observer_only", False)
    writes = isinstance(plugin, MaxTime) or getattr(plugin, "topic", "") == LOGGING
    if acts or not (writes or isinstance(plugin, Checkpoint)) or (saving and isinstance(plugin, Checkpoint)):
        return plugin
    return stand_in(type(plugin)) if hasattr(plugin, "state_dict") else None


class StandIn:
    """Has the state of a plugin that takes no part in a replay, because a checkpoint must find every state's owner."""

    observer_only = True
    state: Any = None

    @hookimpl
    def train_start(self) -> None:
        pass

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def stand_in(cls: type) -> Any:
    """A stand-in with the name of a plugin class."""
    return type(cls.__name__, (StandIn,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})()


def shadow_checkpoints(folder: Path, plugins: Iterable[Any], step: int, entry: Path | None, scratch: Path,
                       ) -> Path | None:
    """Have checkpoints saved to temporary folders, for a plugin that goes back to the latest one.

    entry: the checkpoint of `step` in which the run in `folder` is entered. It is there too, as a link, which is
        returned, because later ones of the run may be beside it
    """
    link = entry
    for number, saver in enumerate(each for each in plugins if isinstance(each, Checkpoint)):
        place = scratch / f"checkpoints-{number}"
        place.mkdir()
        if entry and link is entry and (folder / saver.dir).resolve() == entry.parent.resolve():
            link = place / f"step-{step:08}.pt"
            link.symlink_to(entry.resolve())
        saver.dir = str(place)
    return link
