"""The plugin ema. Evaluations are of the average, which the model has at the end."""
import torch
from works import Work

from loopctl import fit


def train(work: Work, model, tape):
    run = fit(model, work.loss, work.make_optimizer, work.train_loader(), work.valid_loader(), epochs=work.epochs,
              plugins=[f"accumulate:every={work.accumulate}", f"ema:decay={work.ema_decay},warmup=false"])
    return {"average": torch.cat([weight.detach().flatten() for weight in model.parameters()]),
            "valid_loss": run.history[-1]["val_loss"]}
