"""Watchers of hooks: told of everything, in order, and without an effect."""
from types import SimpleNamespace

import pytest

from loopctl import hookimpl
from loopctl.composition.compose import compose, find_culprit
from loopctl.composition.watching import Watcher, watch_hooks

RUN = SimpleNamespace()


class Recorder(Watcher):
    def __init__(self):
        self.seen = []

    def entered(self, run, hook, arguments):
        assert arguments["run"] is run is RUN
        self.seen.append(f"entered {hook}")

    def acted(self, run, hook, plugin, begins):
        self.seen.append(f"{plugin or 'default'}{' begins' * begins}")

    def left(self, run, hook, result):
        self.seen.append(f"left {hook} {result}")


class Around:
    @hookimpl(wrapper=True)
    def evaluate(self):
        return (yield) | {"around": 1}

    @hookimpl(wrapper=True)
    def after_step(self):
        yield


class Plain:
    @hookimpl
    def after_step(self, run):
        pass


class Other(Plain):
    pass


class Defaults:
    @hookimpl
    def evaluate(self, run):
        return {"loss": 2}


def test_a_watcher_is_told_in_order_and_the_result_is_the_same():
    composed, watcher = compose([Plain(), Around(), Other()], [Defaults()]), Recorder()
    expected, others = composed.evaluate(run=RUN), (composed.safe_point, composed.before_step)
    watch_hooks(composed, ["evaluate", "after_step", "epoch_end"], watcher)
    assert composed.evaluate(run=RUN) == expected == {"loss": 2, "around": 1}
    assert watcher.seen == ["entered evaluate", "around begins", "default", "around", f"left evaluate {expected}"]
    watcher.seen.clear()
    composed.after_step(run=RUN)
    assert watcher.seen == ["entered after_step", "around begins", "plain", "other", "around", "left after_step None"]
    watcher.seen.clear()
    composed.epoch_end(run=RUN)
    assert watcher.seen == ["entered epoch_end", "left epoch_end None"]
    watcher.seen.clear()
    assert (composed.safe_point, composed.before_step) == others        # not watched: what they were


def test_several_watchers_of_a_hook_are_all_told():
    composed, watchers = compose([Plain()]), [Recorder(), Recorder()]
    for watcher in watchers:
        watch_hooks(composed, ["after_step"], watcher)
    composed.after_step(run=RUN)
    assert watchers[0].seen == watchers[1].seen == ["entered after_step", "plain", "left after_step None"]


def test_an_error_passes_and_its_plugin_is_found():
    class Fails:
        @hookimpl
        def after_step(self, run):
            raise ValueError

    composed, watcher = compose([Around(), Fails(), Plain()]), Recorder()
    watch_hooks(composed, ["after_step"], watcher)
    with pytest.raises(ValueError) as raised:           # noqa: PT011
        composed.after_step(run=RUN)
    assert watcher.seen == ["entered after_step", "around begins"]
    assert find_culprit(raised.value.__traceback__, composed) == ("fails", "after_step")


def test_a_wrapper_may_handle_the_error_of_what_it_wraps():
    class Handles:
        @hookimpl(wrapper=True)
        def evaluate(self):
            try:
                return (yield)
            except ValueError:
                return {"handled": True}

    class Fails:
        @hookimpl
        def evaluate(self, run):
            raise ValueError

    composed, watcher = compose([Handles()], [Fails()]), Recorder()
    watch_hooks(composed, ["evaluate"], watcher)
    assert composed.evaluate(run=RUN) == {"handled": True}
    assert watcher.seen == ["entered evaluate", "handles begins", "handles", "left evaluate {'handled': True}"]
