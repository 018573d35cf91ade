"""The schedule counts every step, also one that the scaler skips, so it ends with the data."""
import torch
from works import Work


def train(work: Work, model, tape):
    optimizer, scaler = work.make_optimizer(model.parameters()), torch.amp.GradScaler("cpu")
    schedule = work.make_schedule(optimizer)
    for _ in range(work.epochs):
        for input, target in work.train_loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = work.loss(model(input), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
