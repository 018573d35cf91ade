"""An optimizer of torch with two groups, prepared."""
from accelerate import Accelerator
from works import Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True)
    optimizer = work.make_optimizer(work.parameter_groups(model))
    model, optimizer, loader = accelerator.prepare(model, optimizer, work.train_loader())
    for _ in range(work.epochs):
        for input, target in loader:
            accelerator.backward(work.loss(model(input), target))
            optimizer.step()
            optimizer.zero_grad()
