"""`fp16=True`, which scales the loss on a GPU only, and a schedule of torch."""
import torch
from transformers import Trainer, TrainingArguments
from works import NeedsGpu, Work


def collate(samples):
    input, labels = zip(*samples, strict=True)
    return {"input": torch.stack(input), "labels": torch.stack(labels)}


def train(work: Work, model, tape):
    arguments = TrainingArguments(
        work.folder, use_cpu=True, per_device_train_batch_size=work.batch_size, num_train_epochs=work.epochs,
        train_sampling_strategy="sequential", max_grad_norm=0.0, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", fp16=True)

    def compute_loss(output, labels, num_items_in_batch):
        return work.loss(output, labels) * len(labels) / num_items_in_batch

    optimizer = work.make_optimizer(model.parameters())
    trainer = Trainer(model, arguments, collate, work.train_data, compute_loss_func=compute_loss,
                      optimizers=(optimizer, work.make_schedule(optimizer)))
    if trainer.accelerator.scaler is None:
        raise NeedsGpu("on the CPU fp16=True is accepted, and trains in float32")
    trainer.train()
