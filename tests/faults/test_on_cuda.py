"""Some of the faults again on a GPU, where tensors have to be moved and the host does not wait."""
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from loopctl import Run, fit, hookimpl

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1)


class Weighted(nn.Module):
    """A loss function with class weights in a buffer, and a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, output, target):
        return nn.functional.cross_entropy(output * self.scale, target, self.weight)


@pytest.mark.fault(row="C", given="a loss function with a buffer and a parameter, made on the CPU, on a GPU", right="moved and trained with the model")
def test_a_loss_function_is_moved_to_the_device(plain, clone, batches, valid):
    by_hand, loss_by_hand, model, loss = clone(plain).cuda(), Weighted().cuda(), clone(plain), Weighted()
    optimizer = sgd([*by_hand.parameters(), *loss_by_hand.parameters()])
    for input, target in batches:
        optimizer.zero_grad()
        loss_by_hand(by_hand(input.cuda()), target.cuda()).backward()
        optimizer.step()
    fit(model, loss, sgd, batches, valid, device="cuda")
    assert torch.equal(loss.scale, loss_by_hand.scale)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), by_hand.parameters(), strict=True))


class TokenWeights:
    @hookimpl
    def batch_weight(self, run: Run, batch):
        return (batch[1] != -100).sum()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.fault(row="B", given="a step whose labels are all ignored, weighed by a tensor on a GPU", right="gradients of 0, and no NaN anywhere")
def test_a_step_of_weight_zero_on_the_device(plain, batches, every):
    ignored = (torch.randn(8, 6), torch.full((8,), -100))
    run = fit(plain, cross_entropy, sgd, [batches[0], ignored, batches[1], ignored, ignored], [*batches[:2], ignored], device="cuda",
              plugins=[f"accumulate:every={every}", TokenWeights()])
    assert all(parameter.isfinite().all() for parameter in plain.parameters())
    assert all(value == value for value in run.history[-1].values())


class Drawing(Dataset):
    def __len__(self):
        return 36

    def __getitem__(self, index):
        return torch.randn(6), index % 3


@pytest.mark.fault(row="H", given="accumulate on a GPU, with data that draws random numbers", right="one batch is read at a time: the loop by hand, to the bit")
def test_accumulation_reads_one_batch_at_a_time_on_a_gpu(plain, clone):
    by_hand, model = clone(plain).cuda(), clone(plain)
    optimizer = sgd(by_hand.parameters())
    torch.manual_seed(0)
    for number, (input, target) in enumerate(DataLoader(Drawing(), 4)):
        if number % 3 == 0:
            optimizer.zero_grad()
        (cross_entropy(by_hand(input.cuda()), target.cuda()) * (4 / 12)).backward()
        if number % 3 == 2:
            optimizer.step()
    fit(model, cross_entropy, sgd, DataLoader(Drawing(), 4), plugins=["accumulate:every=3"], device="cuda", seed=0)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), by_hand.parameters(), strict=True))
