"""Each process has a piece of every weight, and the run is the one that ddp makes."""
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loopctl import Run, fit, hookimpl
from loopctl.checkpoint.state import checkpoints_in, find_checkpoint, step_number

LOSS = nn.CrossEntropyLoss()
UNEVEN = [8, 8, 8, 4, 8, 8, 6]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, input):
        return input + torch.tanh(self.inner(self.norm(input)))


def network(width=16, norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), Block(width), Block(width), norm(width), nn.Linear(width, 3)).double()


def batches(*sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=random, dtype=torch.float64), torch.randint(0, 3, (size,), generator=random))
            for size in sizes]


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.01)


class Losses:
    def __init__(self):
        self.losses = []

    @hookimpl
    def after_step(self, run: Run):
        self.losses.append(run.loss.item())


def whole(run):
    return {name: getattr(value, "full_tensor", value.clone)() for name, value in run.model.state_dict().items()}


def trained(spec, plugins, epochs=5):
    watch = Losses()
    run = fit(network(), LOSS, adamw, batches(*UNEVEN), batches(8, 5, 7, seed=1), epochs=epochs, plugins=[spec, *plugins, watch], seed=0)
    return whole(run), run.history, watch.losses


WITH = [[], ["accumulate:every=2"], ["clip:max_norm=0.1"], ["clip:value=0.01"], ["ema:decay=0.9"], ["swa:start=50%"], ["amp"], ["amp:dtype=float16"],
        ["sam"], ["nan_guard"], ["early_stopping:restore_best=true"], ["split"], ["freeze:patterns=0"], ["layerwise_lr:decay=0.5"],
        ["summary", "throughput"], ["channels_last"], ["onecycle:max_lr=0.1"], ["plateau:patience=0"]]


@pytest.mark.parametrize("plugins", WITH, ids=lambda plugins: ",".join(plugins) or "plain")
def test_the_losses_are_those_of_ddp(ranks, plugins):
    there, here = ranks(2, trained, "fsdp", plugins), ranks(2, trained, "ddp", plugins)
    # Sums over pieces are added up in another order.
    tolerance = 1e-3 if plugins and plugins[0].startswith("amp") else 1e-6
    for one, other in zip(there, here, strict=True):
        assert one[2] == pytest.approx(other[2], abs=tolerance)
        for row, expected in zip(one[1], other[1], strict=True):
            assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=tolerance)
        for name in one[0]:
            torch.testing.assert_close(one[0][name], other[0][name], rtol=tolerance, atol=10 * tolerance)


def held(spec):
    run = fit(network(64), LOSS, adamw, batches(8, 8), plugins=[spec], seed=0)
    tensors = [*run.model.parameters(), *(value for state in run.optimizer.state.values() for value in state.values() if value.ndim)]
    return sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors)


def test_a_process_holds_half_of_the_weights_and_of_the_optimizers_state(ranks):
    (half, other), (all_of_it, _) = ranks(2, held, "fsdp"), ranks(2, held, "ddp")
    assert half + other == all_of_it
    assert abs(half - other) < 0.02 * all_of_it


def in_types(out):
    # On a CPU torch has no BatchNorm of several types.
    run = fit(network(norm=nn.LayerNorm).float(), LOSS, adamw, [(input.float(), target) for input, target in batches(*UNEVEN)], epochs=3, seed=0, out=out,
              plugins=["fsdp:param_dtype=bfloat16,reduce_dtype=float32,reshard_after_forward=false", Types()])
    return [parameter.dtype for parameter in run.model.parameters()], run.history[-1]["train_loss"]


class Types:
    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        loss = yield
        assert run.outputs.dtype == torch.bfloat16
        return loss


def test_it_computes_in_the_type_asked_for_and_keeps_the_weights_own(ranks, tmp_path):
    (types, loss), _ = ranks(2, in_types, tmp_path)
    assert set(types) == {torch.float32}
    full = fit(network(norm=nn.LayerNorm), LOSS, adamw, batches(*UNEVEN), epochs=3, seed=0, plugins=["accumulate:every=2"])
    assert loss == pytest.approx(full.history[-1]["train_loss"], abs=0.05)


