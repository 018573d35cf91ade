"""The norm of the gradient is clipped when the gradients of all batches of the update are there."""
from torch.nn.utils import clip_grad_norm_
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    for _ in range(work.epochs):
        batches = work.batches()
        for start in range(0, len(batches), work.accumulate):
            optimizer.zero_grad()
            for input, target in batches[start:start + work.accumulate]:
                loss = work.loss(model(input), target) / work.accumulate
                loss.backward()
            clip_grad_norm_(model.parameters(), work.max_norm)
            optimizer.step()
