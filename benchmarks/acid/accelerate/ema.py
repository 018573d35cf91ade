"""torch's average, updated where `sync_gradients` says that the optimizer has stepped."""
import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from works import Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=work.accumulate)
    model, optimizer, loader, valid_loader = accelerator.prepare(
        model, work.make_optimizer(model.parameters()), work.train_loader(), work.valid_loader())
    average = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(work.ema_decay))
    for _ in range(work.epochs):
        for input, target in loader:
            with accelerator.accumulate(model):
                accelerator.backward(work.loss(model(input), target))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                average.update_parameters(accelerator.unwrap_model(model))
    average.eval()
    with torch.no_grad():
        gathered = [accelerator.gather_for_metrics((average(input), target)) for input, target in valid_loader]
    output, target = map(torch.cat, zip(*gathered, strict=True))
    return {"average": torch.cat([weight.detach().flatten() for weight in average.module.parameters()]),
            "valid_loss": work.loss(output, target).item()}
