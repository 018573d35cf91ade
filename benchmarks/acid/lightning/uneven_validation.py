"""validation_step logs the loss; Lightning averages it over the epoch."""
import lightning as L
from works import Work


class Module(L.LightningModule):
    def __init__(self, work, model):
        super().__init__()
        self.work, self.model, self.loss = work, model, work.loss

    def training_step(self, batch, batch_idx):
        input, target = batch
        return self.loss(self.model(input), target)

    def validation_step(self, batch, batch_idx):
        input, target = batch
        self.log("valid_loss", self.loss(self.model(input), target))

    def configure_optimizers(self):
        return self.work.make_optimizer(self.parameters())


def train(work: Work, model, tape):
    trainer = L.Trainer(max_epochs=work.epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(work, model), work.train_loader(), work.valid_loader())
    return {"valid_loss": trainer.callback_metrics["valid_loss"].item()}
