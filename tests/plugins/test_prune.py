"""prune against torch.nn.utils.prune in a plain loop, and Zhu and Gupta's schedule."""
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.prune import Prune
from loopctl.testing import tiny_run

cross_entropy = nn.CrossEntropyLoss()
LAYERS = (0, 4)         # the linear layers of the fixture `net`


def shares(amount, first, last, every):
    """The share of zeros by the step before which it is reached: arXiv:1710.01878, equation 1, with an initial share of 0."""
    return {step: amount + (0 - amount) * (1 - (step - first) / (last - first)) ** 3
            for step in sorted({*range(first, last, every), last})}


def by_hand(model, optimizer, batches, plan, scope, epochs=2, clip=None):
    """Prune with torch's own functions, which keep each weight in two tensors, in a plain loop; return the shares of zeros."""
    step, counts, found = 0, {}, []
    modules, parameters = [model[number] for number in LAYERS], list(model.parameters())        # in an order that pruning keeps
    torch.manual_seed(1)
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            if step in plan:
                for module in modules:          # else torch would rank the weights before the last update, by which it computed `weight`
                    for hook in module._forward_pre_hooks.values():
                        hook(module, None)
                if scope == "global":
                    total = sum(module.weight.numel() for module in modules)
                    more = round(plan[step] * total) - counts.get(None, 0)
                    counts[None] = counts.get(None, 0) + more
                    prune.global_unstructured([(module, "weight") for module in modules], prune.L1Unstructured, amount=more)
                else:
                    for module in modules:
                        more = round(plan[step] * module.weight.numel()) - counts.get(module, 0)
                        counts[module] = counts.get(module, 0) + more
                        prune.l1_unstructured(module, "weight", amount=more)
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            if clip:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            step += 1
        found.append(sum((module.weight == 0).sum().item() for module in modules) / sum(module.weight.numel() for module in modules))
    for module in modules:
        prune.remove(module, "weight")
    return found


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3), partial(torch.optim.AdamW, lr=0.01)], ids=["sgd", "adamw"])
@pytest.mark.compares(use="prune", technique="magnitude pruning along a cubic schedule (arXiv:1710.01878)", source="torch.nn.utils.prune.l1_unstructured", tolerance="to the bit")
def test_equals_torchs_pruning_in_a_plain_loop_to_the_bit(net, batches, clone, scope, optimizer):
    other = clone(net)
    found = by_hand(other, optimizer(other.parameters()), batches, shares(0.8, 2, 12, 4), scope, clip=0.5)
    run = fit(net, cross_entropy, optimizer, batches, epochs=2, seed=1,
              plugins=["clip:max_norm=0.5", Prune(0.8, scope=scope, start="2st", until="12st", every="4st")])
    pruned = other.state_dict()         # `remove` moves a weight behind the bias
    assert net.state_dict().keys() == pruned.keys()
    for name, value in net.state_dict().items():
        assert torch.equal(value, pruned[name]), name
    assert [row["sparsity"] for row in run.history] == pytest.approx(found)


def test_the_share_follows_the_cubic_schedule_and_pruned_weights_stay_zero(net, batches, sgd):
    seen, zeros = {}, [set(), set()]

    class Watch:
        @hookimpl
        def after_step(self, run: Run):
            seen[run.attempts - 1] = (run.model[4].weight == 0).sum().item() / 48
            now = {tuple(place) for place in (run.model[4].weight == 0).nonzero().tolist()}
            assert zeros[0] <= now
            zeros[0] = now

    fit(net, cross_entropy, sgd, batches, epochs=4, plugins=[Watch(), "prune:amount=0.75,start=1ep,until=3ep,every=4st"], seed=1)
    expected = {8: 0, 12: 0.75 * (1 - 0.75**3), 16: 0.75 * (1 - 0.5**3), 20: 0.75 * (1 - 0.25**3), 24: 0.75}
    for step, share in seen.items():
        reached = max((at for at in expected if at <= step), default=8)
        assert share == round(expected[reached] * 48) / 48, step


def test_without_an_interval_between_start_and_until_all_is_pruned_at_once(net, batches, sgd):
    seen = []

    class Watch:
        @hookimpl
        def after_step(self, run: Run):
            seen.append((run.model[0].weight == 0).sum().item())

    fit(net, cross_entropy, sgd, batches, plugins=["prune:amount=0.5,start=3st,until=3st,patterns=0.weight", Watch()], seed=1)
    assert seen == [0, 0, 0, *[48] * 5]
    assert not (net[4].weight == 0).any()


