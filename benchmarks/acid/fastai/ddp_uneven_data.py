"""`distrib_ctx`, which is for NVIDIA GPUs."""
import fastai.distributed  # noqa: F401, which gives Learner distrib_ctx
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from works import NeedsGpu, Work


def train(work: Work, model, tape):
    if not torch.cuda.is_available():
        raise NeedsGpu("the order of the samples is sent to the other processes by way of CUDA")
    optimizer = OptimWrapper(opt=work.make_optimizer(model.parameters()))
    data = DataLoaders(work.train_loader(), work.valid_loader(), device="cpu")
    learn = Learner(data, model, work.loss, optimizer, work.lr)
    with learn.distrib_ctx(sync_bn=False):
        learn.fit(work.epochs)
