"""A train_step of one's own, which passes a closure to the step of the OptimWrapper."""
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

    def train_step(self, data, optim_wrapper):
        def closure():
            optim_wrapper.zero_grad()
            loss = self(*data, mode="loss")["loss"]
            optim_wrapper.backward(loss)
            return loss
        optim_wrapper.step(closure=closure)
        return {}


def train(work: Work, model, tape):
    runner = Runner(
        Classifier(work, model), work_dir=str(work.folder), train_dataloader=work.train_loader(),
        train_cfg={"by_epoch": True, "max_epochs": work.epochs},
        optim_wrapper={"optimizer": work.make_optimizer(model.parameters())})
    runner.train()
