"""The schedule steps once per update, not once per batch."""
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    schedule = work.make_schedule(optimizer)
    for _ in range(work.epochs):
        batches = work.batches()
        for start in range(0, len(batches), work.accumulate):
            optimizer.zero_grad()
            for input, target in batches[start:start + work.accumulate]:
                loss = work.loss(model(input), target) / work.accumulate
                loss.backward()
            optimizer.step()
            schedule.step()
