"""`Data(batch_transform=...)`: batches that are changed on the device, wherever a run reads them."""
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from loopctl import Data, Run, UsageError, evaluate, fit, hookimpl
from loopctl.data.device_loader import DeviceLoader, Normalize
from loopctl.data.limits import limited, overfit
from loopctl.data.micro_batches import MicroBatches
from loopctl.data.sharding import shard_data
from loopctl.rehearsal import first_batch
from loopctl.trial_run import TrialRun

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = torch.randint(0, 256, (22, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
by_sample = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


class Mirrored(Dataset):
    """Images of uint8, mirrored at random; and what `last` makes of them."""

    def __init__(self, *last):
        self.last = v2.Compose([v2.RandomHorizontalFlip(), *last])

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return self.last(PIXELS[index]), index % 3


class Stream(IterableDataset):
    def __iter__(self):
        return ((image, 0) for image in PIXELS)


def loaders(workers=0, transform=None, **settings):
    dataset = Mirrored() if transform else Mirrored(by_sample)
    return Data(dataset, dataset, 3, (3, 5, 4), batch_transform=transform, **settings).loaders(4, workers, CPU)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(60, 8), nn.ReLU(), nn.Linear(8, 3))


def assert_equal_batches(batches, expected):
    batches, expected = list(batches), list(expected)
    assert len(batches) == len(expected) > 0
    for (image, target), (other, other_target) in zip(batches, expected, strict=True):
        assert (image.dtype, image.stride()) == (other.dtype, other.stride())
        assert torch.equal(image, other)
        assert torch.equal(target, other_target)


def test_normalised_batches_equal_those_of_torchvision_per_sample_to_the_bit():
    values = torch.arange(256, dtype=torch.uint8).expand(2, 3, 7, 256)
    for images in (values, PIXELS, PIXELS.contiguous(memory_format=torch.channels_last)):
        normalised, targets = Normalize(MEAN, STD)([images, 5])
        assert torch.equal(normalised, torch.stack([by_sample(image) for image in images]))
        assert targets == 5


class Interrupt:
    @hookimpl
    def after_step(self, run: Run):
        if run.step == 3:
            raise RuntimeError("interrupted after step 3")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_has_the_same_bits_as_with_floats_per_sample_and_resumes_within_an_epoch(workers, tmp_path, same):
    def train(model, transform, *plugins, **options):
        return fit(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), *loaders(workers, transform), epochs=2,
                   seed=0, plugins=[*plugins, "checkpoint:every_steps=1"], **options)

    expected, whole, interrupted, resumed = (network() for _ in range(4))
    history = train(expected, None, out=tmp_path / "expected").history
    assert train(whole, Normalize(MEAN, STD), out=tmp_path / "whole").history == history
    with pytest.raises(RuntimeError, match="interrupted after step 3"):
        train(interrupted, Normalize(MEAN, STD), Interrupt(), out=tmp_path / "a")
    assert train(resumed, Normalize(MEAN, STD), resume=tmp_path / "a", out=tmp_path / "a").history == history
    same(whole, expected)
    same(resumed, expected)


def test_copies_of_the_loader_transform_their_batches_once():
    train, valid = loaders(transform=Normalize(MEAN, STD))
    plain, plain_valid = loaders()
    for change in (partial(limited, limit=2), partial(overfit, number=2), first_batch,
                   lambda loader: shard_data(loader, 1, 2, 3)[0]):
        for loader, other in ((train, plain), (valid, plain_valid)):
            torch.manual_seed(0)
            mine = list(change(loader))
            torch.manual_seed(0)
            assert_equal_batches(mine, change(other))


class Seen:
    """Keeps the inputs of all steps, and how their batches came."""

    def __init__(self):
        self.inputs, self.kinds = [], set()

    @hookimpl
    def before_step(self, run: Run):
        self.kinds.add(type(run.batches))
        self.inputs.extend(batch[0] for batch in run.batches)


def train(data, seen, **options):
    train, valid = data.loaders(4, 0, CPU)
    return fit(network(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), train, valid,
               plugins=[seen, "accumulate:every=2"], **options)


