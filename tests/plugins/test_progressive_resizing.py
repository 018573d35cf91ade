"""The plugin progressive_resizing: small images first, whole ones at the end, in training only."""
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.progressive_resizing import ProgressiveResizing

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 32, 24, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(4)]


class Sizes:
    def __init__(self):
        self.seen = []

    @hookimpl
    def after_step(self, run: Run):
        self.seen.append(tuple(run.batches[0][0].shape[-2:]))


@pytest.mark.compares(use="progressive_resizing", technique="images that grow linearly between two parts of the run", source="the loop by hand", tolerance="to the bit")
def test_equals_a_loop_that_resizes_to_the_bit(model, data, clone, same):
    """Ten epochs of four steps; the scale is 0.5 until step 20, grows for 12 steps, and is 1 in the last 8."""
    other, sizes = clone(model), Sizes()
    fit(model, cross_entropy, sgd, data, epochs=10, plugins=["progressive_resizing", sizes])
    optimizer, expected = sgd(other.parameters()), []
    for step in range(40):
        input, target = data[step % 4]
        scale = 0.5 if step < 20 else 0.5 + 0.5 * (step - 20) / 12 if step < 32 else 1
        size = [round(length * scale / 4) * 4 for length in (32, 24)]
        if size != [32, 24]:
            input = nn.functional.interpolate(input, size, mode="bilinear", antialias=True)
        expected.append(tuple(size))
        optimizer.zero_grad()
        cross_entropy(other(input), target).backward()
        optimizer.step()
    same(model, other)
    assert sizes.seen == expected
    assert len({*expected}) > 3


def test_a_crop_is_a_part_of_the_image_the_same_for_masks(data):
    """Masks are images of floating-point numbers here; both are cut at the same place."""
    cuts = []

    class Record:
        @hookimpl
        def after_step(self, run: Run):
            cuts.append(run.batches[0])

    body = nn.Conv2d(3, 3, 1)
    pairs = [(input, input.clone()) for input, _ in data]
    fit(body, nn.MSELoss(), sgd, pairs, epochs=2, seed=1, plugins=[ProgressiveResizing(mode="crop", delay_fraction=1, finetune_fraction=0), Record()])
    corners = set()
    for number, (input, mask) in enumerate(cuts):
        assert input.shape[-2:] == (16, 12)
        assert torch.equal(input, mask)
        whole = pairs[number % 4][0]
        places = [(top, left) for top in range(17) for left in range(13) if torch.equal(whole[..., top:top + 16, left:left + 12], input)]
        corners |= {*places}
        assert len(places) == 1
    assert len(corners) > 2


def test_evaluation_sees_whole_images(model, data):
    seen = []

    class Record(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, input):
            seen.append((self.training, input.shape[-1]))
            return self.body(input)

    fit(Record(model), cross_entropy, sgd, data, data, plugins=[ProgressiveResizing(delay_fraction=1, finetune_fraction=0)])
    assert {*seen} == {(True, 12), (False, 24)}


def test_with_accumulation_all_batches_of_a_step_have_one_size(model, data):
    sizes = []

    class Record:
        @hookimpl
        def after_step(self, run: Run):
            sizes.append({batch[0].shape[-1] for batch in run.batches})

    fit(model, cross_entropy, sgd, data, epochs=10, plugins=["progressive_resizing", "accumulate:every=2", Record()])
    assert all(len(size) == 1 for size in sizes)
    assert len({*map(tuple, sizes)}) > 2


def test_batches_without_images_are_refused(plain, batches):
    with pytest.raises(UsageError, match="no images, .* leave out progressive_resizing"):
        fit(plain, cross_entropy, sgd, batches, plugins=["progressive_resizing"])


@pytest.mark.parametrize(("options", "message"), [
    ({"initial_scale": 0}, "initial_scale"), ({"delay_fraction": 0.6, "finetune_fraction": 0.6}, "together at most 1"), ({"size_increment": 0}, "size_increment")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveResizing(**options)
