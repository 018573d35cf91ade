"""`EarlyStopping`, attached to the evaluator, and a `Checkpoint` that has its state."""
import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, EarlyStopping
from ignite.metrics import Loss
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    trainer = create_supervised_trainer(model, optimizer, work.loss)
    evaluator = create_supervised_evaluator(model, {"loss": Loss(work.loss)})
    stopper = EarlyStopping(work.patience, lambda engine: -engine.state.metrics["loss"], trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(work.valid_loader()))
    evaluator.add_event_handler(Events.COMPLETED, stopper)
    objects = {"trainer": trainer, "model": model, "optimizer": optimizer, "stopper": stopper}
    if work.part == 1:
        stop = Events.EPOCH_COMPLETED(once=work.stop_after)
        trainer.add_event_handler(stop, Checkpoint(objects, DiskSaver(work.folder / "saved")))
        trainer.add_event_handler(stop, trainer.terminate)
    else:
        file, = (work.folder / "saved").iterdir()
        Checkpoint.load_objects(objects, torch.load(file, weights_only=False))
    trainer.run(work.train_loader(), max_epochs=work.epochs)
    return {"epochs": trainer.state.epoch}
