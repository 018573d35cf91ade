"""Trainer(plugins=MixedPrecision("16-mixed", device="cpu"), gradient_clip_val=0.5)."""
import lightning as L
from lightning.pytorch.plugins.precision import MixedPrecision
from works import Work


class Module(L.LightningModule):
    def __init__(self, work, model):
        super().__init__()
        self.work, self.model, self.loss = work, model, work.loss

    def training_step(self, batch, batch_idx):
        input, target = batch
        return self.loss(self.model(input), target)

    def configure_optimizers(self):
        return self.work.make_optimizer(self.parameters())


def train(work: Work, model, tape):
    trainer = L.Trainer(max_epochs=work.epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False,
                        plugins=MixedPrecision("16-mixed", device="cpu"), gradient_clip_val=work.max_norm)
    trainer.fit(Module(work, model), work.train_loader())
