"""Naming, ordering, checking and compiling plugins."""
import traceback
from dataclasses import dataclass

import pluggy
import pytest
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl, hooks
from loopctl.composition.compose import ARGUMENTS, SPECS, compose

cross_entropy = nn.CrossEntropyLoss()


class Says:
    """Joins a hook and writes its name to a list."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    @hookimpl
    def before_step(self):
        self.log.append(self.name)


class Wraps(Says):
    @hookimpl(wrapper=True)
    def before_step(self):
        self.log.append(f"{self.name} in")
        result = yield
        self.log.append(f"{self.name} out")
        return result


def test_plugins_act_in_the_order_given():
    log = []
    compose([Says("a", log), Says("b", log), Says("c", log)]).before_step(run=None)
    assert log == ["a", "b", "c"]


def test_the_first_wrapper_is_the_outermost():
    log = []
    compose([Wraps("a", log), Says("b", log), Wraps("c", log)]).before_step(run=None)
    assert log == ["a in", "c in", "b", "c out", "a out"]


def test_a_second_instance_has_a_name_of_its_own():
    log = []
    assert list(compose(["clip", "clip:value=1", Says("a", log), Says("b", log), "clip"]).plugins) == [
        "clip", "clip.2", "says", "says.2", "clip.3"]


def test_instances_and_strings_are_the_same_plugin():
    from loopctl.plugins.clip import Clip
    (one,), (other,) = compose([Clip(max_norm=2.0)]).plugins.items(), compose(["clip:max_norm=2"]).plugins.items()
    assert one[0] == other[0] == "clip"
    assert vars(one[1]) == vars(other[1])


def test_a_hook_that_nobody_joins_does_nothing_and_a_single_one_is_itself():
    mine = Says("a", [])
    composed = compose([mine])
    assert composed.after_step(run=None) is None

    class Whole:
        @hookimpl
        def before_step(self, run: Run):
            pass

    whole = Whole()
    assert compose([whole]).before_step.__self__ is whole


def test_what_is_compiled_does_what_pluggy_does():
    """The same observers, wrappers and replacements through pluggy's own calls."""

    class Collects:
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

    plugins = [Collects(3), Doubles(), Collects(None), Collects(5), Replaces(), Adds(), Catches(), Fails()]
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


def test_a_replacement_that_returns_nothing_has_still_replaced():
    """In pluggy None would hand over to the default, and the optimizer would step twice."""

    class Mine:
        @hookimpl
        def optimizer_step(self, run: Run, closure):
            closure()

    assert compose([Mine()]).optimizer_step(run=None, closure=lambda: None) is None


def test_a_wrapper_yields_once():
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

    class Stubborn:
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

    with pytest.raises(RuntimeError, match="never: a wrapper must yield once, and did not"):
        compose([Never()]).before_step(run=None)
    with pytest.raises(RuntimeError, match="twice: a wrapper must yield once, and did so twice"):
        compose([Twice()]).before_step(run=None)
    with pytest.raises(RuntimeError, match="stubborn: a wrapper must yield once"):
        compose([Stubborn(), Fails()]).before_step(run=None)


def test_an_error_passes_through_wrappers_and_keeps_its_place():
    log = []

    class Fails:
        @hookimpl
        def before_step(self):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        compose([Wraps("a", log), Fails()]).before_step(run=None)
    assert log == ["a in"]
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "before_step"


# What is refused.


@dataclass(eq=False)
class Good:
    size: int = 1

    @hookimpl
    def before_step(self, run: Run):
        pass


@dataclass
class Equal:
    @hookimpl
    def before_step(self):
        pass


class Nothing:
    pass


class Misspelt:
    @hookimpl
    def befor_step(self):
        pass


class Argument:
    @hookimpl
    def before_step(self, runn):
        pass


class Default:
    @hookimpl
    def before_step(self, run: Run=None):
        pass


class Unmarked:
    @hookimpl
    def after_step(self):
        pass

    def before_step(self):
        pass


class Scales:
    @hookimpl
    def backward(self, loss):
        pass


same_instance = Good()


