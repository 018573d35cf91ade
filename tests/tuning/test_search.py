"""`tune`: what it changes, which is nothing, and what it chooses."""
import copy
import time
from functools import partial
from math import isnan, nan

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import UsageError, fit, tune
from loopctl.rng import rng_state
from loopctl.tuning import choices, search
from loopctl.tuning.choices import Choice, described, possible_choices, supported
from loopctl.tuning.search import Search, difference, with_workers
from loopctl.tuning.trial import Repeated, Result

cross_entropy = nn.CrossEntropyLoss()
adamw = partial(torch.optim.AdamW, lr=1e-3)


@pytest.fixture
def trials(monkeypatch):
    """Replace trials by a table: samples per second, losses and so on by the composition in words. All that were made."""
    made, shown = [], {}

    def trial(arguments, composition, train, device, seconds, limit, slowest=0.0, noise=0.0):
        key = described(composition) if isinstance(train, Repeated) else f"{described(composition)} with the data"
        key = f"{key}, noise {noise}" if noise else key
        made.append(key)
        found = shown.get(key, shown.get(described(composition), 100.0))
        return copy.deepcopy(found) if isinstance(found, Result) else Result(rate=found, losses=[2.0, 1.0], seconds=0.1)

    monkeypatch.setattr(search, "run_trial", trial)
    monkeypatch.setattr(choices.os, "cpu_count", lambda: 1)
    return made, shown


@pytest.fixture
def groups(monkeypatch):
    """Set what may be tried: groups of choices by name; a name with an equals sign is an option of the optimizer."""
    def use(*names):
        made = [[Choice(group[0], plugins=(name,)) for name in group] for group in names]
        monkeypatch.setattr(search, "possible_choices", lambda *given: made)
    return use


def names(found):
    return described(found.chosen)


def loader(samples=64, workers=0):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(samples, 6), torch.randint(3, (samples,)))
    return DataLoader(data, 8, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1))


def test_a_run_is_bit_equal_before_and_after(net, clone, same, monkeypatch):
    """With dropout, an optimizer that exists already and has a state, and a loader with a generator of its own."""
    monkeypatch.setattr(Search, "step_seconds", 0.02)
    monkeypatch.setattr(search, "SHARE_OF_MODEL", 0.0)
    monkeypatch.setattr(search, "worker_numbers", lambda current: [2])
    tried = Choice("amp", ("amp:dtype=bfloat16",)), Choice("settings", settings=(("threads", 2), ("matmul", "high")))
    monkeypatch.setattr(search, "possible_choices", lambda *given: [[choice] for choice in tried])
    runs = []
    for tuned in (False, True):
        model, data = clone(net), loader()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        fit(model, cross_entropy, optimizer, data, epochs=1, plugins=["clip:max_norm=1"])
        if tuned:
            before = rng_state(data), copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
            settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
            found = tune(model, cross_entropy, optimizer, data, epochs=2, plugins=["clip:max_norm=1"], seconds=60.0)
            assert sum(not isnan(row.rate) for row in found.rows) > 4
            assert repr((rng_state(data), model.state_dict(), optimizer.state_dict())) == repr(before)
            assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == settings
        torch.manual_seed(5)
        runs.append(fit(model, cross_entropy, optimizer, data, epochs=2, plugins=["clip:max_norm=1"]))
    same(runs[0].model, runs[1].model)
    assert runs[0].history == runs[1].history


def test_each_choice_is_tried_together_with_the_fastest_before_it(plain, trials, groups):
    made, shown = trials
    groups(["a", "aa"], ["b"], ["c"])
    shown |= {"a": 110.0, "aa": 120.0, "aa + b": 60.0, "aa + c": 240.0}
    found = tune(plain, cross_entropy, adamw, loader())
    assert (names(found), found.plugins) == ("aa + c", ["aa", "c"])
    assert dict.fromkeys(key for key in made if "data" not in key) == dict.fromkeys(
        ["as given", "a", "aa", "aa + b", "aa + c"])
    assert found.model_rate == 240.0
    assert found.gain == pytest.approx(2.4)


