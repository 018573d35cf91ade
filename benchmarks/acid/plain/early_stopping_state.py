"""Evaluate after every epoch, and stop after `patience` evaluations in a row that are not better than the best."""
import torch
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    best, waited, epoch = float("inf"), 0, 0
    while epoch < work.epochs and waited < work.patience:
        epoch += 1
        model.train()
        for input, target in work.train_loader():
            optimizer.zero_grad()
            work.loss(model(input), target).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            input, target = work.valid_data.tensors
            loss = work.loss(model(input), target).item()
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
    return {"epochs": epoch}
