"""`mixed_precision="fp16"`, which makes a GradScaler on a GPU only."""
from accelerate import Accelerator
from works import NeedsGpu, Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    if accelerator.scaler is None:
        raise NeedsGpu('on the CPU Accelerator(mixed_precision="fp16") is accepted, and trains in float32')
    model, optimizer, loader = accelerator.prepare(model, work.make_optimizer(model.parameters()), work.train_loader())
    for input, target in loader:
        accelerator.backward(work.loss(model(input), target))
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), work.max_norm)
        optimizer.step()
        optimizer.zero_grad()
