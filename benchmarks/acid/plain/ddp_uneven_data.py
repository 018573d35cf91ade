"""What two processes compute, in one: an update is the mean over the samples of two batches, one of each process."""
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    for _ in range(work.epochs):
        batches = work.batches()
        for start in range(0, len(batches), work.processes):
            group = batches[start:start + work.processes]
            samples = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            for input, target in group:
                loss = work.loss(model(input), target) * (len(target) / samples)
                loss.backward()
            optimizer.step()
