"""A process function that gives the optimizer a closure."""
from ignite.engine import Engine
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())

    def train_step(engine, batch):
        model.train()
        input, target = batch

        def closure():
            optimizer.zero_grad()
            loss = work.loss(model(input), target)
            loss.backward()
            return loss
        return optimizer.step(closure).item()

    Engine(train_step).run(work.train_loader(), max_epochs=work.epochs)
