"""`Shard`: the processes together read every batch once, and each has equally many batches."""
import random

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, TensorDataset

from loopctl.data.sharding import Shard, find_shard, shard_data


def shards(batches, ranks, count=len, **settings):
    return [Shard(batches, rank, ranks, count, **settings) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("number", [1, 4, 6, 7])
def test_processes_take_turns_and_fillers_have_no_weight(number, ranks):
    batches = [[batch, batch] for batch in range(number)]
    read = []
    for shard in shards(batches, ranks):
        shard.start_pass(0, 0)
        drawn = list(shard)
        assert len(drawn) == len(shard) == -(-number // ranks)
        real = [batch for index, batch in enumerate(drawn) if not shard.is_filler(index)]
        assert real == batches[shard.rank::ranks]
        assert shard.real_batches == len(real)
        read += real
    assert sorted(read) == batches


def test_sample_counts_are_those_of_all_processes():
    batches = [[0] * size for size in (4, 4, 4, 2, 4)]
    shard = Shard(batches, 1, 2, len)
    shard.start_pass(0, 0)
    list(shard)
    assert shard.sample_counts(0, 1) == (8, True, 4)
    assert shard.sample_counts(1, 1) == (6, False, 2)
    assert shard.sample_counts(2, 1) == (4, False, 0)            # a filler
    assert shard.sample_counts(0, 3) == (18, False, 6)
    assert shard.sample_counts(2, 2) is None


@pytest.mark.parametrize("consumed", [0, 2, 3, 7, 10])
def test_a_pass_resumes_after_the_batches_that_all_processes_consumed(consumed):
    batches = [[batch] for batch in range(10)]
    read = []
    for shard in shards(batches, 3):
        first = len(shard) - shard.remaining(consumed)
        shard.start_pass(first, consumed)
        drawn = list(shard)[first:]
        assert len(drawn) == shard.remaining(consumed)
        assert shard.consumed_by_all(first) == consumed
        read += [batch for index, batch in enumerate(drawn, first) if not shard.is_filler(index)]
        assert [*Shard(batches, shard.rank, 3, len)] == [*shard][:len(shard)]       # the next pass has all batches again
    assert sorted(read) == batches[consumed:]


class EndlessSampler(Sampler):
    """Draws batches from Python's and torch's random numbers, without a length."""

    def __iter__(self):
        while True:
            yield [random.randrange(100), int(torch.randint(100, ()))]


def test_all_processes_draw_the_same_batches_and_keep_their_random_number_state():
    from itertools import islice
    found = []
    for rank in range(2):
        torch.manual_seed(rank)
        random.seed(rank)
        before = torch.get_rng_state(), random.getstate()
        shard = Shard(EndlessSampler(), rank, 2, len, seed=7)
        found.append(list(islice(shard, 1500)))             # more than the 1024 that are drawn at once
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
    single = list(islice(Shard(EndlessSampler(), 0, 1, len, seed=7), 3000))
    assert found[0] == single[0::2]
    assert found[1] == single[1::2]


def test_the_order_depends_only_on_seed_and_epoch():
    def order(seed, epoch, generator=None):
        sampler = RandomSampler(range(20), generator=generator)
        loader = DataLoader(range(20), sampler=sampler, batch_size=5)
        shard = Shard(loader.batch_sampler, 0, 1, len, seed, loader)
        shard.set_epoch(epoch)
        return list(shard)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    before = generator.get_state()
    assert order(1, 0, generator) == order(1, 0, torch.Generator())     # the loader's own generator is seeded as well
    assert torch.equal(generator.get_state(), before)


def test_shard_data_does_not_change_the_users_loader():
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=2, shuffle=True)
    sharded, shard = shard_data(loader, 0, 2, seed=0)
    assert type(loader.batch_sampler) is BatchSampler
    assert find_shard(sharded) is shard
    assert find_shard(loader) is None
    assert len(sharded) == 3
    assert len(loader) == 5


def test_a_loader_with_a_distributed_sampler_is_not_sharded_again():
    data = TensorDataset(torch.arange(10))
    loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    assert shard_data(loader, 0, 2, seed=0) == (loader, None)
