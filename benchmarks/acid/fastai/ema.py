"""torch's average, updated by a callback after the step."""
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from works import Work


class Average(Callback):
    def __init__(self, average):
        self.average = average

    def after_step(self):
        self.average.update_parameters(self.model)


def train(work: Work, model, tape):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(work.ema_decay))
    optimizer = OptimWrapper(opt=work.make_optimizer(model.parameters()))
    data = DataLoaders(work.train_loader(), work.valid_loader(), device="cpu")
    learn = Learner(data, model, work.loss, optimizer, work.lr,
                    cbs=GradientAccumulation(work.batch_size * work.accumulate))
    learn.fit(work.epochs, cbs=Average(average))
    valid_loss, = Learner(data, average.module, work.loss).validate()
    return {"average": torch.cat([weight.detach().flatten() for weight in average.module.parameters()]),
            "valid_loss": valid_loss}
