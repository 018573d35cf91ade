"""EarlyStoppingHook, and a run that is resumed."""
import os

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EarlyStoppingHook
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
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"      # else torch refuses the checkpoint
    stopping = EarlyStoppingHook("valid_loss", rule="less", min_delta=0.0, patience=work.patience)
    runner = Runner(
        Classifier(work, model), work_dir=str(work.folder), train_dataloader=work.train_loader(),
        train_cfg={"by_epoch": True, "max_epochs": work.stop_after if work.part == 1 else work.epochs},
        optim_wrapper={"optimizer": work.make_optimizer(model.parameters())},
        val_dataloader=work.valid_loader(), val_cfg={}, val_evaluator={"type": ValidLoss}, custom_hooks=[stopping],
        resume=work.part == 2)
    runner.train()
    return {"epochs": runner.epoch}
