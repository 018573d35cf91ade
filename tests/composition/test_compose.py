"""compose: name, order and check plugins, and compile their hooks; blame_plugin: name the plugin that raised an error."""
import traceback
from dataclasses import dataclass

import pluggy
import pytest
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl, hooks
from loopctl.composition.compose import ARGUMENTS, SPECS, compose

cross_entropy = nn.CrossEntropyLoss()


class Observer:
    """Appends its name to a list in before_step."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    @hookimpl
    def before_step(self):
        self.log.append(self.name)


class Wrapper(Observer):
    @hookimpl(wrapper=True)
    def before_step(self):
        self.log.append(f"{self.name} in")
        result = yield
        self.log.append(f"{self.name} out")
        return result


def test_plugins_act_in_the_order_given():
    log = []
    compose([Observer("a", log), Observer("b", log), Observer("c", log)]).before_step(run=None)
    assert log == ["a", "b", "c"]


def test_the_first_wrapper_is_the_outermost():
    log = []
    compose([Wrapper("a", log), Observer("b", log), Wrapper("c", log)]).before_step(run=None)
    assert log == ["a in", "c in", "b", "c out", "a out"]


def test_further_instances_of_a_plugin_get_numbered_names():
    log = []
    assert list(compose(["clip", "clip:value=1", Observer("a", log), Observer("b", log), "clip"]).plugins) == [
        "clip", "clip.2", "observer", "observer.2", "clip.3"]


def test_an_instance_and_text_give_the_same_plugin():
    from loopctl.plugins.clip import Clip
    (one,), (other,) = compose([Clip(max_norm=2.0)]).plugins.items(), compose(["clip:max_norm=2"]).plugins.items()
    assert one[0] == other[0] == "clip"
    assert vars(one[1]) == vars(other[1])


def test_a_hook_without_plugins_does_nothing_and_a_single_method_is_called_directly():
    composed = compose([Observer("a", [])])
    assert composed.after_step(run=None) is None

    class TakesEveryArgument:
        @hookimpl
        def before_step(self, run: Run):
            pass

    plugin = TakesEveryArgument()
    assert compose([plugin]).before_step.__self__ is plugin


def test_compiled_hooks_return_what_pluggy_returns():
    """Both call the same observers, wrappers and replacements."""

    class Factor:
        def __init__(self, factor):
            self.factor = factor

        @hookimpl
        def lr_scale(self, initial_lr):
            return self.factor and self.factor * initial_lr

    class Doubles:
        @hookimpl(wrapper=True)
        def lr_scale(self, group):
            return [2 * factor for factor in (yield)] + [group]

    class Replaces:
        @hookimpl
        def compute_loss(self, batch):
            return batch + 1

    class Adds:
        @hookimpl(wrapper=True)
        def compute_loss(self, batch):
            return (yield) + 10 * batch

    class Catches:
        @hookimpl(wrapper=True)
        def backward(self):
            try:
                return (yield)
            except ZeroDivisionError:
                return "caught"

    class Fails:
        @hookimpl
        def backward(self, loss):
            return 1 / loss

    plugins = [Factor(3), Doubles(), Factor(None), Factor(5), Replaces(), Adds(), Catches(), Fails()]
    composed = compose(plugins)
    manager = pluggy.PluginManager("loopctl")
    manager.add_hookspecs(hooks)
    for plugin in reversed(plugins):
        manager.register(plugin)
    for caller in (composed, manager.hook):
        assert caller.lr_scale(run=None, initial_lr=2, group=7) == [12, 20, 7]
        assert caller.compute_loss(run=None, batch=4) == 45
        assert caller.backward(run=None, loss=0) == "caught"
        assert caller.backward(run=None, loss=2) == 0.5


def test_a_replacement_that_returns_none_still_replaces_the_default():
    """In pluggy, None means that the next implementation is called, so the optimizer would step twice."""

    class ReturnsNone:
        @hookimpl
        def optimizer_step(self, run: Run, closure):
            closure()

    assert compose([ReturnsNone()]).optimizer_step(run=None, closure=lambda: None) is None


def test_a_wrapper_that_does_not_yield_exactly_once_is_refused():
    class Never:
        @hookimpl(wrapper=True)
        def before_step(self):
            if False:
                yield

    class Twice:
        @hookimpl(wrapper=True)
        def before_step(self):
            yield
            yield

    class YieldsAfterAnError:
        @hookimpl(wrapper=True)
        def before_step(self):
            try:
                yield
            except ValueError:
                yield

    class Fails:
        @hookimpl
        def before_step(self):
            raise ValueError

    with pytest.raises(RuntimeError, match="never: a wrapper must yield exactly once; it did not yield"):
        compose([Never()]).before_step(run=None)
    with pytest.raises(RuntimeError, match="twice: a wrapper must yield exactly once; it yielded twice"):
        compose([Twice()]).before_step(run=None)
    with pytest.raises(RuntimeError, match="yields_after_an_error: a wrapper must yield exactly once; it yielded twice"):
        compose([YieldsAfterAnError(), Fails()]).before_step(run=None)


def test_an_error_passes_through_wrappers_and_keeps_its_traceback():
    log = []

    class Fails:
        @hookimpl
        def before_step(self):
            raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch") as caught:
        compose([Wrapper("a", log), Fails()]).before_step(run=None)
    assert log == ["a in"]
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "before_step"


# Plugins that are refused


@dataclass(eq=False)
class WithOption:
    size: int = 1

    @hookimpl
    def before_step(self, run: Run):
        pass


@dataclass
class Equal:
    @hookimpl
    def before_step(self):
        pass


class NoHooks:
    pass


class MisspeltHook:
    @hookimpl
    def befor_step(self):
        pass


class MisspeltArgument:
    @hookimpl
    def before_step(self, runn):
        pass


class ArgumentWithDefault:
    @hookimpl
    def before_step(self, run: Run=None):
        pass


class Unmarked:
    @hookimpl
    def after_step(self):
        pass

    def before_step(self):
        pass


class ReplacesBackward:
    @hookimpl
    def backward(self, loss):
        pass


same_instance = WithOption()


@pytest.mark.parametrize(("plugins", "message"), [
    ([Equal()], r"equal: two equal instances could not be told apart; use @dataclass\(eq=False\)"),
    ([NoHooks()], "no_hooks: has no hooks; mark its methods with @hookimpl"),
    ([MisspeltHook()], "misspelt_hook: no hook is called 'befor_step'; did you mean 'before_step'"),
    ([MisspeltArgument()], "misspelt_argument: before_step has no argument 'runn'; did you mean 'run'"),
    ([ArgumentWithDefault()], "argument_with_default: before_step gives 'run' a default value; remove the default"),
    ([Unmarked()], "unmarked: before_step has the name of a hook but no @hookimpl; add it, or rename the method"),
    ([ReplacesBackward(), "amp:dtype=float16"], "replaces_backward and amp both replace backward; choose one"),
    ([ReplacesBackward(), ReplacesBackward()], "replaces_backward and replaces_backward.2 both replace backward; choose one"),
    ([same_instance, same_instance], "with_option: the same instance is given twice"),
    ([WithOption], "WithOption is a class; pass an instance"),
    ([WithOption(size="large")], "with_option: size takes a whole number, not 'large'"),
    (["no_such"], "no plugin is called 'no_such'"),
    (["cosin"], "did you mean 'cosine'"),
])
def test_plugins_that_cannot_work_are_refused_with_a_message_of_one_line(plugins, message):
    with pytest.raises(UsageError, match=message) as refused:
        compose(plugins)
    assert "\n" not in str(refused.value)


def test_several_schedules_are_allowed_and_amp_with_bfloat16_does_not_replace_backward():
    compose(["cosine", "warmup", "cosine"])
    compose([ReplacesBackward(), "amp:dtype=bfloat16"])


# Errors raised by plugins


class FailsIn:
    def __init__(self, hook):
        self.hook = hook

    @hookimpl
    def grads_ready(self, run: Run):
        if self.hook == "grads_ready":
            raise ZeroDivisionError("no gradient")

    @hookimpl
    def group_batches(self, batches):
        def groups():
            for batch in batches:
                yield [batch]
            if self.hook == "group_batches":
                raise ZeroDivisionError("no gradient")
        return groups()

    @hookimpl(wrapper=True)
    def compute_loss(self):
        result = yield
        if self.hook == "compute_loss":
            raise ZeroDivisionError("no gradient")
        return result


@pytest.mark.parametrize("hook", ["grads_ready", "group_batches", "compute_loss"])
def test_an_error_in_a_plugin_gets_a_note_with_the_plugin_and_the_hook(net, batches, sgd, hook):
    with pytest.raises(ZeroDivisionError, match="no gradient") as caught:
        fit(net, cross_entropy, sgd, batches, plugins=["clip", "amp:dtype=bfloat16", FailsIn(hook)])
    assert str(caught.value) == "no gradient"
    assert caught.value.__notes__ == [f"raised by plugin 'fails_in' in its hook {hook}"]


def test_the_note_names_the_right_one_of_two_instances(net, batches, sgd):
    class FailsIf:
        def __init__(self, fails):
            self.fails = fails

        @hookimpl
        def before_step(self):
            if self.fails:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fit(net, cross_entropy, sgd, batches, plugins=[FailsIf(False), FailsIf(True)])
    assert caught.value.__notes__ == ["raised by plugin 'fails_if.2' in its hook before_step"]


def test_an_error_in_the_loss_function_or_the_data_gets_no_note(net, batches, sgd):
    def loss(output, target):
        raise ZeroDivisionError

    def data():
        yield from batches[:2]
        raise ZeroDivisionError

    for arguments in ((net, loss, sgd, batches), (net, cross_entropy, sgd, data())):
        with pytest.raises(ZeroDivisionError) as caught:
            fit(*arguments, plugins=["amp:dtype=bfloat16", "clip"], steps_per_epoch=8)
        assert "plugin" not in str(getattr(caught.value, "__notes__", ""))


def test_a_usage_error_raised_by_a_plugin_starts_with_its_name(net, batches, sgd):
    class Freeze:
        @hookimpl
        def setup(self, run: Run):
            raise UsageError("no parameter matches 'conv9'")

    with pytest.raises(UsageError, match="^freeze: no parameter matches 'conv9'$"):
        fit(net, cross_entropy, sgd, batches, plugins=[Freeze()])


def test_every_hook_takes_run_as_its_first_argument():
    assert all(arguments[0] == "run" for arguments in ARGUMENTS.values())
    assert len(SPECS) == 23