def test_what_did_not_pay_is_tried_again_with_what_was_chosen_after_it(plain, trials, groups):
    groups(["a"], ["b"])
    trials[1].update({"a": 100.0, "b": 200.0, "b + a": 300.0})
    assert names(tune(plain, cross_entropy, adamw, loader())) == "b + a"


def test_what_takes_long_to_prepare_is_tried_last(plain, trials, monkeypatch):
    made, shown = trials
    monkeypatch.setattr(search, "possible_choices", lambda *given: [[Choice("slow", ("slow",), slow=True)], [Choice("a", ("a",))], [Choice("b", ("b",))]])
    shown |= {"a": 100.0, "b": 200.0, "b + a": 300.0, "b + a + slow": 400.0}
    assert names(tune(plain, cross_entropy, adamw, loader())) == "b + a + slow"
    assert [key for key in dict.fromkeys(made) if "data" not in key] == ["as given", "a", "b", "b + a", "b + a + slow"]


def test_a_difference_within_the_noise_changes_nothing(plain, trials, groups):
    groups(["a"])
    trials[1].update({"a": 102.0})
    found = tune(plain, cross_entropy, adamw, loader())
    assert (names(found), found.plugins, found.settings, found.gain) == ("as given", [], {}, 1.0)


def test_what_is_only_faster_without_the_data_is_not_chosen(plain, trials, groups):
    groups(["a"])
    trials[1].update({"a": 200.0, "a with the data": 90.0})
    assert names(tune(plain, cross_entropy, adamw, loader())) == "as given"


@pytest.mark.parametrize(("loss", "rounds", "draws", "tolerance", "chosen"), [
    (1.0019, False, False, None, True), (1.0021, False, False, None, False), (1.019, True, False, None, True),
    (1.021, True, False, None, False), (1.0021, False, False, 0.01, True), (1.019, True, False, 0.001, False),
    (nan, True, False, None, False), (1.19, False, True, None, True), (1.19, False, False, None, False),
])
def test_a_composition_whose_loss_strays_is_not_chosen(plain, trials, monkeypatch, loss, rounds, draws, tolerance, chosen):
    """The run draws random numbers, and with another seed its loss is 1.1: others may be chosen that draw others."""
    shown = trials[1]
    monkeypatch.setattr(search, "possible_choices", lambda *given: [[Choice("a", ("a",), rounds=rounds, draws=draws)]])
    monkeypatch.setattr(Search, "measure_seeds", lambda self: 0.1)
    shown["as given"] = Result(rate=100.0, losses=[2.0, 1.0], draws=True, seconds=0.1)
    shown["a"] = Result(rate=200.0, losses=[2.0, loss], seconds=0.1)
    found = tune(plain, cross_entropy, adamw, loader(), tolerance=tolerance)
    assert names(found) == ("a" if chosen else "as given")
    assert ("not chosen: the loss strays" in str(found)) != chosen


@pytest.mark.parametrize(("rounds", "noise", "changed", "chosen"), [
    (False, 2**-23, 1.2, True), (False, 2**-23, 1.01, False), (True, 2**-8, 1.2, True), (True, 2**-8, 1.02, False)])
def test_a_loss_may_stray_as_far_as_by_rounding_of_the_weights(plain, trials, monkeypatch, rounds, noise, changed, chosen):
    """It strays by 10 %, and by the rest of 1 where the weights at the start are rounded otherwise; four times as far is allowed."""
    made, shown = trials
    monkeypatch.setattr(search, "possible_choices", lambda *given: [[Choice("a", ("a",), rounds=rounds)]])
    shown |= {"a": Result(rate=200.0, losses=[2.0, 1.1], seconds=0.1), f"as given, noise {noise}": Result(rate=1.0, losses=[2.0, changed])}
    assert names(tune(plain, cross_entropy, adamw, loader())) == ("a" if chosen else "as given")
    assert made.count(f"as given, noise {noise}") == 1


def test_another_seed_shows_how_far_the_loss_of_a_run_with_dropout_strays(net, monkeypatch):
    monkeypatch.setattr(Search, "step_seconds", 0.02)
    monkeypatch.setattr(search, "SHARE_OF_MODEL", 0.0)
    monkeypatch.setattr(search, "possible_choices", lambda *given: [])
    monkeypatch.setattr(search, "worker_numbers", lambda current: [])
    found = tune(net, cross_entropy, adamw, loader(), seed=3, seconds=60.0)
    assert found.seeds_differ > 1e-3
    assert "with another seed the loss strays" in str(found)


