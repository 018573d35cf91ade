"""AutoUnit with strategy="ddp", and torch's DistributedSampler, whose epoch the loop sets."""
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.train import train as train_unit
from torchtnt.utils import init_from_env
from works import Work


class Unit(AutoUnit):
    def __init__(self, work: Work, **options):
        self.work = work
        super().__init__(**options)

    def compute_loss(self, state, data):
        input, target = data
        output = self.module(input)
        return self.work.loss(output, target), output

    def configure_optimizers_and_lr_scheduler(self, module):
        return self.work.make_optimizer(module.parameters()), None


def train(work: Work, model, tape):
    device = init_from_env()
    unit = Unit(work, module=model, device=device, strategy="ddp")
    loader = DataLoader(work.train_data, work.batch_size, sampler=DistributedSampler(work.train_data, shuffle=False))
    train_unit(unit, loader, max_epochs=work.epochs)
    torch.distributed.destroy_process_group()
