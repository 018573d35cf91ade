"""DistributedDataParallel and DistributedSampler in a loop of one's own, as the guide for several GPUs with PyTorch."""
import keras
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from works import Work


def train(work: Work, model, tape):
    torch.distributed.init_process_group("gloo")
    network = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(model)])
    loader = DataLoader(work.train_data, work.batch_size, sampler=DistributedSampler(work.train_data, shuffle=False))
    ddp_network = DistributedDataParallel(network)
    optimizer = work.make_optimizer(network.parameters())
    for _ in range(work.epochs):
        for input, target in loader:
            optimizer.zero_grad()
            work.loss(ddp_network(input), target).backward()
            optimizer.step()
    torch.distributed.destroy_process_group()
