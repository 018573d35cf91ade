"""`EarlyStoppingCallback`, and the option that restores the states of callbacks."""
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from works import Work


def collate(samples):
    input, labels = zip(*samples, strict=True)
    return {"input": torch.stack(input), "labels": torch.stack(labels)}


def train(work: Work, model, tape):
    arguments = TrainingArguments(
        work.folder, use_cpu=True, per_device_train_batch_size=work.batch_size, num_train_epochs=work.epochs,
        train_sampling_strategy="sequential", max_grad_norm=0.0, lr_scheduler_type="constant",
        report_to="none", save_strategy="epoch", eval_strategy="epoch", per_device_eval_batch_size=work.batch_size,
        metric_for_best_model="loss", restore_callback_states_from_checkpoint=True, prediction_loss_only=True,
        label_names=["labels"])

    def compute_loss(output, labels, num_items_in_batch):
        return work.loss(output, labels) * len(labels) / num_items_in_batch

    if work.part == 1:
        arguments.num_train_epochs = work.stop_after
    optimizer = work.make_optimizer(model.parameters())
    trainer = Trainer(model, arguments, collate, work.train_data, work.valid_data, compute_loss_func=compute_loss,
                      optimizers=(optimizer, None), callbacks=[EarlyStoppingCallback(work.patience)])
    trainer.train(resume_from_checkpoint=work.part == 2)
    return {"epochs": round(trainer.state.epoch)}
