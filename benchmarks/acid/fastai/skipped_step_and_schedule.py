"""`MixedPrecision`, whose autocast and scaler are for CUDA, and `ParamScheduler`."""
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from works import NeedsGpu, Work


def train(work: Work, model, tape):
    if not torch.cuda.is_available():
        raise NeedsGpu("MixedPrecision has autocast and a loss scale for CUDA; on the CPU it trains in float32")
    optimizer = OptimWrapper(opt=work.make_optimizer(model.parameters()))
    data = DataLoaders(work.train_loader(), work.valid_loader(), device="cpu")
    learn = Learner(data, model, work.loss, optimizer, work.lr)
    schedule = ParamScheduler({"lr": lambda share: work.lr * work.factor(round(share * work.steps))})
    learn.fit(work.epochs, cbs=[MixedPrecision(), schedule])
