"""The plugin fsdp: each process has a shard of every parameter, and the run equals that with ddp."""
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint.finding import checkpoints_in, find_checkpoint, step_number

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


def full_state(run):
    """The model's state dict, with sharded tensors gathered."""
    return {name: getattr(value, "full_tensor", value.clone)() for name, value in run.model.state_dict().items()}


def train_with(spec, plugins, epochs=5):
    recorder = Losses()
    with TemporaryDirectory() as out:
        run = fit(network(), LOSS, adamw, batches(*UNEVEN), batches(8, 5, 7, seed=1), epochs=epochs, plugins=[spec, *plugins, recorder], seed=0, out=out)
    return full_state(run), run.history, recorder.losses


WITH = [[], ["accumulate:every=2"], ["clip:max_norm=0.1"], ["clip:value=0.01"], ["clip:auto=50"], ["grad_centralize"], ["agc:clip_factor=0.1,exclude_head=false"], ["ema:decay=0.9"], ["swa:start=50%"], ["amp"], ["amp:dtype=float16"],
        ["sam"], ["nan_guard"], ["spike:deviations=1,warmup=2"], ["early_stopping:restore_best=true"], ["split"], ["freeze:patterns=0"], ["layerwise_lr:decay=0.5"],
        ["summary", "throughput"], ["channels_last"], ["onecycle:max_lr=0.1"], ["plateau:patience=0"]]


@pytest.mark.compares(use="fsdp", technique="sharded weights, gradients and optimizer states",
                      source="torch.distributed.fsdp.fully_shard; the run with ddp", tolerance="1e-6: sums over shards are in another order")
@pytest.mark.parametrize("plugins", WITH, ids=lambda plugins: ",".join(plugins) or "plain")
def test_losses_and_weights_equal_those_of_ddp(ranks, plugins):
    fsdp, ddp = ranks(2, train_with, "fsdp", plugins), ranks(2, train_with, "ddp", plugins)
    # Sums over shards are in another order.
    tolerance = 1e-3 if plugins and plugins[0].startswith("amp") else 1e-6
    for (weights, history, losses), (expected_weights, expected_history, expected_losses) in zip(fsdp, ddp, strict=True):
        assert losses == pytest.approx(expected_losses, abs=tolerance)
        for row, expected in zip(history, expected_history, strict=True):
            assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=tolerance)
        for name in weights:
            torch.testing.assert_close(weights[name], expected_weights[name], rtol=tolerance, atol=10 * tolerance)


def local_elements(spec):
    """The number of elements of parameters and optimizer state that this process holds."""
    run = fit(network(64), LOSS, adamw, batches(8, 8), plugins=[spec], seed=0)
    tensors = [*run.model.parameters(), *(value for state in run.optimizer.state.values() for value in state.values() if value.ndim)]
    return sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors)


def test_a_process_holds_half_of_the_parameters_and_of_the_optimizer_state(ranks):
    (first, second), (total, _) = ranks(2, local_elements, "fsdp"), ranks(2, local_elements, "ddp")
    assert first + second == total
    assert abs(first - second) < 0.02 * total


def train_in_bfloat16(out):
    # LayerNorm, because torch has no BatchNorm with mixed dtypes on a CPU.
    run = fit(network(norm=nn.LayerNorm).float(), LOSS, adamw, [(input.float(), target) for input, target in batches(*UNEVEN)], epochs=3, seed=0, out=out,
              plugins=["fsdp:param_dtype=bfloat16,reduce_dtype=float32,reshard_after_forward=false", AssertBfloat16()])
    return [parameter.dtype for parameter in run.model.parameters()], run.history[-1]["train_loss"]


class AssertBfloat16:
    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        loss = yield
        assert run.outputs.dtype == torch.bfloat16
        return loss


