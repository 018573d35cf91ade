"""The words of messages."""
from loopctl.errors import counted


def test_a_number_of_things():
    assert [counted(*pair) for pair in ((0, "step"), (1, "epoch"), (2, "epoch"), (1000, "batch"), (3, "process"))] == [
        "0 steps", "1 epoch", "2 epochs", "1,000 batches", "3 processes"]
