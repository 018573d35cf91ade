"""torch's average, updated by a callback after the step of the optimizer."""
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainingArguments
from works import Work


def collate(samples):
    input, labels = zip(*samples, strict=True)
    return {"input": torch.stack(input), "labels": torch.stack(labels)}


class Average(TrainerCallback):
    def __init__(self, average):
        self.average = average

    def on_optimizer_step(self, args, state, control, model, **others):
        self.average.update_parameters(model)


def train(work: Work, model, tape):
    arguments = TrainingArguments(
        work.folder, use_cpu=True, per_device_train_batch_size=work.batch_size, num_train_epochs=work.epochs,
        train_sampling_strategy="sequential", max_grad_norm=0.0, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", gradient_accumulation_steps=work.accumulate,
        prediction_loss_only=True, label_names=["labels"])

    def compute_loss(output, labels, num_items_in_batch):
        return work.loss(output, labels) * len(labels) / num_items_in_batch

    optimizer = work.make_optimizer(model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(work.ema_decay))
    Trainer(model, arguments, collate, work.train_data, compute_loss_func=compute_loss,
            optimizers=(optimizer, None), callbacks=[Average(average)]).train()
    evaluated = Trainer(average.module, arguments, collate, compute_loss_func=compute_loss).evaluate(work.valid_data)
    return {"average": torch.cat([weight.detach().flatten() for weight in average.module.parameters()]),
            "valid_loss": evaluated["eval_loss"]}