def divided():
    from torch.distributed.fsdp import FSDPModule
    run = fit(network(), LOSS, adamw, batches(8, 8), plugins=["fsdp"], seed=0)
    return [name for name, module in run.model.named_modules() if isinstance(module, FSDPModule)]


def test_each_repeated_block_is_put_together_by_itself(ranks):
    assert ranks(2, divided) == [["", "1", "2"]] * 2


def test_one_process_alone_trains_as_it_would_without(ranks):
    (there, history, _), = ranks(1, trained, "fsdp", [])
    here = fit(network(), LOSS, adamw, batches(*UNEVEN), batches(8, 5, 7, seed=1), epochs=5, seed=0)
    assert [row["val_loss"] for row in history] == pytest.approx([row["val_loss"] for row in here.history], abs=1e-10)
    for name, value in here.model.state_dict().items():
        torch.testing.assert_close(there[name], value, rtol=1e-10, atol=1e-10)


# Checkpoints in pieces


def saving(out, keep):
    run = fit(network(), LOSS, adamw, batches(*UNEVEN), batches(8, 5, 7, seed=1), epochs=3, seed=0, out=out,
              plugins=["fsdp", f"checkpoint:every_steps=2,keep={keep}", "ema:decay=0.9"])
    return whole(run), str(run.last_checkpoint)


def test_what_is_kept_is_whole_and_nothing_else_is_there(ranks, tmp_path):
    (weights, saved), (_, same) = ranks(2, saving, tmp_path, 2)
    folder = tmp_path / "checkpoints"
    assert saved == same == str(folder / "step-00000012.pt")
    files = checkpoints_in(folder)
    assert [step_number(file) for file in files] == [12, 10]
    named = {torch.load(file, weights_only=True)["sharded"] for file in (*files, folder / "best.pt")}
    assert {path.name for path in folder.glob("*.sharded")} == named
    best = load_file(folder / "best.safetensors")
    assert best.keys() == weights.keys()
    assert all(best[name].shape == value.shape for name, value in weights.items())


class Worse:
    """Validation losses that only rise."""

    @hookimpl
    def evaluate(self, run: Run):
        return {"val_loss": float(run.epoch)}


def saving_the_first(out):
    fit(network(), LOSS, adamw, batches(*[8] * 4), batches(8), epochs=4, seed=0, out=out, plugins=["fsdp", "checkpoint:keep=1", Worse()])


def test_the_best_one_keeps_its_pieces(ranks, tmp_path):
    ranks(2, saving_the_first, tmp_path)
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert best["counters"]["epoch"] == 1
    assert (tmp_path / "checkpoints" / best["sharded"] / ".metadata").exists()
    assert len([*(tmp_path / "checkpoints").glob("*.sharded")]) == 2


def test_one_whose_pieces_are_gone_is_passed_over(ranks, tmp_path):
    import shutil
    ranks(2, saving, tmp_path, 2)
    (last, before) = checkpoints_in(tmp_path / "checkpoints")
    shutil.rmtree(last.parent / torch.load(last, weights_only=True)["sharded"])
    assert find_checkpoint(tmp_path)[0] == before


class Slow:
    """Notes how long saving holds a step up, while a slow disk writes."""

    def __init__(self):
        self.longest = 0.0

    @hookimpl(wrapper=True)
    def safe_point(self, run: Run):
        began = time.monotonic()
        result = yield
        if run.attempts == 1:
            self.longest = time.monotonic() - began
        return result


def slowly(out):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    real = FileSystemWriter.write_data

    def write_data(self, *arguments):
        time.sleep(2)
        return real(self, *arguments)
    FileSystemWriter.write_data = write_data
    slow = Slow()
    try:
        fit(network(), LOSS, adamw, batches(*[8] * 8), epochs=1, seed=0, out=out, plugins=[slow, "fsdp", "checkpoint:every_steps=1"], max_steps=2)
    finally:
        FileSystemWriter.write_data = real
    return slow.longest, sorted(path.name for path in (Path(out) / "checkpoints").glob("step-*.pt"))


def test_saving_does_not_hold_up_the_step(ranks, tmp_path):
    for longest, files in ranks(2, slowly, tmp_path):
        assert longest < 1.5                    # writing takes two seconds
        assert files == ["step-00000001.pt", "step-00000002.pt"]        # the run's end waits for the last one
