"""float16 with a loss scale, and the norm of the unscaled gradients clipped."""
import torch
from torch.nn.utils import clip_grad_norm_
from works import Work


def train(work: Work, model, tape):
    optimizer, scaler = work.make_optimizer(model.parameters()), torch.amp.GradScaler("cpu")
    for _ in range(work.epochs):
        for input, target in work.train_loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = work.loss(model(input), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), work.max_norm)
            scaler.step(optimizer)
            scaler.update()
