"""A process function with torch's autocast and scaler; that of the factory has autocast for CUDA, and no clipping."""
import torch
from ignite.engine import Engine
from torch.nn.utils import clip_grad_norm_
from works import Work


def train(work: Work, model, tape):
    optimizer, scaler = work.make_optimizer(model.parameters()), torch.amp.GradScaler("cpu")

    def train_step(engine, batch):
        model.train()
        optimizer.zero_grad()
        input, target = batch
        with torch.autocast("cpu", torch.float16):
            loss = work.loss(model(input), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), work.max_norm)
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    Engine(train_step).run(work.train_loader(), max_epochs=work.epochs)
