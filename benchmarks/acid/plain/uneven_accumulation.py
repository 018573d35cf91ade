"""Gradients of several batches, each weighted by its share of the samples of the update."""
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    for _ in range(work.epochs):
        batches = work.batches()
        for start in range(0, len(batches), work.accumulate):
            group = batches[start:start + work.accumulate]
            samples = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            for input, target in group:
                loss = work.loss(model(input), target) * (len(target) / samples)
                loss.backward()
            optimizer.step()
