"""The metric `Loss` of an evaluator, run after the training."""
from ignite.engine import create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Loss
from works import Work


def train(work: Work, model, tape):
    trainer = create_supervised_trainer(model, work.make_optimizer(model.parameters()), work.loss)
    trainer.run(work.train_loader(), max_epochs=work.epochs)
    evaluator = create_supervised_evaluator(model, {"loss": Loss(work.loss)})
    evaluator.run(work.valid_loader())
    return {"valid_loss": evaluator.state.metrics["loss"]}
