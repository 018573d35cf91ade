"""What each process reads of the data: together all of it, each once, and nobody is missing."""
import random

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, TensorDataset

from loopctl.data.sharding import Shard, find_shard, shard_data


def shards(batches, ranks, count=len, **settings):
    return [Shard(batches, rank, ranks, count, **settings) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("number", [1, 4, 6, 7])
def test_batches_go_round_and_fillers_count_nothing(number, ranks):
    batches = [[batch, batch] for batch in range(number)]
    given = []
    for shard in shards(batches, ranks):
        shard.begin(0, 0)
        mine = list(shard)
        assert len(mine) == len(shard) == -(-number // ranks)
        own = [batch for at, batch in enumerate(mine) if shard.counts(at)]
        assert own == batches[shard.rank::ranks]
        assert shard.own == len(own)
        given += own
    assert sorted(given) == batches


def test_each_process_knows_how_many_samples_all_have():
    batches = [[0] * size for size in (4, 4, 4, 2, 4)]
    shard = Shard(batches, 1, 2, len)
    shard.begin(0, 0)
    list(shard)
    assert shard.together(0, 1) == (8, True, 4)
    assert shard.together(1, 1) == (6, False, 2)
    assert shard.together(2, 1) == (4, False, 0)            # a filler
    assert shard.together(0, 3) == (18, False, 6)
    assert shard.together(2, 2) is None


@pytest.mark.parametrize("consumed", [0, 2, 3, 7, 10])
def test_a_pass_goes_on_where_all_of_them_were(consumed):
    batches = [[batch] for batch in range(10)]
    given = []
    for shard in shards(batches, 3):
        first = len(shard) - shard.left(consumed)
        shard.begin(first, consumed)
        mine = list(shard)[first:]
        assert len(mine) == shard.left(consumed)
        assert shard.consumed(first) == consumed
        given += [batch for at, batch in enumerate(mine, first) if shard.counts(at)]
        assert [*Shard(batches, shard.rank, 3, len)] == [*shard][:len(shard)]       # the next pass is whole again
    assert sorted(given) == batches[consumed:]


class Drawn(Sampler):
    """Draws from Python's random numbers, batch by batch, without a length."""

    def __iter__(self):
        while True:
            yield [random.randrange(100), int(torch.randint(100, ()))]


def test_all_draw_alike_and_the_runs_own_random_numbers_stay():
    from itertools import islice
    found = []
    for rank in range(2):
        torch.manual_seed(rank)
        random.seed(rank)
        before = torch.get_rng_state(), random.getstate()
        shard = Shard(Drawn(), rank, 2, len, seed=7)
        found.append(list(islice(shard, 1500)))             # more than are drawn at once
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
    whole = list(islice(Shard(Drawn(), 0, 1, len, seed=7), 3000))
    assert found[0] == whole[0::2]
    assert found[1] == whole[1::2]


def test_the_shuffle_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, generator=None):
        sampler = RandomSampler(range(20), generator=generator)
        loader = DataLoader(range(20), sampler=sampler, batch_size=5)
        shard = Shard(loader.batch_sampler, 0, 1, len, seed, loader)
        shard.set_epoch(epoch)
        return list(shard)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    mine = torch.Generator().manual_seed(5)
    torch.rand(3, generator=mine)
    before = mine.get_state()
    assert order(1, 0, mine) == order(1, 0, torch.Generator())      # a generator of the loader's own is seeded as well
    assert torch.equal(mine.get_state(), before)


def test_the_users_loader_stays_as_it_is():
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=2, shuffle=True)
    mine, shard = shard_data(loader, 0, 2, seed=0)
    assert type(loader.batch_sampler) is BatchSampler
    assert find_shard(mine) is shard
    assert find_shard(loader) is None
    assert len(mine) == 3
    assert len(loader) == 5


def test_what_is_in_parts_already_is_not_divided_again():
    data = TensorDataset(torch.arange(10))
    loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    assert shard_data(loader, 0, 2, seed=0) == (loader, None)
