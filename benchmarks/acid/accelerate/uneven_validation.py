"""`gather_for_metrics` gathers what the model says of every sample, and the loss is computed of all."""
import torch
from accelerate import Accelerator
from works import Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, valid_loader = accelerator.prepare(
        model, work.make_optimizer(model.parameters()), work.train_loader(), work.valid_loader())
    for _ in range(work.epochs):
        for input, target in loader:
            accelerator.backward(work.loss(model(input), target))
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        gathered = [accelerator.gather_for_metrics((model(input), target)) for input, target in valid_loader]
    output, target = map(torch.cat, zip(*gathered, strict=True))
    return {"valid_loss": work.loss(output, target).item()}
