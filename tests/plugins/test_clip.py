"""The plugin clip, compared with a plain loop that uses torch.nn.utils."""
import pytest
import torch
from torch import nn

from loopctl import fit

cross_entropy = nn.CrossEntropyLoss()


@pytest.mark.compares(use="clip", technique="gradient clipping by norm and by value",
                      source="torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_", tolerance="to the bit")
@pytest.mark.parametrize(("spec", "clip"), [
    ("clip", lambda parameters: nn.utils.clip_grad_norm_(parameters, 1.0)),
    ("clip:max_norm=0.05", lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05)),
    ("clip:max_norm=20,norm_type=2", lambda parameters: nn.utils.clip_grad_norm_(parameters, 20, 2)),
    ("clip:max_norm=0.02,norm_type=inf", lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.02, float("inf"))),
    ("clip:value=0.01", lambda parameters: nn.utils.clip_grad_value_(parameters, 0.01)),
])
def test_equals_a_plain_loop_to_the_bit(net, batches, clone, same, sgd, spec, clip):
    other = clone(net)
    run = fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[spec], seed=1)
    torch.manual_seed(1)
    optimizer, norms = sgd(other.parameters()), []
    other.train()
    for _ in range(2):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(other(input), target).backward()
            norms.append(clip(other.parameters()))
            optimizer.step()
    same(net, other)
    if "value" in spec:
        assert "grad_norm" not in run.history[0]
    else:
        assert [row["grad_norm"] for row in run.history] == [norms[7].item(), norms[15].item()]


@pytest.mark.parametrize(("specs", "said"), [
    (["clip", "clip:max_norm=0.5"], ["clip and clip.2 clip the same norm of type 2, so the smaller limit counts; leave one of them out"]),
    (["clip:value=1", "clip:value=2"], ["clip and clip.2 clip the same value, so the smaller limit counts; leave one of them out"]),
    (["clip", "clip:value=1"], []), (["clip", "clip:max_norm=1,norm_type=inf"], []), (["clip:max_norm=inf", "clip", "clip:value=1"], []),
    (["clip:max_norm=inf", "clip:max_norm=inf"], []),
], ids=str)
def test_two_that_clip_the_same_are_said(specs, said, net, batches, sgd, caplog):
    fit(net, cross_entropy, sgd, batches[:1], plugins=specs)
    assert caplog.messages == said
