"""torch's average of the weights, updated after every update, not after every batch."""
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(work.ema_decay))
    for _ in range(work.epochs):
        batches = work.batches()
        for start in range(0, len(batches), work.accumulate):
            optimizer.zero_grad()
            for input, target in batches[start:start + work.accumulate]:
                loss = work.loss(model(input), target) / work.accumulate
                loss.backward()
            optimizer.step()
            average.update_parameters(model)
    average.eval()
    with torch.no_grad():
        input, target = work.valid_data.tensors
        loss = work.loss(average(input), target).item()
    return {"average": torch.cat([weight.detach().flatten() for weight in average.module.parameters()]),
            "valid_loss": loss}
