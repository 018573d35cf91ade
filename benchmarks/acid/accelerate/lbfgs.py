"""The prepared optimizer takes a closure, as torch's does."""
from accelerate import Accelerator
from works import Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(model, work.make_optimizer(model.parameters()), work.train_loader())
    for _ in range(work.epochs):
        for input, target in loader:

            def closure(input=input, target=target):
                optimizer.zero_grad()
                loss = work.loss(model(input), target)
                accelerator.backward(loss)
                return loss
            optimizer.step(closure)
