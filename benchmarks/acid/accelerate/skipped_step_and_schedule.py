"""`mixed_precision="fp16"` and a prepared schedule. It needs the GradScaler that there is on a GPU only."""
from accelerate import Accelerator
from works import NeedsGpu, Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    if accelerator.scaler is None:
        raise NeedsGpu('on the CPU Accelerator(mixed_precision="fp16") is accepted, and trains in float32')
    optimizer = work.make_optimizer(model.parameters())
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, work.train_loader(),
                                                              work.make_schedule(optimizer))
    for input, target in loader:
        accelerator.backward(work.loss(model(input), target))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
