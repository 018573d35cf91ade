"""The pytest plugin that says of a failing test what differs between the training loops in it."""
import pytest
import torch
from torch import nn

from loopctl.tape.reading import read_tape
from loopctl.tape.recording_each import record_each
from loopctl.testing import failures

TESTS = """
import torch
from torch import nn

def train(lr, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    return model.weight

def test_equal():
    assert torch.equal(train(0.1), train(0.1))

def test_other_rate(tmp_path):
    (tmp_path / "new").mkdir()          # which would fail in a folder that was used before
    assert torch.equal(train(0.1), train(0.2))

def test_no_loops():
    assert 1 == 2

def test_another_error():
    train(0.1), train(0.2)
    raise ValueError("not compared")
"""


def test_a_failing_test_that_compares_two_loops_says_what_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(failures, "explained", [])
    (tmp_path / "test_loops.py").write_text(TESTS)
    monkeypatch.chdir(tmp_path)
    pytest.main(["-q", "-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "loopctl.testing.failures", "-p", "no:cacheprovider",
                 "test_loops.py"])
    text = capsys.readouterr().out
    assert "3 failed, 1 passed" in text
    assert text.count("what `loopctl why` says") == 1           # the other two have no loops, or another error
    assert ("A is loop 1 of this test, B is loop 2. update 1: the learning rate is 0.1 in A and 0.2 in B." in text)
    assert "ValueError: not compared" in text


def test_each_model_that_is_trained_has_a_tape_of_its_own(tmp_path):
    models = [nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models[:2]]
    with record_each(tmp_path) as files:
        for _ in range(2):                              # the loops in turn, and a model that no optimizer steps
            for model in models:
                model(torch.ones(4, 3)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert [file.name for file in files] == ["1.tape", "2.tape"]
    assert [len(read_tape(file).updates) for file in files] == [2, 2]
    assert torch.autograd.backward.__module__ == "torch.autograd"
