"""A process function, for the factory for trainers has no place between the backward pass and the step."""
from ignite.engine import Engine
from torch.nn.utils import clip_grad_norm_
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())

    def train_step(engine, batch):
        model.train()
        input, target = batch
        loss = work.loss(model(input), target) / work.accumulate
        loss.backward()
        if engine.state.iteration % work.accumulate == 0:
            clip_grad_norm_(model.parameters(), work.max_norm)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    Engine(train_step).run(work.train_loader(), max_epochs=work.epochs)
