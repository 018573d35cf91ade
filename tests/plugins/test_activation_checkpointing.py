"""The plugin activation_checkpointing: the same run to the bit, with fewer bytes stored for the backward pass."""
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from loopctl import UsageError, fit, hookimpl
from loopctl.checkpoint.state import capture_state
from loopctl.testing import tiny_run
from loopctl.testing.comparison import first_difference, run_result
from loopctl.testing.tiny import tiny_batches


class Block(nn.Module):
    """A block with what a second computation may get wrong: dropout, BatchNorm, and a buffer that forward changes."""

    def __init__(self, spectral=False):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(16, 16)) if spectral else nn.Linear(16, 16)
        self.body = nn.Sequential(nn.BatchNorm1d(16, momentum=None), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 16))

    def forward(self, x, *, scale=1.0):
        return x + scale * self.body(self.linear(x))


def model(spectral=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), *[Block(spectral) for _ in range(4)], nn.Linear(16, 3))


def train(*plugins, net=None, **more):
    return tiny_run(*plugins, **{"model": net or model(), "train": tiny_batches(8, 8, 8, 8, 6)} | more)


def difference(one, other):
    return first_difference(run_result(one, ()), run_result(other, ()))


class CountBytes:
    """Counts the bytes that the first forward pass stores for the backward pass, without those of parameters."""

    @hookimpl(wrapper=True)
    def compute_loss(self, run):
        own = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
        stored = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                stored[tensor.untyped_storage().data_ptr()] = tensor        # kept, so that no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = yield
        if torch.is_grad_enabled():
            self.bytes = sum(tensor.untyped_storage().nbytes() for tensor in stored.values())
        return loss


OPTIONS = ["", ":every=2", ":modules=*", ":modules=1,2.body", ":save=addmm", ":save=addmm,native_batch_norm"]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_run_is_the_same_to_the_bit(options):
    assert not difference(train(), train(f"activation_checkpointing{options}"))


@pytest.mark.parametrize("others", [
    ["split:into=2", "accumulate:every=2"], ["amp"], ["amp:dtype=float16"], ["sam"], ["lr_finder:num_steps=3"], ["ema", "swa:start=50%"],
    ["freeze:patterns=1,2,until=1ep"], ["summary"], ["channels_last"], ["compile:backend=aot_eager"],
    ["compile:backend=aot_eager,per_block=true"]], ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute")            # torch.compile looks at it
def test_it_composes(others, capsys):
    assert not difference(train(*others), train("activation_checkpointing", *others))
    assert not difference(train(*others), train(*others, "activation_checkpointing"))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_policy_is_compiled_too():
    others = ["compile:backend=aot_eager"]
    assert not difference(train(*others), train("activation_checkpointing:save=addmm", *others))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_blocks_without_buffers_are_compiled_in_one_graph():
    net = model()
    for block in list(net)[1:-1]:
        block.body[0] = nn.LayerNorm(16)
    others = ["compile:backend=aot_eager,fullgraph=true"]
    assert not difference(train(*others, net=copy.deepcopy(net)), train("activation_checkpointing", *others, net=net))


def test_a_module_whose_output_depends_on_what_its_forward_changes_is_the_same():
    """spectral_norm's power iteration would otherwise be a step further in the second computation."""
    assert not difference(train(net=model(True)), train("activation_checkpointing", net=model(True)))


@pytest.mark.compares(use="activation_checkpointing", technique="blocks computed again in the backward pass", source="torch.utils.checkpoint.checkpoint", tolerance="to the bit")
def test_it_is_what_torch_does_by_hand():
    net, batches = model(), tiny_batches(8, 8)
    for block in list(net)[1:-1]:
        block.body[0], block.body[2] = nn.Identity(), nn.Dropout(0.3)       # torch alone would count batches of BatchNorm twice
    by_hand = copy.deepcopy(net)
    run = train("activation_checkpointing", net=net, train=batches, valid=None, epochs=1)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(0)
    for x, y in batches:
        optimizer.zero_grad()
        hidden = by_hand[0](x)
        for block in list(by_hand)[1:-1]:
            hidden = checkpoint(block, hidden, use_reentrant=False)
        nn.functional.cross_entropy(by_hand[-1](hidden), y).backward()
        optimizer.step()
    torch.testing.assert_close(run.model.state_dict(), by_hand.state_dict(), rtol=0, atol=0)


def test_it_stores_fewer_bytes():
    stored = {}
    for options in (None, ":save=addmm", ":every=2", ""):
        count = CountBytes()
        train(*[] if options is None else [f"activation_checkpointing{options}"], count)
        stored[options] = count.bytes
    inputs = 6 * 16 * 4         # of a block, in the last batch
    assert stored[None] > 4 * 5 * inputs
    assert stored[""] < (4 + 3) * inputs            # and what the layers around the blocks store
    assert stored[""] < stored[":every=2"] < stored[None]
    assert stored[""] < stored[":save=addmm"] < stored[None]


def test_nothing_is_renamed_and_the_model_is_as_before_after_an_error():
    net = model()
    names = [name for name, _ in net.named_modules()]

    class Look:
        @hookimpl
        def safe_point(self, run):
            assert [name for name, _ in run.model.named_modules()] == names
            assert capture_state(run)["model"].keys() == run.model.state_dict().keys()
            assert "forward" in vars(run.model[1])
            raise KeyError("stop")

    with pytest.raises(KeyError):
        train("activation_checkpointing", Look(), net=net)
    assert not any("forward" in vars(module) for module in net.modules())


def test_a_forward_method_that_was_set_on_a_module_is_used_and_comes_back():
    net = model()
    net[1].forward = forward = copy.deepcopy(net[2]).forward
    expected = copy.deepcopy(net)
    assert not difference(train(net=expected, epochs=1), train("activation_checkpointing", net=net, epochs=1))
    assert net[1].forward == forward


def test_a_run_is_resumed_with_and_without_it(tmp_path):
    whole = train(epochs=2)
    train("checkpoint", "activation_checkpointing", epochs=1, out=tmp_path / "with")
    train("checkpoint", epochs=1, out=tmp_path / "without")
    assert not difference(whole, train("checkpoint", epochs=2, out=tmp_path / "with", resume=tmp_path / "with"))
    assert not difference(whole, train("checkpoint", "activation_checkpointing", epochs=2, out=tmp_path / "without", resume=tmp_path / "without"))


def in_two_processes(on):
    run = fit(model(), nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1), tiny_batches(8, 8, 8, 8), epochs=1, seed=0,
              plugins=["ddp", *["activation_checkpointing"] * on])
    return run.model.state_dict()


def test_two_processes_with_ddp(ranks):
    for plain, recomputed in zip(ranks(2, in_two_processes, False), ranks(2, in_two_processes, True), strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize(("options", "message"), [
    ("", "the model has no repeated blocks; name what to compute again, with modules=..."),
    ("modules=conv9", "no module matches 'conv9'; the model's modules are 0, 1, 2, 3, 4"),
    ("modules=0,1,every=3", "every=3, and there are 2 modules; use a smaller number"),
    ("every=0", "every is at least 1, not 0"), ("save=matmull", "torch.ops.aten has no operator 'matmull'"),
])
def test_what_cannot_be_done_is_refused(options, message):
    with pytest.raises(UsageError, match="activation_checkpointing: ") as caught:
        tiny_run(f"activation_checkpointing:{options}")
    assert message in str(caught.value)