@pytest.mark.parametrize(("plugins", "message"), [
    ([Equal()], r"equal: equal instances would be taken for one; write @dataclass\(eq=False\)"),
    ([Nothing()], "nothing: has no hooks; mark its methods with @hookimpl"),
    ([Misspelt()], "misspelt: no hook is called 'befor_step'; did you mean 'before_step'"),
    ([Argument()], "argument: before_step has no argument 'runn'; did you mean 'run'"),
    ([Default()], "default: before_step gives 'run' a default"),
    ([Unmarked()], "unmarked: before_step is named as a hook but not marked"),
    ([Scales(), "amp:dtype=float16"], "scales and amp both replace backward; choose one"),
    ([Scales(), Scales()], "scales and scales.2 both replace backward; choose one"),
    ([same_instance, same_instance], "good: the same instance is given twice"),
    ([Good], "Good is a class; pass an instance"),
    ([Good(size="large")], "good: size takes a whole number, not 'large'"),
    (["no_such"], "no plugin is called 'no_such'"),
    (["cosin"], "did you mean 'cosine'"),
])
def test_what_cannot_work_is_refused_in_one_line(plugins, message):
    with pytest.raises(UsageError, match=message) as refused:
        compose(plugins)
    assert "\n" not in str(refused.value)


def test_two_schedules_do_not_clash_and_bfloat16_scales_nothing():
    compose(["cosine", "warmup", "cosine"])
    compose([Scales(), "amp:dtype=bfloat16"])


# Who is to blame.


class Broken:
    def __init__(self, hook):
        self.hook = hook

    @hookimpl
    def grads_ready(self, run: Run):
        if self.hook == "grads_ready":
            raise ZeroDivisionError("mine")

    @hookimpl
    def group_batches(self, batches):
        def groups():
            for batch in batches:
                yield [batch]
            if self.hook == "group_batches":
                raise ZeroDivisionError("mine")
        return groups()

    @hookimpl(wrapper=True)
    def compute_loss(self):
        result = yield
        if self.hook == "compute_loss":
            raise ZeroDivisionError("mine")
        return result


@pytest.mark.parametrize("hook", ["grads_ready", "group_batches", "compute_loss"])
def test_an_error_in_a_plugin_names_it_and_its_hook(net, batches, sgd, hook):
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        fit(net, cross_entropy, sgd, batches, plugins=["clip", "amp:dtype=bfloat16", Broken(hook)])
    assert str(caught.value) == "mine"
    assert caught.value.__notes__ == [f"raised by plugin 'broken' in its hook {hook}"]


def test_the_right_one_of_two_instances_is_named(net, batches, sgd):
    class Once:
        def __init__(self, fails):
            self.fails = fails

        @hookimpl
        def before_step(self):
            if self.fails:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fit(net, cross_entropy, sgd, batches, plugins=[Once(False), Once(True)])
    assert caught.value.__notes__ == ["raised by plugin 'once.2' in its hook before_step"]


def test_an_error_in_the_model_or_the_data_blames_no_plugin(net, batches, sgd):
    def loss(output, target):
        raise ZeroDivisionError

    def data():
        yield from batches[:2]
        raise ZeroDivisionError

    for arguments in ((net, loss, sgd, batches), (net, cross_entropy, sgd, data())):
        with pytest.raises(ZeroDivisionError) as caught:
            fit(*arguments, plugins=["amp:dtype=bfloat16", "clip"], steps_per_epoch=8)
        assert "plugin" not in str(getattr(caught.value, "__notes__", ""))


def test_a_refusal_by_a_plugin_begins_with_its_name(net, batches, sgd):
    class Freeze:
        @hookimpl
        def setup(self, run: Run):
            raise UsageError("no parameter matches 'conv9'")

    with pytest.raises(UsageError, match="^freeze: no parameter matches 'conv9'$"):
        fit(net, cross_entropy, sgd, batches, plugins=[Freeze()])


def test_every_spec_has_run_first():
    assert all(arguments[0] == "run" for arguments in ARGUMENTS.values())
    assert len(SPECS) == 22
