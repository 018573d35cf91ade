"""A checkpoint in the middle of an epoch, and fit(ckpt_path=...), with a data loader that has a state.

With torch's own DataLoader, Lightning begins the epoch anew, and warns of it; a loader with state_dict is its way out.
"""
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader
from works import Work


class Module(L.LightningModule):
    def __init__(self, work, model):
        super().__init__()
        self.work, self.model, self.loss = work, model, work.loss

    def training_step(self, batch, batch_idx):
        input, target = batch
        return self.loss(self.model(input), target)

    def configure_optimizers(self):
        optimizer = self.work.make_optimizer(self.parameters())
        schedule = self.work.make_schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(work: Work, model, tape):
    save = ModelCheckpoint(work.folder, filename="part", every_n_train_steps=work.stop_after)
    trainer = L.Trainer(max_epochs=work.epochs, max_steps=work.stop_after if work.part == 1 else -1, accelerator="cpu",
                        devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                        callbacks=[save] if work.part == 1 else [], enable_checkpointing=work.part == 1)
    loader = StatefulDataLoader(work.train_data, work.batch_size)
    trainer.fit(Module(work, model), loader, ckpt_path=work.folder / "part.ckpt" if work.part == 2 else None)
