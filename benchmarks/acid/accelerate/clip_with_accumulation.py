"""`accumulate`, and `clip_grad_norm_` where `sync_gradients` says that the update is whole."""
from accelerate import Accelerator
from works import Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=work.accumulate)
    model, optimizer, loader = accelerator.prepare(model, work.make_optimizer(model.parameters()), work.train_loader())
    for _ in range(work.epochs):
        for input, target in loader:
            with accelerator.accumulate(model):
                accelerator.backward(work.loss(model(input), target))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), work.max_norm)
                optimizer.step()
                optimizer.zero_grad()