def test_it_computes_in_param_dtype_and_keeps_the_dtype_of_the_parameters(ranks, tmp_path):
    (dtypes, loss), _ = ranks(2, train_in_bfloat16, tmp_path)
    assert set(dtypes) == {torch.float32}
    full = fit(network(norm=nn.LayerNorm), LOSS, adamw, batches(*UNEVEN), epochs=3, seed=0, plugins=["accumulate:every=2"])
    assert loss == pytest.approx(full.history[-1]["train_loss"], abs=0.05)


def sharded_modules():
    from torch.distributed.fsdp import FSDPModule
    run = fit(network(), LOSS, adamw, batches(8, 8), plugins=["fsdp"], seed=0)
    return [name for name, module in run.model.named_modules() if isinstance(module, FSDPModule)]


def test_each_repeated_block_is_sharded_separately(ranks):
    assert ranks(2, sharded_modules) == [["", "1", "2"]] * 2


def test_a_single_process_trains_as_without_the_plugin(ranks):
    (weights, history, _), = ranks(1, train_with, "fsdp", [])
    run = fit(network(), LOSS, adamw, batches(*UNEVEN), batches(8, 5, 7, seed=1), epochs=5, seed=0)
    assert [row["val_loss"] for row in history] == pytest.approx([row["val_loss"] for row in run.history], abs=1e-10)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-10)


# Sharded checkpoints


def train_and_save(out, keep):
    run = fit(network(), LOSS, adamw, batches(*UNEVEN), batches(8, 5, 7, seed=1), epochs=3, seed=0, out=out,
              plugins=["fsdp", f"checkpoint:every_steps=2,keep={keep}", "ema:decay=0.9"])
    return full_state(run), str(run.last_checkpoint)


def test_kept_checkpoints_are_complete_and_no_other_files_remain(ranks, tmp_path):
    (weights, saved), (_, saved_on_rank1) = ranks(2, train_and_save, tmp_path, 2)
    folder = tmp_path / "checkpoints"
    assert saved == saved_on_rank1 == str(folder / "step-00000012.pt")
    files = checkpoints_in(folder)
    assert [step_number(file) for file in files] == [12, 10]
    named = {torch.load(file, weights_only=True)["sharded"]["folder"] for file in (*files, folder / "best.pt")}
    assert {path.name for path in folder.glob("*.sharded")} == named
    best = load_file(folder / "best.safetensors")
    assert best.keys() == weights.keys()
    assert all(best[name].shape == value.shape for name, value in weights.items())


class RisingLoss:
    """Validation losses that rise from epoch to epoch."""

    @hookimpl
    def evaluate(self, run: Run):
        return {"val_loss": float(run.epoch)}


def train_and_save_the_first_epoch(out):
    fit(network(), LOSS, adamw, batches(*[8] * 4), batches(8), epochs=4, seed=0, out=out, plugins=["fsdp", "checkpoint:keep=1", RisingLoss()])


def test_the_shards_of_the_best_checkpoint_are_kept(ranks, tmp_path):
    ranks(2, train_and_save_the_first_epoch, tmp_path)
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert best["counters"]["epoch"] == 1
    assert (tmp_path / "checkpoints" / best["sharded"]["folder"] / "rank-00001.safetensors").exists()
    assert len([*(tmp_path / "checkpoints").glob("*.sharded")]) == 2


def test_a_checkpoint_without_its_shards_is_skipped_on_resume(ranks, tmp_path):
    ranks(2, train_and_save, tmp_path, 2)
    (last, before) = checkpoints_in(tmp_path / "checkpoints")
    shutil.rmtree(last.parent / torch.load(last, weights_only=True)["sharded"]["folder"])
    assert find_checkpoint(tmp_path)[0] == before


class SaveTime:
    """Measures how long saving delays the first step."""

    def __init__(self):
        self.longest = 0.0

    @hookimpl(wrapper=True)
    def safe_point(self, run: Run):
        start = time.monotonic()
        result = yield
        if run.attempts == 1:
            self.longest = time.monotonic() - start
        return result


