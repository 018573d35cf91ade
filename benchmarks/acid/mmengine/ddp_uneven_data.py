"""The launcher of torch, with gloo, and a sampler that adds no samples."""
import torch
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
    torch.distributed.init_process_group("gloo")        # that of the launcher needs a GPU
    runner = Runner(
        Classifier(work, model), work_dir=str(work.folder), train_dataloader={
            "batch_size": work.batch_size, "dataset": work.train_data, "collate_fn": {"type": "default_collate"},
            "sampler": {"type": "DefaultSampler", "shuffle": False, "round_up": False}},
        train_cfg={"by_epoch": True, "max_epochs": work.epochs},
        optim_wrapper={"optimizer": work.make_optimizer(model.parameters())},
        launcher="pytorch",
        cfg={"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None}})
    runner.train()
    torch.distributed.destroy_process_group()
