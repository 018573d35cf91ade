"""An optimizer of torch with two groups."""
from ignite.engine import create_supervised_trainer
from works import Work


def train(work: Work, model, tape):
    trainer = create_supervised_trainer(model, work.make_optimizer(work.parameter_groups(model)), work.loss)
    trainer.run(work.train_loader(), max_epochs=work.epochs)
