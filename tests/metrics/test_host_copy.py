"""Values on their way to the host: what has arrived, and what is waited for."""
import pytest
import torch

from loopctl.metrics.host_copy import HostCopy, LatestValue


def test_a_value_on_the_cpu_has_arrived():
    copy = HostCopy(torch.tensor([1.0, 2.0]))
    assert copy.arrived
    assert copy.wait().tolist() == [1.0, 2.0]


def test_the_copy_keeps_its_value_when_the_tensor_is_filled_in_place():
    value = torch.tensor(1.0)
    copy = HostCopy(value)
    value.fill_(2.0)
    assert copy.wait().item() == 1.0


def test_a_value_on_another_device_has_not_arrived():
    assert not HostCopy(torch.empty((), device="meta")).arrived


def test_the_latest_value_on_the_cpu_is_the_value():
    assert LatestValue().update(torch.tensor(0.5)) == LatestValue().update(0.5) == 0.5


class Event:
    """An event of CUDA that has happened when it is told."""

    happened = False

    def query(self):
        return self.happened

    def synchronize(self):
        self.happened = True


def test_a_copy_with_an_event_has_arrived_when_that_has_happened():
    copy = HostCopy(torch.tensor(3.0))
    copy.event = event = Event()
    assert not copy.arrived
    assert copy.wait().item() == 3.0
    assert event.happened
    assert copy.arrived


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_latest_value_on_cuda_is_not_waited_for_and_arrives():
    latest = LatestValue()
    torch.cuda.set_sync_debug_mode("error")
    try:
        latest.update(torch.full((), 0.5, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert latest.update(torch.full((), 0.7, device="cuda")) == 0.5
