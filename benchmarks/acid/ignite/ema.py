"""`EMAHandler` after every second iteration; a warm-up momentum of 1 makes it begin with the first weights it sees."""
import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import EMAHandler
from ignite.metrics import Loss
from works import Work


def train(work: Work, model, tape):
    trainer = create_supervised_trainer(model, work.make_optimizer(model.parameters()), work.loss,
                                        gradient_accumulation_steps=work.accumulate)
    handler = EMAHandler(model, momentum=1 - work.ema_decay, momentum_warmup=1.0, warmup_iters=2)
    handler.attach(trainer, event=Events.ITERATION_COMPLETED(every=work.accumulate))
    trainer.run(work.train_loader(), max_epochs=work.epochs)
    evaluator = create_supervised_evaluator(handler.ema_model, {"loss": Loss(work.loss)})
    evaluator.run(work.valid_loader())
    return {"average": torch.cat([weight.detach().flatten() for weight in handler.ema_model.parameters()]),
            "valid_loss": evaluator.state.metrics["loss"]}
