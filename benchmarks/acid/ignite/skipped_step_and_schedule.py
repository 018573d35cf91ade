"""A process function with torch's autocast and scaler, and the handler for a schedule of torch."""
import torch
from ignite.engine import Engine, Events
from ignite.handlers import LRScheduler
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
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    trainer = Engine(train_step)
    trainer.add_event_handler(Events.ITERATION_STARTED, LRScheduler(work.make_schedule(optimizer)))
    trainer.run(work.train_loader(), max_epochs=work.epochs)
