"""`auto_model`, `auto_optim` and `auto_dataloader`, which splits the batch size among the processes."""
import ignite.distributed as idist
from ignite.engine import create_supervised_trainer
from works import Work


def train(work: Work, model, tape):
    with idist.Parallel("gloo") as parallel:
        parallel.run(train_process, work, model)


def train_process(rank, work, model):
    loader = idist.auto_dataloader(work.train_data, batch_size=work.batch_size * work.processes, shuffle=False)
    model = idist.auto_model(model)
    optimizer = idist.auto_optim(work.make_optimizer(model.parameters()))
    create_supervised_trainer(model, optimizer, work.loss).run(loader, max_epochs=work.epochs)
