"""`even_batches=False`, and the recipe for batches of uneven size: divide by the samples of all processes."""
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from works import Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    model, optimizer, loader = accelerator.prepare(model, work.make_optimizer(model.parameters()), work.train_loader())
    for _ in range(work.epochs):
        for input, target in loader:
            samples = accelerator.gather(torch.tensor(len(target))).sum().item()
            total = work.loss(model(input), target) * len(target)
            accelerator.backward(total * accelerator.num_processes / samples)
            optimizer.step()
            optimizer.zero_grad()
