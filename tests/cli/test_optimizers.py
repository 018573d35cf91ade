"""Optimizers by name: the classes of torch.optim, and others by import path."""
import subprocess
import sys

import pytest
import torch

from loopctl.cli import optimizers
from loopctl.errors import UsageError

CLASSES = {cls.__name__.lower(): cls for cls in vars(torch.optim).values()
           if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer}

MUON = pytest.mark.skipif("muon" not in CLASSES, reason="torch has no Muon before 2.9")


def groups():
    return [{"params": [torch.zeros(2, 2, requires_grad=True)]}]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_class_of_torch_is_built_by_its_name(name):
    factory, lr = optimizers.make(name, None)
    made = factory(groups())
    assert type(made) is CLASSES[name]
    assert lr == made.defaults.get("lr")


def test_the_factory_takes_parameter_groups_as_torch_does():
    factory, _ = optimizers.make("sgd:momentum=0.5", 0.1)
    made = factory([*groups(), {**groups()[0], "lr": 0.01}])
    assert [(group["lr"], group["momentum"]) for group in made.param_groups] == [(0.1, 0.5), (0.01, 0.5)]


@pytest.mark.parametrize(("spec", "expected"), [
    ("sgd:momentum=0.9,nesterov=true", {"momentum": 0.9, "nesterov": True}),
    ("sgd:momentum=1e-1,nesterov=no", {"momentum": 0.1, "nesterov": False}),
    ("adamw:betas=0.9,0.95", {"betas": (0.9, 0.95)}),
    ("adamw:betas=0.9,0.95,eps=1e-6,amsgrad=true", {"betas": (0.9, 0.95), "eps": 1e-6, "amsgrad": True}),
    ("adamw:foreach=false,fused=none", {"foreach": False, "fused": None}),
    ("lbfgs:max_iter=5,line_search_fn=strong_wolfe", {"max_iter": 5, "line_search_fn": "strong_wolfe"}),
])
def test_options_have_the_types_of_the_arguments(spec, expected):
    defaults = optimizers.make(spec, None)[0](groups()).defaults
    assert {name: defaults[name] for name in expected} == expected
    assert [type(defaults[name]) for name in expected] == [type(value) for value in expected.values()]


def test_the_lr_of_the_command_line_overrides_the_default_of_the_class():
    factory, lr = optimizers.make("adamw", 0.25)
    assert lr == 0.25
    assert factory(groups()).param_groups[0]["lr"] == 0.25


def test_without_lr_the_default_of_the_class_is_used_and_returned():
    factory, lr = optimizers.make("adamw", None)
    assert lr == factory(groups()).param_groups[0]["lr"] == torch.optim.AdamW(groups()).defaults["lr"]


def test_an_lr_among_the_options_is_used_and_not_returned():
    factory, lr = optimizers.make("sgd:lr=0.5", None)
    assert lr is None
    assert factory(groups()).param_groups[0]["lr"] == 0.5


def test_a_learning_rate_of_zero_is_accepted():
    assert optimizers.make("sgd", 0.0)[0](groups()).param_groups[0]["lr"] == 0


def test_an_optimizer_by_import_path():
    factory, lr = optimizers.make("torch.optim:SGD:momentum=0.9", 0.1)
    made = factory(groups())
    assert type(made) is torch.optim.SGD
    assert (made.defaults["momentum"], made.defaults["lr"], lr) == (0.9, 0.1, 0.1)


def test_an_optimizer_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import torch\nclass Slow(torch.optim.SGD):\n    pass\n")
    made = optimizers.make(f"{file}:Slow:momentum=0.5", 0.1)[0](groups())
    assert (type(made).__name__, made.defaults["momentum"]) == ("Slow", 0.5)


@pytest.mark.parametrize(("spec", "lr", "words"), [
    ("adamm", None, "no optimizer is called 'adamm'; did you mean 'adam'?"),
    ("qqq", None, "there are adadelta, adafactor, .*, or package.module:name"),
    ("sgd:momentm=0.9", None, "optimizer sgd: no option 'momentm'; did you mean 'momentum'?"),
    ("sgd:momentum=-1", None, "optimizer sgd: Invalid momentum value: -1"),
    ("sgd:nesterov=true", None, "optimizer sgd: Nesterov momentum requires a momentum"),
    ("adamw:betas=0.9", None, "optimizer adamw: betas takes 2 values, as in betas=0.9,0.999, not 0.9"),
    ("adamw:betas=0.9,2", None, "optimizer adamw: Invalid beta parameter at index 1"),
    ("lbfgs:max_iter=2.5", None, "optimizer lbfgs: max_iter takes a whole number, not '2.5'"),
    ("sgd:lr=0.1", 0.2, "lr is given twice"),
    ("sgd", float("nan"), "lr is nan; use a number from 0 to 3.4e38"),
    ("torch.nn:Flatten", None, "optimizer torch.nn:Flatten returned a Flatten, not a torch.optim.Optimizer"),
    ("torch.optim", None, "name a class or function in it, as in torch.optim:name"),
])
def test_a_wrong_optimizer_or_option_is_refused_immediately(spec, lr, words):
    with pytest.raises(UsageError, match=words.replace("?", r"\?")):
        optimizers.make(spec, lr)


@MUON
def test_the_error_for_unsuitable_parameters_names_the_optimizer():
    factory, _ = optimizers.make("muon", None)
    with pytest.raises(UsageError, match=r"optimizer muon: .*2D"):
        factory([{"params": [torch.zeros(3, requires_grad=True)]}])