def test_what_fails_is_shown_with_its_reason(plain, trials, groups):
    groups(["a"])
    trials[1]["a"] = Result(reason="a and b cannot go together")
    assert "a: a and b cannot go together" in str(tune(plain, cross_entropy, adamw, loader()))


def test_what_there_was_no_time_for_is_named(plain, trials, groups, monkeypatch):
    groups(["a"], ["b"])
    clock = iter(range(1000))
    monkeypatch.setattr(search, "perf_counter", lambda: 10.0 * next(clock))
    found = tune(plain, cross_entropy, adamw, loader(), seconds=80)
    assert "not tried, for lack of time" in str(found)
    assert "b" in str(found).partition("for lack of time")[2]


def test_a_loader_with_more_processes_is_chosen_where_the_data_is_the_limit(plain, trials, groups, monkeypatch):
    groups(["a"])
    monkeypatch.setattr(choices.os, "cpu_count", lambda: 2)
    trials[1].update({"a": 1e9, "a with the data": 100.0, "a + workers=2 with the data": 150.0, "a + workers=1 with the data": 120.0})
    found = tune(plain, cross_entropy, adamw, loader())
    assert (found.num_workers, found.plugins) == (2, ["a"])
    assert "the data is the limit" in str(found)


def test_no_other_loader_is_tried_where_the_model_is_the_limit(plain, trials, groups, monkeypatch):
    made, shown = trials
    groups(["a"])
    monkeypatch.setattr(choices.os, "cpu_count", lambda: 2)
    shown["as given"] = 0.001
    assert "the model is the limit" in str(tune(plain, cross_entropy, adamw, loader()))
    assert not any("workers" in key for key in made)


def test_a_loader_that_cannot_be_made_is_a_line_with_its_reason(plain, trials, groups):
    def refused():
        raise UsageError("its samples come out differently at every reading")

    def full():
        raise MemoryError("no room")

    def slow():
        time.sleep(20)

    groups(["a"])
    trials[1]["a"] = 1e9
    arguments = {"model": plain, "loss_fn": cross_entropy, "optimizer": adamw, "train": loader(), "plugins": []}
    found = Search(arguments, 3.0, loaders={"refused": refused, "full": full, "slow": slow}).run()
    assert "a + refused: its samples come out differently" in str(found)
    assert "a + full: MemoryError: no room" in str(found)
    assert "a + slow: the data could not be read in the time that was left" in str(found)
    assert found.plugins == ["a"]


def test_a_loader_with_another_number_of_workers_reads_the_same_batches():
    own = loader()
    own.generator.manual_seed(3)
    expected = list(own)
    for number in (2, 0):
        own.generator.manual_seed(3)
        other = with_workers(own, number)
        assert other.num_workers == number
        assert all(torch.equal(a[0], b[0]) for a, b in zip(expected, other, strict=True))
    assert own.num_workers == 0


def test_the_trials_use_full_batches_that_fit_in_memory(plain, trials, groups, monkeypatch):
    groups()
    used = []
    monkeypatch.setattr(search, "Repeated", lambda batches, length, shorter: used.append(batches) or Repeated(batches, length))
    for size in (2**30, 2 * (8 * 6 * 4 + 8 * 8)):
        monkeypatch.setattr(search, "POOL_BYTES", size)
        tune(plain, cross_entropy, adamw, loader(samples=27))
    assert [[len(target) for _, target in batches] for batches in used] == [[8, 8, 8], [8, 8]]


@pytest.mark.parametrize(("loader", "expected"), [
    (loader(27), 3), (loader(24), None), (DataLoader(loader(27).dataset, 8, drop_last=True), None), ([(torch.ones(3, 2), 1)], None)])
