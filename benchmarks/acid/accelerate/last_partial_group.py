"""The recipe for samples of variable size: the sum of the losses of an update, divided by its number of samples."""
from accelerate import Accelerator
from works import Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=work.accumulate)
    model, optimizer, loader = accelerator.prepare(model, work.make_optimizer(model.parameters()), work.train_loader())
    for _ in range(work.epochs):
        batches = iter(loader)
        for start in range(0, len(loader), work.accumulate):
            group = [next(batches) for _ in range(min(work.accumulate, len(loader) - start))]
            samples = sum(len(target) for _, target in group)
            for input, target in group:
                total = work.loss(model(input), target) * len(target)
                accelerator.backward(total * accelerator.gradient_accumulation_steps / samples)
            optimizer.step()
            optimizer.zero_grad()
