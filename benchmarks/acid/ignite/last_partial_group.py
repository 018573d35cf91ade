"""`gradient_accumulation_steps` of the factory for trainers."""
from ignite.engine import create_supervised_trainer
from works import Work


def train(work: Work, model, tape):
    trainer = create_supervised_trainer(model, work.make_optimizer(model.parameters()), work.loss,
                                        gradient_accumulation_steps=work.accumulate)
    trainer.run(work.train_loader(), max_epochs=work.epochs)
