"""Weighted means of losses and metrics."""
import pytest
import torch

from loopctl.data.batch import target_of
from loopctl.metrics.meters import Mean, Meters


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("kind", ["numbers", "tensors", "tensor weights"])
def test_mean_is_the_weighted_mean_of_numbers_and_tensors(count, kind):
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.rand(count, generator=generator), torch.randint(1, 9, (count,), generator=generator)
    mean = Mean()
    for value, weight in zip(values, weights, strict=True):
        mean.add(value.item() if kind == "numbers" else value, weight if kind == "tensor weights" else weight.item())
    expected = (values.double() * weights).sum() / weights.sum()
    assert mean.result().item() == pytest.approx(expected.item(), rel=1e-12)      # summed in another order
    assert mean.result().item() == mean.result().item()
    assert len(mean.values) < 256


def test_half_precision_losses_are_summed_in_double():
    mean = Mean()
    for _ in range(1000):
        mean.add(torch.tensor(0.1, dtype=torch.bfloat16), 1)
    assert mean.result().item() == torch.tensor(0.1, dtype=torch.bfloat16).item()


@pytest.mark.parametrize(("batch", "target"), [((1, 2), 2), ([1, 2], 2), ({"x": 1, "labels": 2}, 2), ({"x": 1}, {"x": 1}), (7, 7)])
def test_metrics_get_the_target_of_a_batch_or_the_whole_batch(batch, target):
    seen = []
    meters = Meters({"m": lambda output, target: seen.append(target) or 1.0}, "train_")
    meters.observe(None, target_of(batch), 1)
    assert seen == [target]


def test_a_metric_may_return_a_python_number():
    meters = Meters({"m": lambda output, target: 0.25}, "val_")
    meters.loss.add(1.0, 2)
    meters.observe(None, None, 2)
    assert {name: value.item() for name, value in meters.result().items()} == {"val_loss": 1.0, "val_m": 0.25}