def train_with_a_slow_disk(out):
    from loopctl.checkpoint import sharded_tensors
    real = sharded_tensors.save_file

    def save_file(*arguments, **named):
        time.sleep(2)
        return real(*arguments, **named)
    sharded_tensors.save_file = save_file
    save_time = SaveTime()
    try:
        fit(network(), LOSS, adamw, batches(*[8] * 8), epochs=1, seed=0, out=out, plugins=[save_time, "fsdp", "checkpoint:every_steps=1"], max_steps=2)
    finally:
        sharded_tensors.save_file = real
    return save_time.longest, sorted(path.name for path in (Path(out) / "checkpoints").glob("step-*.pt"))


def test_saving_does_not_delay_training(ranks, tmp_path):
    for longest, files in ranks(2, train_with_a_slow_disk, tmp_path):
        assert longest < 1.5                    # writing takes two seconds
        assert files == ["step-00000001.pt", "step-00000002.pt"]        # the end of the run waits for the last one


# Hybrid sharding


def placements(spec):
    run = fit(network(), LOSS, adamw, batches(8, 8, 8, 8), plugins=[spec], seed=0)
    parameter = next(iter(run.model.parameters()))
    return str(parameter.placements), tuple(parameter.device_mesh.mesh.shape), parameter.to_local().numel()


def test_with_replicas_each_copy_is_sharded_over_its_own_processes(ranks):
    assert ranks(4, placements, "fsdp:replicas=2") == [("(Replicate(), Shard(dim=0))", (2, 2), 48)] * 4


@pytest.mark.parametrize("plugins", [[], ["accumulate:every=2", "clip:max_norm=0.1", "ema:decay=0.9"]], ids=["plain", "accumulate"])
def test_losses_and_weights_with_replicas_equal_those_of_ddp(ranks, plugins):
    hybrid, ddp = ranks(4, train_with, "fsdp:replicas=2", plugins), ranks(4, train_with, "ddp", plugins)
    for (weights, _, losses), (expected, _, expected_losses) in zip(hybrid, ddp, strict=True):
        assert losses == pytest.approx(expected_losses, abs=1e-6)               # sums are in another order
        for name in weights:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-6, atol=1e-5)


def train_part(spec, out, epochs, resume):
    run = fit(network(), LOSS, adamw, batches(*[8] * 8), epochs=epochs, seed=0, out=out, plugins=[spec, "checkpoint", "ema:decay=0.9"],
              resume=out if resume else None)
    return full_state(run)


def test_a_run_with_replicas_resumes_with_the_same_bits_and_with_other_replicas(ranks, tmp_path):
    whole = ranks(4, train_part, "fsdp:replicas=2", tmp_path / "whole", 3, False)
    ranks(4, train_part, "fsdp:replicas=2", tmp_path / "part", 2, False)
    folder = next((tmp_path / "part" / "checkpoints").glob("step-*.sharded"))
    assert [bool(load_file(file)) for file in sorted(folder.iterdir())] == [True, True, False, False]       # each shard once
    for kind in ("same", "other"):
        (tmp_path / kind).mkdir()
        shutil.copytree(tmp_path / "part" / "checkpoints", tmp_path / kind / "checkpoints")
    resumed = ranks(4, train_part, "fsdp:replicas=2", tmp_path / "same", 3, True)
    other = ranks(4, train_part, "fsdp", tmp_path / "other", 3, True)
    for name, value in whole[0].items():
        assert torch.equal(resumed[0][name], value)
        torch.testing.assert_close(other[0][name], value, rtol=1e-6, atol=1e-6)       # sums are in another order


def test_replicas_that_do_not_divide_the_processes_are_refused(ranks):
    with pytest.raises(UsageError, match="replicas=3 does not divide the 2 processes of the run"):
        ranks(2, train_with, "fsdp:replicas=3", [])
    with pytest.raises(UsageError, match="replicas is at least 1, not 0"):
        fit(network(), LOSS, adamw, batches(8), plugins=["fsdp:replicas=0"])