def test_a_stream_is_transformed_once():
    seen = Seen()
    train(Data(Stream(), Stream(), batch_transform=Normalize(MEAN, STD)), seen, steps_per_epoch=6)
    assert torch.equal(torch.cat(seen.inputs), by_sample(PIXELS))


def test_the_weights_of_micro_batches_are_known_without_reading_them():
    seen = Seen()
    train(Data(Mirrored(), None, batch_transform=Normalize(MEAN, STD)), seen)
    assert seen.kinds == {MicroBatches}


def test_steps_tried_on_a_copy_and_an_evaluation_have_transformed_batches():
    class Try:
        @hookimpl
        def train_start(self, run: Run):
            trial = TrialRun(run)
            losses.append(float(trial.step([0.1])))
            trial.close()

    losses = []
    for transform in (None, Normalize(MEAN, STD)):
        parts = loaders(transform=transform)
        fit(network(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), *parts, seed=0, plugins=[Try()], max_steps=1)
        torch.manual_seed(0)
        losses.append(evaluate(network(), parts[1], loss_fn=nn.CrossEntropyLoss())["loss"])
    assert losses[:2] == losses[2:]


def test_the_trial_of_a_last_batch_of_one_sample_has_floats():
    from loopctl.data.dataset import check_last_batch

    class LastBatch:
        @hookimpl
        def epoch_start(self, run: Run):
            check_last_batch(run, lambda batch: run.model(batch[0]))

    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    parts = Data(Mirrored(), None, 3, batch_transform=Normalize(MEAN, STD)).loaders(21, 0, CPU)
    with pytest.raises(UsageError, match="the last batch of an epoch has 1 sample, of 22 in batches of 21"):
        fit(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), *parts, plugins=[LastBatch()])


def test_images_are_kept_on_the_device_as_they_are_read(monkeypatch):
    from loopctl.data import on_device

    class Plain(Mirrored):
        def __getitem__(self, index):
            return PIXELS[index], index % 3

    monkeypatch.setattr(on_device, "free_memory", lambda device: 2 * PIXELS.numel())
    held = Data(Plain(), Plain(), 3, (3, 5, 4), "mine", on_device=True, batch_transform=Normalize(MEAN, STD))
    train, valid = held.loaders(4, 0, CPU)
    assert train.dataset.tensors[0].dtype == torch.uint8
    assert torch.equal(torch.cat([images for images, _ in valid]), by_sample(PIXELS))
    monkeypatch.setattr(on_device, "free_memory", lambda device: 2 * PIXELS.numel() - 1)
    with pytest.raises(UsageError, match="data mine: 44 samples of 3x5x4 take "):
        held.loaders(4, 0, CPU)


def test_a_transform_that_changes_the_number_of_samples_is_refused():
    train, _ = loaders(transform=lambda batch: [batch[0][:2], batch[1][:2]])
    with pytest.raises(UsageError, match="^Data: batch_transform returned 2 samples for 4; return as many as it is given$"):
        list(train)


def test_a_transform_is_refused_beside_a_loader():
    batches = DataLoader(Mirrored(), 4)
    for parts, name in (((batches, Mirrored()), "train"), ((Mirrored(), {"a": Mirrored(), "b": batches}), "valid")):
        with pytest.raises(UsageError, match=f"^Data: {name} is a loader, so batch_transform would not be used for it"):
            Data(*parts, batch_transform=Normalize(MEAN, STD))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_become_floats_on_the_gpu_and_prefetch_does_so_in_advance(workers, same):
    device, models = torch.device("cuda"), []
    for transform, plugins in ((None, []), (Normalize(MEAN, STD), []), (Normalize(MEAN, STD), ["prefetch"])):
        dataset = Mirrored() if transform else Mirrored(by_sample)
        parts = Data(dataset, dataset, 3, (3, 5, 4), batch_transform=transform).loaders(4, workers, device)
        assert not transform or (isinstance(parts[1], DeviceLoader) and all(batch[0].is_cuda for batch in parts[1]))
        models.append(network())
        fit(models[-1], nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), *parts, epochs=2, seed=0, device=device,
            plugins=plugins)
    same(models[1], models[0])
    same(models[2], models[0])