@pytest.mark.parametrize("average", ["ema:decay=0.9", "swa:start=1st"])
@pytest.mark.parametrize("order", [1, -1])
def test_averages_have_the_zeros_when_they_are_evaluated_saved_and_final(net, batches, valid, sgd, tmp_path, average, order):
    evaluated = []

    class Watch:
        @hookimpl(wrapper=True)
        def evaluate(self, run: Run):
            handle = run.model.register_forward_pre_hook(lambda module, _: evaluated.append((module[0].weight == 0).sum().item()))
            try:
                return (yield)
            finally:
                handle.remove()

    plugins = [average, "prune:amount=0.5,until=12st,every=1st"][::order]
    fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=[*plugins, "checkpoint:monitor=sparsity,mode=max", Watch()], seed=1, out=tmp_path)
    assert evaluated[-1] == 48
    assert (net[0].weight == 0).sum() == 48
    assert (load_file(tmp_path / "checkpoints" / "best.safetensors")["0.weight"] == 0).sum() == 48


@pytest.mark.parametrize("order", [1, -1])
def test_weights_of_an_earlier_evaluation_get_the_zeros_when_they_are_restored(net, batches, valid, sgd, order):
    stop = "early_stopping:patience=2,min_delta=9,restore_best=true"
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=[stop, "prune:amount=0.5,until=12st,every=1st"][::order], seed=1)
    assert run.stop
    assert (net[0].weight == 0).sum() == 48


def test_batchnorm_statistics_of_an_average_are_those_of_the_pruned_average(net, batches, valid, sgd, clone):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=["swa:start=1st", "prune:amount=0.5,until=20st,every=1st"], seed=1)
    again = clone(net)
    torch.optim.swa_utils.update_bn([input for input, _ in batches], again)
    assert run.step == 24
    torch.testing.assert_close(net[1].running_mean, again[1].running_mean)
    torch.testing.assert_close(net[1].running_var, again[1].running_var)


@pytest.mark.parametrize("others", [[], ["amp:dtype=float16", "accumulate:every=2"]], ids=["alone", "amp"])
def test_a_resumed_run_has_the_same_bits_and_names(net, batches, sgd, clone, same, tmp_path, others):
    class Interrupt:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == 7:
                raise KeyboardInterrupt

    resumed, whole, names = clone(net), clone(net), net.state_dict().keys()
    plugins = ["prune:amount=0.7,start=2st,until=90%,every=3st", *others]
    run = fit(whole, cross_entropy, sgd, batches, epochs=4, plugins=plugins, seed=1)
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, sgd, batches, epochs=4, plugins=["checkpoint:every_steps=3", *plugins, Interrupt()], seed=1, out=tmp_path)
    assert torch.load(tmp_path / "checkpoints" / "step-00000006.pt")["model"].keys() == names
    again = fit(resumed, cross_entropy, sgd, batches, epochs=4, plugins=["checkpoint:every_steps=3", *plugins], seed=1, resume=tmp_path, out=tmp_path)
    same(resumed, whole)
    assert again.history == run.history
    assert (whole[0].weight == 0).sum() == round(0.7 * 96)


def test_micro_batches_and_parts_of_batches_prune_as_whole_batches(plain, batches, sgd, clone, same):
    halves = [(part, label) for input, target in batches[:4] for part, label in zip(input.split(4), target.split(4), strict=True)]
    models = []
    for data, others in ((batches[:4], []), (halves, ["accumulate:every=2"]), (batches[:4], ["split:into=2"])):
        models.append(clone(plain))
        fit(models[-1], cross_entropy, sgd, data, epochs=3, plugins=[*others, "prune:amount=0.5,every=2st"], seed=1)
    for model in models[1:]:
        same(model, models[0], 1e-5)            # sums are added in another order
        assert torch.equal(model[0].weight == 0, models[0][0].weight == 0)


def test_images_in_the_channels_last_format_are_pruned_alike(clone, same):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 3))
    data, other = [(torch.randn(4, 3, 4, 4), torch.randint(0, 3, (4,)))] * 4, clone(model)
    for one, others in ((model, []), (other, ["channels_last"])):
        fit(one, cross_entropy, partial(torch.optim.SGD, lr=0.01), data, epochs=2, plugins=[*others, "prune:amount=0.5"])
        assert (one[0].weight == 0).sum() == 108
    same(model, other, 1e-5)                    # convolutions add in another order


@pytest.mark.parametrize(("options", "message"), [
    ("amount=0", "amount is above 0 and below 1, not 0"), ("amount=1", "amount is above 0 and below 1, not 1"),
    ("amount=0.5,until=100%", "prune: until=100% is not before the run's end, so the amount would not be reached; choose an earlier one"),
    ("amount=0.5,start=1ep,until=2st", "until=2st is before start=1ep; choose a later one"),
    ("amount=0.5,patterns=9.*", r"prune: no parameter matches '9.\*'"),
])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        tiny_run(f"prune:{options}")


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(UsageError, match="weights are pruned by one schedule"):
        tiny_run("prune:amount=0.5", "prune:amount=0.2")
    with pytest.raises(UsageError, match="the weights are sharded, so the smallest are not known; use ddp in place of fsdp"):
        tiny_run("fsdp", "prune:amount=0.5")
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6))
    with pytest.raises(UsageError, match="the model has no linear or convolutional layer; name the parameters"):
        tiny_run("prune:amount=0.5", model=norm)
