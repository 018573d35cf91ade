"""`scheduler.step` after every batch; the prepared schedule steps only with the optimizer."""
from accelerate import Accelerator
from works import Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=work.accumulate)
    optimizer = work.make_optimizer(model.parameters())
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, work.train_loader(),
                                                              work.make_schedule(optimizer))
    for _ in range(work.epochs):
        for input, target in loader:
            with accelerator.accumulate(model):
                accelerator.backward(work.loss(model(input), target))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
