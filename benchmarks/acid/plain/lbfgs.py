"""L-BFGS with a closure."""
from works import Work


def train(work: Work, model, tape):
    optimizer = work.make_optimizer(model.parameters())
    for _ in range(work.epochs):
        for input, target in work.train_loader():

            def closure(input=input, target=target):
                optimizer.zero_grad()
                loss = work.loss(model(input), target)
                loss.backward()
                return loss.detach()
            optimizer.step(closure)
