"""The documented trigger for early stopping; what it counts is an object registered for checkpointing."""
import torch
from accelerate import Accelerator
from works import Work


class Patience:
    """Counts the evaluations that were not better than the best."""

    def __init__(self):
        self.best, self.waited, self.epochs = float("inf"), 0, 0

    def state_dict(self):
        return vars(self).copy()

    def load_state_dict(self, state):
        vars(self).update(state)

    def saw(self, loss):
        self.best, self.waited = (loss, 0) if loss < self.best else (self.best, self.waited + 1)
        self.epochs += 1


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, valid_loader = accelerator.prepare(
        model, work.make_optimizer(model.parameters()), work.train_loader(), work.valid_loader())
    patience = Patience()
    accelerator.register_for_checkpointing(patience)
    if work.part == 2:
        accelerator.load_state(work.folder / "state")
    while patience.epochs < work.epochs:
        model.train()
        for input, target in loader:
            accelerator.backward(work.loss(model(input), target))
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            gathered = [accelerator.gather_for_metrics((model(input), target)) for input, target in valid_loader]
        patience.saw(work.loss(*map(torch.cat, zip(*gathered, strict=True))).item())
        if work.part == 1 and patience.epochs == work.stop_after:
            accelerator.save_state(work.folder / "state")
            break
        if patience.waited >= work.patience:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            break
    return {"epochs": patience.epochs}
