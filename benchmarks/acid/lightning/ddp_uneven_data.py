"""Trainer(strategy="ddp", devices=2), and torch's DistributedSampler: the one that Lightning makes shuffles."""
import lightning as L
from torch.utils.data import DataLoader, DistributedSampler
from works import Work


class Module(L.LightningModule):
    def __init__(self, work, model):
        super().__init__()
        self.work, self.model, self.loss = work, model, work.loss

    def training_step(self, batch, batch_idx):
        input, target = batch
        return self.loss(self.model(input), target)

    def train_dataloader(self):
        data = self.work.train_data
        return DataLoader(data, self.work.batch_size, sampler=DistributedSampler(data, shuffle=False))

    def configure_optimizers(self):
        return self.work.make_optimizer(self.parameters())


def train(work: Work, model, tape):
    trainer = L.Trainer(max_epochs=work.epochs, accelerator="cpu", devices=work.processes, strategy="ddp", logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                        use_distributed_sampler=False)
    trainer.fit(Module(work, model))
