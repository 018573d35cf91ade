"""The plugin grad_noise, compared with the formula of arXiv:1511.06807 in a plain loop."""
from random import Random

import pytest
import torch
from torch import nn

from loopctl import Run, fit, hookimpl
from loopctl.plugins.grad_noise import GradNoise

cross_entropy = nn.CrossEntropyLoss()


def draw(gradients, seed, step):
    """Standard normal noise for each gradient: of the seed and the number of the step alone."""
    generator = torch.Generator().manual_seed(Random(f"grad_noise {seed} {step}  0").getrandbits(63))
    return [torch.empty_like(gradient).normal_(generator=generator) for gradient in gradients]


def by_hand(model, optimizer, batches, eta, gamma, epochs=2, every=1, max_norm=None):
    """Equation 1 of the paper: noise of the variance eta / (1 + t)^gamma in step t, after clipping."""
    torch.manual_seed(1)
    model.train()
    step = 0
    for _ in range(epochs):
        for start in range(0, len(batches), every):
            group = batches[start:start + every]
            size = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            for input, target in group:
                loss = cross_entropy(model(input), target)
                (loss * (len(target) / size) if len(group) > 1 else loss).backward()
            if max_norm:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            gradients = [parameter.grad for parameter in model.parameters()]
            for gradient, noise in zip(gradients, draw(gradients, 1, step), strict=True):
                gradient.add_(noise, alpha=(eta / (1 + step) ** gamma) ** 0.5)
            optimizer.step()
            step += 1


@pytest.mark.parametrize(("plugins", "options"), [
    (["grad_noise"], {}), (["grad_noise:eta=0.3,gamma=0"], {"eta": 0.3, "gamma": 0}), (["grad_noise", "accumulate:every=3"], {"every": 3}),
    (["grad_noise:eta=1", "clip:max_norm=0.1"], {"eta": 1, "max_norm": 0.1}), (["clip:max_norm=0.1", "grad_noise:eta=1"], {"eta": 1, "max_norm": 0.1})], ids=str)
@pytest.mark.compares(use="grad_noise", technique="Gaussian noise whose variance falls", source="arXiv:1511.06807", tolerance="to the bit")
def test_equals_the_formula_of_the_paper_to_the_bit(net, batches, clone, same, sgd, plugins, options):
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=plugins, seed=1)
    by_hand(other, sgd(other.parameters()), batches, **{"eta": 0.01, "gamma": 0.55} | options)
    same(net, other)


class Noise:
    """Records what grad_noise adds in each step."""

    def __init__(self):
        self.added = []

    @hookimpl(wrapper=True)
    def grads_ready(self, run: Run):
        before = [parameter.grad.clone() for parameter in run.model.parameters()]
        result = yield
        self.added.append(torch.cat([(parameter.grad - was).flatten() for parameter, was in zip(run.model.parameters(), before, strict=True)]))
        return result


def test_the_noise_has_the_mean_zero_the_variance_of_the_formula_and_differs_in_each_step(sgd):
    noise, data = Noise(), [(torch.randn(4, 200), torch.randint(0, 100, (4,)))] * 4
    fit(nn.Linear(200, 100), cross_entropy, sgd, data, plugins=[noise, "grad_noise:eta=0.5,gamma=2"], seed=1)
    for step, added in enumerate(noise.added):
        variance = 0.5 / (1 + step) ** 2
        assert added.var().item() == pytest.approx(variance, rel=0.05)           # of 20,100 numbers: six standard errors
        assert abs(added.mean().item()) < 5 * (variance / len(added)) ** 0.5
        assert abs(torch.corrcoef(torch.stack((added, noise.added[step - 1])))[0, 1]) < 0.04 or not step


def test_the_noise_is_that_of_unscaled_gradients(plain, batches, sgd):
    """The sums differ from the noise by rounding only."""
    added = []
    for plugins in (["grad_noise:eta=1"], ["grad_noise:eta=1", "amp:dtype=float16"]):
        noise = Noise()
        fit(plain, cross_entropy, sgd, batches[:3], plugins=[noise, *plugins], seed=1)
        added.append(torch.stack(noise.added))
    torch.testing.assert_close(*added, rtol=0, atol=1e-5)


def test_without_a_seed_the_noise_follows_the_generator_of_torch(plain, batches, clone, same, sgd):
    models = [clone(plain) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(seed)
        fit(model, cross_entropy, sgd, batches, plugins=["grad_noise"])
    same(*models[:2])
    assert not torch.equal(models[0][0].weight, models[2][0].weight)


def test_a_resumed_run_has_the_noise_of_its_checkpoint_without_a_seed_too(plain, batches, clone, same, sgd, tmp_path):
    other = clone(plain)
    torch.manual_seed(5)
    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["grad_noise"])
    torch.manual_seed(5)
    fit(clone(other), cross_entropy, sgd, batches, epochs=1, plugins=["grad_noise", "checkpoint"], out=tmp_path)
    torch.manual_seed(6)
    fit(other, cross_entropy, sgd, batches, epochs=2, plugins=["grad_noise", "checkpoint"], out=tmp_path, resume=tmp_path)
    same(plain, other)


@pytest.mark.parametrize("options", [{"eta": -1.0}, {"gamma": -0.1}, {"eta": float("nan")}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is at least 0, not"):
        GradNoise(**options)
