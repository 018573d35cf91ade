"""Every update of three epochs, in one go."""
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    schedule = work.make_schedule(optimizer)
    for _ in range(work.epochs):
        for input, target in work.train_loader():
            optimizer.zero_grad()
            work.loss(model(input), target).backward()
            optimizer.step()
            schedule.step()
