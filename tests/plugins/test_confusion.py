"""The plugin confusion: its file, its part of the report, and what it refuses."""
import base64
import csv
import re
from io import BytesIO

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import Run, UsageError, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()


class Named(TensorDataset):
    classes = ["<cat>", "dog", "eel"]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    return Named(torch.rand(40, 3, 4, 5, generator=generator), torch.randint(0, 3, (40,), generator=generator))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(60, 3))


def table(file):
    with file.open() as stream:
        head, *rows = csv.reader(stream)
    return head, [[int(value) for value in row[1:]] for row in rows]


def by_hand(model, data):
    inputs, targets = data.tensors
    counts = [[0] * 3 for _ in range(3)]
    with torch.no_grad():
        for true, predicted in zip(targets.tolist(), model.eval()(inputs).argmax(1).tolist(), strict=True):
            counts[true][predicted] += 1
    return counts


def test_the_file_has_the_matrix_of_the_last_evaluation(model, images, sgd, tmp_path):
    fit(model, cross_entropy, sgd, DataLoader(images, 8), DataLoader(images, 16), epochs=3, plugins=["confusion"], out=tmp_path)
    assert table(tmp_path / "confusion.csv") == (["true", "<cat>", "dog", "eel"], by_hand(model, images))


def test_the_report_shows_the_matrix_and_the_worst_mistakes_with_their_pictures(model, images, sgd, tmp_path):
    fit(model, cross_entropy, sgd, DataLoader(images, 8), DataLoader(images, 16), plugins=["report", "confusion:worst=2"], out=tmp_path)
    page = (tmp_path / "report.html").read_text()
    cells = [int(count) for count in re.findall(r'<span class="(?:right|wrong)"[^>]*>(\d+)</span>', page)]
    assert cells == [count for row in by_hand(model, images) for count in row]
    assert "<cat>" not in page
    inputs, targets = images.tensors
    with torch.no_grad():
        scores = model.eval()(inputs)
    losses = torch.where(scores.argmax(1) != targets, nn.functional.cross_entropy(scores, targets, reduction="none"), -1.0)
    worst = losses.topk(2).indices.tolist()
    assert [int(index) for index in re.findall(r", sample (\d+)</figcaption>", page)] == worst
    pictures = [Image.open(BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    for picture, index in zip(pictures, worst, strict=True):
        image = inputs[index] - inputs[index].min()
        expected = (image / image.max() * 255).round().byte().movedim(0, -1)
        assert (picture.mode, picture.size) == ("RGB", (5, 4))
        assert picture.tobytes() == expected.contiguous().numpy().tobytes()


def test_several_validation_sets_have_a_file_each(model, images, sgd, tmp_path):
    first, second = Named(*images[:10]), Named(*images[10:])
    fit(model, cross_entropy, sgd, DataLoader(images, 8), {"clean": DataLoader(first, 4), "noisy": DataLoader(second, 4)},
        plugins=["confusion", "report"], out=tmp_path)
    assert table(tmp_path / "confusion_clean.csv")[1] == by_hand(model, first)
    assert table(tmp_path / "confusion_noisy.csv")[1] == by_hand(model, second)
    assert "Confusion matrix of noisy" in (tmp_path / "report.html").read_text()


def test_of_averaged_weights_it_is_the_matrix_of_the_averages(model, images, sgd, tmp_path):
    fit(model, cross_entropy, sgd, DataLoader(images, 8), DataLoader(images, 16), epochs=2, plugins=["confusion", "ema:decay=0.99"], out=tmp_path)
    assert table(tmp_path / "confusion.csv")[1] == by_hand(model, images)          # at the end the model has the averages


def test_of_many_classes_the_report_has_the_pairs_that_are_confused_most(sgd, tmp_path):
    data = [(torch.eye(40), torch.arange(40).roll(-1))]
    model = nn.Linear(40, 40)
    with torch.no_grad():
        model.weight.copy_(9 * torch.eye(40))
    fit(model, cross_entropy, lambda groups: torch.optim.SGD(groups, lr=0.0), data, data, plugins=["confusion", "report"], out=tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Of 40 classes, the pairs that are confused most" in page
    found = re.findall(r"<b>(\d+) taken for (\d+)</b>", page)
    assert len(found) == 12
    assert all(int(true) == (int(predicted) + 1) % 40 for true, predicted in found)
    assert "data:image/png" not in page                     # the inputs are no images
    assert len(table(tmp_path / "confusion.csv")[1]) == 40


def test_the_run_is_the_same_to_the_last_bit(net, batches, valid, sgd, clone, same, tmp_path):
    other = clone(net)
    runs = [fit(each, cross_entropy, sgd, batches, valid, epochs=2, plugins=plugins, seed=3, out=tmp_path) for each, plugins in ((net, []), (other, ["confusion"]))]
    same(net, other)
    assert runs[0].history == runs[1].history


class NoStep:
    @hookimpl
    def after_step(self, run: Run):
        raise AssertionError("a step was made")


@pytest.mark.parametrize(("loss_fn", "target", "message"), [
    (nn.MSELoss(), torch.rand(4, 3), "confusion: the targets are no numbers of classes, which a confusion matrix needs; leave confusion out"),
    (nn.BCEWithLogitsLoss(), torch.ones(4, 3), "confusion: the targets are no numbers of classes, which a confusion matrix needs; leave confusion out"),
])
def test_a_run_without_classes_is_refused_before_the_first_update(loss_fn, target, message, sgd, tmp_path):
    data = [(torch.rand(4, 6), target)]
    with pytest.raises(UsageError) as error:
        fit(nn.Linear(6, 3), loss_fn, sgd, data, data, plugins=["confusion", NoStep()], out=tmp_path)
    assert str(error.value) == message


def test_wrong_use_is_refused(net, batches, valid, sgd, tmp_path):
    for plugins, data, message in (
            (["confusion"], None, "there is no validation data, from which the matrix would be; leave confusion out"),
            (["confusion:worst=-1"], valid, "worst is at least 0, not -1"),
            (["confusion", "confusion"], valid, "confusion.2 writes to path=confusion.csv too; choose another path in one of them")):
        with pytest.raises(UsageError) as error:
            fit(net, cross_entropy, sgd, batches, data, plugins=plugins, out=tmp_path)
        assert str(error.value) == f"confusion: {message}"
    (tmp_path / "confusion.csv").write_text("precious")
    with pytest.raises(UsageError, match=r"confusion: .*confusion.csv exists and is not overwritten"):
        fit(net, cross_entropy, sgd, batches, valid, plugins=["confusion"], out=tmp_path)


def of_two_processes(out):
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.rand(40, 3, 4, 5, generator=generator), torch.randint(0, 3, (40,), generator=generator))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
    fit(model, cross_entropy, lambda groups: torch.optim.SGD(groups, lr=0.1), DataLoader(data, 8), DataLoader(data, 7),
        plugins=["ddp", "confusion", "report"], out=out)
    return by_hand(model, data)


def test_two_processes_count_all_of_the_data_once(ranks, tmp_path):
    expected = ranks(2, of_two_processes, tmp_path)[0]
    assert table(tmp_path / "confusion.csv")[1] == expected
    assert sum(map(sum, expected)) == 40
    assert "Worst mistakes" in (tmp_path / "report.html").read_text()
