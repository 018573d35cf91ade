"""The callback EarlyStopping, a checkpoint, and fit(ckpt_path=...)."""
import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
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
    callbacks = [EarlyStopping("valid_loss", patience=work.patience),
                 ModelCheckpoint(work.folder, monitor=None, filename="last")]
    trainer = L.Trainer(max_epochs=work.stop_after if work.part == 1 else work.epochs, accelerator="cpu", devices=1,
                        logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks)
    trainer.fit(Module(work, model), work.train_loader(), work.valid_loader(),
                ckpt_path=work.folder / "last.ckpt" if work.part == 2 else None)
    return {"epochs": trainer.current_epoch}
