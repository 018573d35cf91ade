"""The paramwise_cfg of the optimizer's constructor."""
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


def train(work: Work, model, tape):
    runner = Runner(
        Classifier(work, model), work_dir=str(work.folder), train_dataloader=work.train_loader(),
        train_cfg={"by_epoch": True, "max_epochs": work.epochs},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": work.lr, "weight_decay": work.weight_decay},
                       "paramwise_cfg": {"bias_decay_mult": 0.0, "norm_decay_mult": 0.0}})
    runner.train()