def test_the_trials_see_a_batch_as_small_as_the_last_one_of_an_epoch(loader, expected):
    """For its size a compiler compiles anew, with which all other batches may become slower."""
    found = search.last_batch(loader, next(iter(loader)))
    assert found is None if expected is None else [len(part) for part in found] == [expected] * 2
    batches = [*Repeated([1, 2], 5, found)]
    assert batches[:1] + batches[2:] == [1, 1, 2, 1]
    assert batches[1] is (2 if expected is None else found)


def test_the_difference_is_that_of_the_last_quarter_of_the_common_steps():
    assert difference([9, 9, 9, 3], [1, 1, 1, 2, 7]) == 0.5
    assert difference([5.0] * 19 + [3.0, 99.0], [5.0] * 19 + [2.0, 1.0]) == pytest.approx(1 / 22)       # 20 steps at most
    assert isnan(difference([], [1.0]))


def test_the_plain_run_must_work(plain):
    with pytest.raises(UsageError, match=r"^the run as it was given cannot be tried: no plugin is called 'nothing'"):
        tune(plain, cross_entropy, adamw, loader(), plugins=["nothing"])


@pytest.mark.parametrize(("changes", "message"), [
    ({"seconds": 0}, "tune: seconds is above 0, not 0"), ({"out": "a"}, "tune takes no out: it trains copies"),
    ({"train": iter([1])}, "tune reads the training data more than once; pass a list or a DataLoader"),
    ({"train": []}, "train gave no batches"),
])
def test_wrong_arguments_are_refused(plain, changes, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        tune(**{"model": plain, "loss_fn": cross_entropy, "optimizer": adamw, "train": loader()} | changes)


@pytest.mark.parametrize(("given", "tried"), [([], True), (["prefetch"], False)])
def test_copying_in_advance_is_tried_on_a_gpu_with_the_fastest_loader(plain, trials, groups, monkeypatch, given, tried):
    shown = trials[1]
    groups()
    monkeypatch.setattr(choices.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(search, "find_device", lambda device, model: torch.device("cuda"))
    shown |= {"as given": 1e9, "as given with the data": 100.0, "workers=2": 200.0, "workers=1": 90.0, "workers=2 + prefetch": 300.0}
    found = tune(plain, cross_entropy, adamw, loader(), plugins=given)
    assert (found.num_workers, found.plugins) == (2, ["prefetch"] if tried else [])


# What may be tried.

def groups_of(device, **arguments):
    given = {"model": nn.Conv2d(1, 1, 1), "optimizer": adamw, "plugins": []} | arguments
    return {str(choice) for group in possible_choices(given, torch.device(device)) for choice in group}


def test_on_a_gpu_there_is_more_to_try_than_on_a_cpu(monkeypatch):
    monkeypatch.setattr(choices.os, "cpu_count", lambda: 8)
    both = {"fused=true", "foreach=true", "amp:dtype=bfloat16", "channels_last", "compile", "split:into=2",
            "compile:mode=max-autotune-no-cudagraphs"}
    assert groups_of("cpu") == both | {"threads=8", "threads=4"}
    assert groups_of("cuda") == both | {"cudagraph fused=true", "amp:dtype=float16", "cudnn_benchmark=true", "matmul=high",
                                        "compile:mode=reduce-overhead"}


def test_what_the_run_has_already_is_not_tried():
    given = ["amp:dtype=float16", "channels_last", "compile", "split"]
    assert not any(name in str(groups_of("cuda", plugins=given)) for name in ("amp", "channels_last", "compile", "split"))
    assert not any("amp" in name for name in groups_of("cuda", plugins=["bf16"]))


def test_memory_formats_are_tried_for_images_only():
    assert not {"channels_last", "cudnn_benchmark=true"} & groups_of("cuda", model=nn.Linear(1, 1))


@pytest.mark.parametrize(("factory", "expected"), [
    (torch.optim.SGD, True), (partial(torch.optim.SGD, lr=0.1), True), (partial(torch.optim.SGD, lr=0.1, foreach=True), False),
    (torch.optim.LBFGS, False), (lambda groups: torch.optim.SGD(groups, lr=0.1), False), ({"a": torch.optim.SGD}, False),
    (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), False),
])
def test_an_optimizer_is_made_fused_where_its_class_is_known_and_the_user_has_not_decided(factory, expected):
    assert supported(factory, "fused") == expected
