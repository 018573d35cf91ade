"""The counters of a run, and asking for another position without leaving the own one."""
from dataclasses import astuple

import pytest

from loopctl.counters import Counters


def test_a_skipped_step_is_attempted_and_not_made():
    counters = Counters()
    counters.finish_step(2, skipped=False)
    counters.finish_step(3, skipped=True)
    assert (counters.step, counters.attempts, counters.seen) == (1, 2, 5)
    counters.discard_update()
    assert (counters.step, counters.attempts) == (0, 2)


def test_an_epoch_begins_where_the_last_one_ended():
    counters = Counters()
    counters.finish_step(4, skipped=False)
    counters.finish_epoch()
    counters.finish_step(1, skipped=True)
    counters.finish_evaluation()
    assert (counters.epoch, counters.seen_in_epoch, counters.attempts_in_epoch, counters.evaluated) == (1, 1, 1, 2)


def test_temporary_values_end_with_the_block_also_after_an_exception():
    counters = Counters(epoch=1, step=2, attempts=3, seen=4, began=(1, 1), shift=5, evaluated=6)
    before = astuple(counters)
    with pytest.raises(ValueError, match="in the block"), counters.temporarily(epoch=7, seen=0):  # noqa: PT012
        assert (counters.epoch, counters.seen, counters.step) == (7, 0, 2)
        counters.finish_step(9, skipped=False)
        raise ValueError("in the block")
    assert astuple(counters) == before


def test_the_state_goes_from_one_to_another():
    counters, other = Counters(epoch=1, step=2, attempts=3, seen=4, began=(1, 1), shift=5, evaluated=6), Counters()
    other.load_state_dict(counters.state_dict())
    assert astuple(other) == astuple(counters)
