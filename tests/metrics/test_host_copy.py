"""Asynchronous copies of tensors to the host."""
import pytest
import torch

from loopctl.metrics.host_copy import HostCopy, LatestValue
from tests.conftest import sync_debug_mode


def test_a_copy_of_a_cpu_tensor_arrives_at_once():
    copy = HostCopy(torch.tensor([1.0, 2.0]))
    assert copy.arrived
    assert copy.wait().tolist() == [1.0, 2.0]


def test_a_copy_does_not_change_when_the_tensor_is_filled_in_place():
    value = torch.tensor(1.0)
    copy = HostCopy(value)
    value.fill_(2.0)
    assert copy.wait().item() == 1.0


def test_a_copy_from_another_device_does_not_arrive_before_wait():
    assert not HostCopy(torch.empty((), device="meta")).arrived


def test_the_latest_value_of_a_cpu_tensor_is_its_own():
    assert LatestValue().update(torch.tensor(0.5)) == LatestValue().update(0.5) == 0.5


class FakeEvent:
    """Stands in for torch.cuda.Event; `synchronize` completes it."""

    completed = False

    def query(self):
        return self.completed

    def synchronize(self):
        self.completed = True


def test_a_copy_with_an_event_arrives_when_the_event_is_completed():
    copy = HostCopy(torch.tensor(3.0))
    copy.event = event = FakeEvent()
    assert not copy.arrived
    assert copy.wait().item() == 3.0
    assert event.completed
    assert copy.arrived


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_latest_value_of_a_cuda_tensor_arrives_without_waiting():
    latest = LatestValue()
    with sync_debug_mode() as set_mode:
        set_mode("error")
        latest.update(torch.full((), 0.5, device="cuda"))
    torch.cuda.synchronize()
    assert latest.update(torch.full((), 0.7, device="cuda")) == 0.5
