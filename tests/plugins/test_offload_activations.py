"""The plugin offload_activations: the same run to the bit; activations are copied, and parameters are not."""
import pytest
import torch
from torch import nn

from loopctl.plugins import offload_activations
from loopctl.testing import tiny_run
from loopctl.testing.comparison import first_difference, run_result


class Copies(torch.autograd.graph.saved_tensors_hooks):
    """What stands for save_on_cpu, with copies on a CPU too, and records what is copied."""

    copied: list = []

    def __init__(self, pin_memory=False):
        def pack(tensor):
            self.copied.append(tensor.shape)
            return tensor.device, tensor.clone()
        super().__init__(pack, lambda packed: packed[1])


@pytest.fixture
def copied(monkeypatch):
    """The shapes of what is copied."""
    monkeypatch.setattr(offload_activations, "save_on_cpu", Copies)
    monkeypatch.setattr(Copies, "copied", [])
    return Copies.copied


@pytest.mark.parametrize("others", [[], ["split:into=2", "accumulate:every=2"], ["amp"], ["sam"], ["ema", "swa:start=50%"],
                                    ["activation_checkpointing:modules=*"], ["activation_checkpointing:modules=*,save=addmm"], ["bf16"]], ids=str)
@pytest.mark.compares(use="offload_activations", technique="activations in the host's memory", source="torch.autograd.graph.save_on_cpu", tolerance="to the bit")
def test_the_run_is_the_same_to_the_bit(copied, others):
    plain, offloaded = tiny_run(*others), tiny_run("offload_activations", *others)
    assert not first_difference(run_result(plain, ()), run_result(offloaded, ()))
    assert copied


def test_parameters_are_not_copied_and_evaluation_copies_nothing(copied):
    """Reported of save_on_cpu: it copies the weights too, which are on the device anyway."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 50, bias=False), nn.Tanh(), nn.Linear(50, 3, bias=False))
    tiny_run("offload_activations", model=net, epochs=1)
    assert copied
    assert not {(50, 6), (6, 50), (3, 50), (50, 3)} & {tuple(shape) for shape in copied}
    assert {shape[0] for shape in copied if shape} == {8, 5}            # of the batches; the classes of a batch are copied too


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_takes_less_memory_of_a_gpu():
    def peak(*plugins):
        torch.manual_seed(0)
        net = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(512, 512), nn.Tanh())], nn.Linear(512, 3))
        batches = [(torch.randn(8192, 512), torch.randint(0, 3, (8192,)))] * 2
        torch.cuda.reset_peak_memory_stats()
        run = tiny_run(*plugins, model=net, train=batches, valid=None, epochs=1, device="cuda")
        return torch.cuda.max_memory_allocated(), run

    (before, plain), (after, offloaded) = peak(), peak("offload_activations")
    assert after < before / 2
    assert not first_difference(run_result(plain, ()), run_result(offloaded, ()))
