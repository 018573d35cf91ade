"""EMAHook, whose average has an interval of as many iterations as an update has batches."""
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from works import Work


class Classifier(BaseModel):
    def __init__(self, work: Work, model):
        super().__init__()
        self.work, self.model = work, model

    def forward(self, input, target, mode="tensor"):
        output = self.model(input)
        return {"loss": self.work.loss(output, target)} if mode == "loss" else (output, target)


class ValidLoss(BaseMetric):
    def process(self, data_batch, data_samples):
        output, target = data_samples
        self.results += torch.nn.functional.cross_entropy(output, target, reduction="none").tolist()

    def compute_metrics(self, results):
        return {"valid_loss": sum(results) / len(results)}


def train(work: Work, model, tape):
    average = EMAHook("ExponentialMovingAverage", momentum=1 - work.ema_decay, interval=work.accumulate,
                      begin_iter=work.accumulate)
    runner = Runner(
        Classifier(work, model), work_dir=str(work.folder), train_dataloader=work.train_loader(),
        train_cfg={"by_epoch": True, "max_epochs": work.epochs},
        optim_wrapper={"optimizer": work.make_optimizer(model.parameters()), "accumulative_counts": work.accumulate},
        val_dataloader=work.valid_loader(), val_cfg={}, val_evaluator={"type": ValidLoss},
        custom_hooks=[average])
    runner.train()
    return {"average": torch.cat([weight.flatten() for weight in average.ema_model.module.parameters()]),
            "valid_loss": runner.message_hub.get_scalar("val/valid_loss").current()}
