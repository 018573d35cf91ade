"""`save_steps`, a callback that stops after saving, and `resume_from_checkpoint`."""
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from works import Work


def collate(samples):
    input, labels = zip(*samples, strict=True)
    return {"input": torch.stack(input), "labels": torch.stack(labels)}


class Stop(TrainerCallback):
    def on_save(self, args, state, control, **others):
        control.should_training_stop = True


def train(work: Work, model, tape):
    arguments = TrainingArguments(
        work.folder, use_cpu=True, per_device_train_batch_size=work.batch_size, num_train_epochs=work.epochs,
        train_sampling_strategy="sequential", max_grad_norm=0.0, lr_scheduler_type="constant",
        report_to="none", save_steps=work.stop_after)

    def compute_loss(output, labels, num_items_in_batch):
        return work.loss(output, labels) * len(labels) / num_items_in_batch

    optimizer = work.make_optimizer(model.parameters())
    trainer = Trainer(model, arguments, collate, work.train_data, compute_loss_func=compute_loss,
                      optimizers=(optimizer, work.make_schedule(optimizer)), callbacks=[Stop()] * (work.part == 1))
    trainer.train(resume_from_checkpoint=work.part == 2)
