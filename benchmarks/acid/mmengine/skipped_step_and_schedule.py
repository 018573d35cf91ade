"""AmpOptimWrapper in float16, and a LinearLR in iterations."""
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner
from works import NeedsGpu, Work


class Classifier(BaseModel):
    def __init__(self, work: Work, model):
        super().__init__()
        self.work, self.model = work, model

    def forward(self, input, target, mode="tensor"):
        output = self.model(input)
        return {"loss": self.work.loss(output, target)} if mode == "loss" else (output, target)


def train(work: Work, model, tape):
    try:
        wrapper = AmpOptimWrapper(dtype="float16", optimizer=work.make_optimizer(model.parameters()))
    except AssertionError as error:
        raise NeedsGpu(f"mmengine says: {error}") from error
    runner = Runner(
        Classifier(work, model), work_dir=str(work.folder), train_dataloader=work.train_loader(),
        train_cfg={"by_epoch": True, "max_epochs": work.epochs},
        optim_wrapper=wrapper,
        param_scheduler={"type": "LinearLR", "start_factor": 1.0, "end_factor": work.factor(work.steps - 1),
                         "by_epoch": False, "end": work.steps})
    runner.train()
