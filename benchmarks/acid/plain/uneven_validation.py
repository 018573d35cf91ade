"""The validation loss is the sum over the samples, divided by their number."""
import torch
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    for _ in range(work.epochs):
        for input, target in work.train_loader():
            optimizer.zero_grad()
            work.loss(model(input), target).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        total = sum(work.loss(model(input), target).item() * len(target) for input, target in work.valid_loader())
    return {"valid_loss": total / len(work.valid_data)}
