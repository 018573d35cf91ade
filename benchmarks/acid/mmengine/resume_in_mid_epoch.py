"""The loop by iterations, which reads the data anew up to where it was when it resumes."""
import os

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
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"      # else torch refuses the checkpoint
    runner = Runner(
        Classifier(work, model), work_dir=str(work.folder), train_dataloader=work.train_loader(),
        train_cfg={"by_epoch": False, "max_iters": work.stop_after if work.part == 1 else work.steps},
        optim_wrapper={"optimizer": work.make_optimizer(model.parameters())},
        param_scheduler={"type": "LinearLR", "start_factor": 1.0, "end_factor": work.factor(work.steps - 1),
                         "by_epoch": False, "end": work.steps},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": work.stop_after, "by_epoch": False}},
        resume=work.part == 2)
    runner.train()
