"""Two parameter groups: matrices with weight decay, biases and norms without."""
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(work.parameter_groups(model))
    for _ in range(work.epochs):
        for input, target in work.train_loader():
            optimizer.zero_grad()
            work.loss(model(input), target).backward()
            optimizer.step()
