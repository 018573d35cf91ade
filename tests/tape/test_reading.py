"""What was read from a tape."""
from math import nan

from loopctl.tape.reading import Table
from loopctl.tape.tape_file import MISSING


def test_tables_are_equal_if_their_tensors_have_the_same_bits():
    """Whatever the rounding of their norms; a tensor of zeros is not one that is missing."""
    table = Table(("a", "b"), (1, 0), (nan, 0.0), (nan, 0.0))
    assert table == Table(("a", "b"), (1, 0), (nan, 0.0), (0.5, 0.0))
    assert hash(table) == hash(Table(("a", "b"), (1, 0), (nan, 0.0), (0.5, 0.0)))
    for other in (Table(("a", "c"), (1, 0), (nan, 0.0), (nan, 0.0)), Table(("a", "b"), (2, 0), (nan, 0.0), (nan, 0.0)),
                  Table(("a", "b"), (1, 0), (nan, MISSING), (nan, 0.0)), None):
        assert table != other


def test_the_norm_of_a_table_is_that_of_the_tensors_that_are_there():
    table = Table(("a", "b", "c"), (1, 0, 2), (3.0, MISSING, 4.0), (0.0, 0.0, 0.0))
    assert table.norm == 5
    assert table.missing == {1}