def test_shell_completion_has_all_optimizers_without_importing_torch():
    code = ("import sys; from loopctl.cli import optimizer_names; print(*optimizer_names()); "
            "assert 'torch' not in sys.modules")
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert names == sorted(CLASSES)


@pytest.mark.parametrize(("spec", "device", "fused"), [
    ("adamw", "cuda", True), ("sgd:momentum=0.9", "cuda", True), ("adamw", "cpu", None), ("adamw:foreach=true", "cuda", None),
    ("adam:fused=false", "cuda", False), ("rmsprop", "cuda", "missing"), ("lbfgs", "cuda", "missing"),
])
def test_the_update_is_fused_on_a_gpu_if_torch_supports_it(spec, device, fused):
    factory, _ = optimizers.make(spec, 0.1, device)
    assert factory([torch.zeros(2, 2, requires_grad=True)]).defaults.get("fused", "missing") == fused


@pytest.mark.parametrize(("text", "specs"), [
    ("muon,adamw", ["muon", "adamw"]),
    ("muon:lr=0.02,weight_decay=0.1 , adamw:lr=3e-4", ["muon:lr=0.02,weight_decay=0.1 ", "adamw:lr=3e-4"]),
    ("adamw:betas=0.9,0.95,eps=1e-6", ["adamw:betas=0.9,0.95,eps=1e-6"]),
    ("muon:ns_coefficients=3.4,-4.7,2.0,adamw:betas=0.9,0.95", ["muon:ns_coefficients=3.4,-4.7,2.0", "adamw:betas=0.9,0.95"]),
    ("sgd:lr=0.1,adam", ["sgd:lr=0.1", "adam"]),
    ("a.b:C:x=1,path/to/m.py:D:y=2", ["a.b:C:x=1", "path/to/m.py:D:y=2"]),
    ("a:C:x=(1,adam),y=\"b:c,d\"", ["a:C:x=(1,adam),y=\"b:c,d\""]),
    ("muon,adamm", ["muon", "adamm"]),
])
def test_two_optimizers_are_divided_by_a_comma(text, specs):
    assert optimizers.split_specs(text, ["adam", "adamw", "muon", "sgd"]) == specs


@MUON
def test_two_optimizers_have_the_hidden_matrices_and_everything_else():
    made, lr = optimizers.make("muon:lr=0.02,weight_decay=0.2,adamw:betas=0.9,0.95", None)
    assert lr is None
    assert {name: factory.kind for name, factory in made.items()} == {"muon": "hidden matrices", "adamw": "others"}
    assert made["muon"](groups()).defaults.items() >= {"lr": 0.02, "weight_decay": 0.2}.items()
    assert made["adamw"](groups()).defaults["betas"] == (0.9, 0.95)


def test_an_optimizer_of_a_path_is_called_as_its_class():
    made, _ = optimizers.make("torch.optim:SGD:lr=0.1,adamw", None)
    assert [*made] == ["SGD", "adamw"]


@pytest.mark.parametrize(("spec", "lr", "words"), [
    ("sgd,adamm", None, "no optimizer is called 'adamm'; did you mean 'adam'?"),
    ("sgd,adam:lrr=1", None, "optimizer adam: no option 'lrr'; did you mean 'lr'?"),
    ("sgd,adam", 0.1, "optimizer sgd,adam: --lr would be that of both; write it among the options of each, as in sgd:lr=0.1"),
    ("sgd,adam,adamw", None, "optimizer sgd,adam,adamw: 3 optimizers; there may be two"),
    ("sgd:lr=1,sgd:lr=2", None, "both are called sgd; use a dict by the part of the model in a file"),
    pytest.param("adamw,muon", None, "the second optimizer has everything that is no hidden matrix, so put muon first", marks=MUON),
])
def test_two_optimizers_that_do_not_fit_are_refused_immediately(spec, lr, words):
    with pytest.raises(UsageError) as refused:
        optimizers.make(spec, lr)
    assert words in str(refused.value)


def test_a_dict_of_optimizers_cannot_be_one_of_two(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import torch\noptimizers = {'*': torch.optim.SGD}\n")
    with pytest.raises(UsageError, match="is a dict of optimizers, which cannot be one of two; use it alone"):
        optimizers.make(f"sgd,{file}:optimizers", None)


def test_a_version_of_torch_without_an_optimizer_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    for spec in ("muon", "muon:lr=0.1,adamw"):
        with pytest.raises(UsageError, match=r"optimizer muon: torch \d.* has no torch.optim.Muon, which later versions have"):
            optimizers.make(spec, None)


@pytest.mark.parametrize("source", ["option", "file"])
def test_explain_says_which_parameters_each_of_two_optimizers_has(command, tmp_path, source):
    spec = "sgd:lr=0.02 , adamw:betas=0.9,0.95"
    (tmp_path / "run.toml").write_text(f'optimizer = "{spec}"\n')
    text = command("explain", *(["--optimizer", spec] if source == "option" else ["--config", "run.toml"]), "--model", "mlp")
    assert text.splitlines()[-4:] == [
        "learning rate    group sgd: 0.02 at the start, 0.02 at its peak, 0.02 at the end",
        "                 group adamw: 0.001 at the start, 0.001 at its peak, 0.001 at the end",
        "optimizers       sgd: SGD with 24,576 numbers, 1.weight and 4.weight",
        "                 adamw: AdamW with 1,546 numbers, 1.bias, 4.bias, 7.weight and 1 more"]
