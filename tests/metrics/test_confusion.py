"""The confusion matrix and the worst mistakes, against the same computed by hand from all outputs at once."""
import math

import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch.nn import functional

from loopctl import UsageError
from loopctl.metrics.confusion import MAX_SIDE, ConfusionMatrix, merged


def outputs(samples=200, classes=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, classes, generator=generator), torch.randint(0, classes, (samples,), generator=generator)


def in_batches(scores, targets, inputs, size=32, worst=12):
    found = ConfusionMatrix(worst)
    for part in zip(scores.split(size), targets.split(size), inputs.split(size), strict=True):
        found.update(part[0], part[1], (part[2], part[1]))
    return found


@pytest.mark.compares(use="confusion", technique="confusion matrix", source="sklearn.metrics.confusion_matrix", tolerance="to the bit")
def test_the_matrix_is_that_of_scikit_learn():
    scores, targets = outputs()
    counts, _ = merged([in_batches(scores, targets, scores).on_host()], 12)
    assert counts == confusion_matrix(targets, scores.argmax(1)).tolist()


def test_the_worst_are_the_mistakes_with_the_largest_cross_entropy():
    scores, targets = outputs()
    images = torch.rand(200, 3, 5, 4)
    _, found = merged([in_batches(scores, targets, images).on_host()], 12)
    losses = functional.cross_entropy(scores, targets, reduction="none")
    wrong = (scores.argmax(1) != targets).nonzero().flatten()
    expected = sorted(wrong.tolist(), key=lambda index: -losses[index].item())[:12]
    assert [each.index for each in found] == expected
    assert [each.loss for each in found] == losses[expected].tolist()
    assert [(each.true, each.predicted) for each in found] == [(targets[index].item(), scores[index].argmax().item()) for index in expected]
    assert [each.probability for each in found] == pytest.approx(scores.softmax(1).amax(1)[expected].tolist())       # exp of log_softmax
    assert all(torch.equal(each.picture, images[index]) for each, index in zip(found, expected, strict=True))


def test_memory_stays_within_bounds():
    scores, targets = outputs(640)
    found = in_batches(scores, targets, torch.rand(640, 1, 300, 200))
    assert (found.rows.shape, found.pictures.shape) == ((12, 5), (12, 1, MAX_SIDE, 85))
    with pytest.raises(UsageError, match=r"^the model has 1,001 outputs, and a matrix of more than 1,000 classes is not kept"):
        in_batches(torch.rand(4, 1001), torch.arange(4), torch.rand(4))


def test_parts_of_several_processes_are_one_pass():
    scores, targets = outputs()
    images = torch.rand(200, 1, 4, 4)
    whole = merged([in_batches(scores, targets, images).on_host()], 12)
    parts = [in_batches(scores[start::2], targets[start::2], images[start::2]).on_host() for start in (0, 1)]
    both = merged([*parts, (None, None, None)], 12)         # the last one had no batch
    assert both[0] == whole[0]
    assert [each.loss for each in both[1]] == [each.loss for each in whole[1]]


def test_targets_that_are_no_class_do_not_count():
    scores, targets = outputs(8, 3)
    targets[2] = -100
    counts, found = merged([in_batches(scores, targets, scores).on_host()], 12)
    known = targets >= 0
    assert counts == confusion_matrix(targets[known], scores.argmax(1)[known], labels=range(3)).tolist()
    assert 2 not in [each.index for each in found]


def test_pixels_of_a_segmentation_are_counted():
    scores, targets = torch.randn(4, 3, 5, 5), torch.randint(0, 3, (4, 5, 5))
    counts, found = merged([in_batches(scores, targets, torch.rand(4, 3, 5, 5)).on_host()], 12)
    assert counts == confusion_matrix(targets.flatten(), scores.argmax(1).flatten(), labels=range(3)).tolist()
    assert found == []


def test_a_loss_that_is_not_finite_is_the_worst():
    scores, targets = outputs(8, 3)
    scores[5] = math.nan
    targets[5] = 1
    _, found = merged([in_batches(scores, targets, scores).on_host()], 12)
    assert (found[0].index, found[0].loss) == (5, math.inf)


def test_images_of_other_shapes_in_a_later_batch_leave_the_pictures_out():
    scores, targets = outputs(8, 3)
    found = ConfusionMatrix(4)
    for start, side in ((0, 4), (4, 6)):
        found.update(scores[start:start + 4], targets[start:start + 4], (torch.rand(4, 1, side, side), targets))
    assert found.pictures is None
    assert len(merged([found.on_host()], 4)[1]) > 0


@pytest.mark.parametrize(("output", "target"), [
    (torch.rand(4, 1), torch.rand(4, 1)), (torch.rand(4), torch.rand(4)), (torch.rand(4, 3), torch.rand(4, 3)),
    (torch.rand(4, 3), torch.rand(4)), ("text", torch.zeros(4)),
], ids=["regression", "one dimension", "probabilities", "a number each", "text"])
def test_what_has_no_classes_is_refused(output, target):
    with pytest.raises(UsageError, match=r"^(the targets are no numbers of classes|a matrix of classes: )"):
        ConfusionMatrix(4).update(output, target, (output, target))
