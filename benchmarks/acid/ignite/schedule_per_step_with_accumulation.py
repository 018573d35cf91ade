"""The handler for a schedule of torch, called at the start of every fourth iteration, which is that with the step."""
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import LRScheduler
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    trainer = create_supervised_trainer(model, optimizer, work.loss, gradient_accumulation_steps=work.accumulate)
    trainer.add_event_handler(Events.ITERATION_STARTED(every=work.accumulate),
                              LRScheduler(work.make_schedule(optimizer)))
    trainer.run(work.train_loader(), max_epochs=work.epochs)
