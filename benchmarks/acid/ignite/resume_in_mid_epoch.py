"""`Checkpoint` of trainer, model, optimizer and schedule, with the deterministic engine, which resumes in an epoch."""
import torch
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, LRScheduler
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    trainer = create_supervised_trainer(model, optimizer, work.loss, deterministic=True)
    scheduler = LRScheduler(work.make_schedule(optimizer))
    trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
    objects = {"trainer": trainer, "model": model, "optimizer": optimizer, "scheduler": scheduler}
    if work.part == 1:
        stop = Events.ITERATION_COMPLETED(once=work.stop_after)
        trainer.add_event_handler(stop, Checkpoint(objects, DiskSaver(work.folder / "saved")))
        trainer.add_event_handler(stop, trainer.terminate)
    else:
        file, = (work.folder / "saved").iterdir()
        Checkpoint.load_objects(objects, torch.load(file, weights_only=False))
    trainer.run(work.train_loader(), max_epochs=work.epochs)
