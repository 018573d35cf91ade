"""The loop of benchmarks/overhead.py and compose.py in other libraries, one small function each.

Each is as lean as its library lets it be: no logging, no checkpoints, no progress bar, no validation, and nothing read
from the device where that can be turned off. Each takes torch's own SGD, except Keras, which has its own.
"""
from __future__ import annotations

import logging
import os
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from tempfile import TemporaryDirectory

import torch
from packaging.requirements import Requirement
from timing import LR, Batches, make, sgd
from torch import nn
from torch.nn.functional import cross_entropy

os.environ["KERAS_BACKEND"] = "torch"
for name in ("lightning.pytorch", "composer", "mmengine"):
    logging.getLogger(name).setLevel(logging.ERROR)


def titled(package: str) -> str:
    """The package with its version, and whether it asks for another torch than there is."""
    try:
        found = f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
    asked = [Requirement(text) for text in requires(package) or () if ";" not in text]
    return found + "".join(f" (asks for torch{one.specifier})" for one in asked
                           if one.name == "torch" and not one.specifier.contains(version("torch")))


def ignite(batches: Batches) -> nn.Module:
    from ignite.engine import create_supervised_trainer

    net = make()
    # Its default output_transform is loss.item().
    create_supervised_trainer(net, sgd(net.parameters()), nn.CrossEntropyLoss(),
                              output_transform=lambda x, y, output, loss: loss).run(batches, max_epochs=1)
    return net


def poutyne(batches: Batches) -> nn.Module:
    from poutyne import Model

    net = make()
    Model(net, sgd(net.parameters()), nn.CrossEntropyLoss()).fit_generator(batches, epochs=1, verbose=False)
    return net


def skorch(batches: Batches) -> nn.Module:
    from skorch import NeuralNet

    net = NeuralNet(make(), nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=LR, max_epochs=1, train_split=None,
                    iterator_train=lambda *_, **__: batches, callbacks="disable", verbose=0)
    net.fit(batches.dataset)
    return net.module_


def mmengine(batches: Batches) -> nn.Module:
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, input, target, mode):
            return {"loss": cross_entropy(self.net(input), target)}

    net = Model()
    hooks = dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"))
    with TemporaryDirectory() as folder:
        Runner(net, folder, batches, train_cfg={"by_epoch": True, "max_epochs": 1}, default_hooks=hooks,
               optim_wrapper={"optimizer": sgd(net.parameters())}, log_level="ERROR").train()
    return net


def torchtnt(batches: Batches) -> nn.Module:
    from torchtnt.framework.train import train
    from torchtnt.framework.unit import TrainUnit

    class Unit(TrainUnit):
        def __init__(self):
            super().__init__()
            self.net = make()
            self.optimizer = sgd(self.net.parameters())

        def train_step(self, state, data):
            input, target = data
            self.optimizer.zero_grad()
            cross_entropy(self.net(input), target).backward()
            self.optimizer.step()

    unit = Unit()
    train(unit, batches, max_epochs=1)
    return unit.net


def torchtnt_auto(batches: Batches, steps: int = 0, **settings: object) -> nn.Module:
    """Its AutoUnit, which makes the update itself; `settings` and a cosine over `steps` are for the composition."""
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.train import train

    class Unit(AutoUnit):
        def compute_loss(self, state, data):
            input, target = data
            output = self.module(input)
            return cross_entropy(output, target), output

        def configure_optimizers_and_lr_scheduler(self, module):
            optimizer = sgd(module.parameters())
            return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if steps else None

    net = make()
    train(Unit(module=net, device=torch.device("cpu"), **settings), batches, max_epochs=1)
    return net


def accelerate(batches: Batches) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = make()
    network, optimizer = accelerator.prepare(net, sgd(net.parameters()))     # the batches are where they are needed
    for input, target in batches:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(network(input), target))
        optimizer.step()
    return net


def lightning(batches: Batches, steps: int = 0, **settings: object) -> nn.Module:
    """`settings` and a cosine over `steps` are for the composition."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make()

        def training_step(self, batch, index):
            input, target = batch
            return cross_entropy(self.net(input), target)

        def configure_optimizers(self):
            optimizer = sgd(self.parameters())
            if not steps:
                return optimizer
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Module()
    # Its own mode for measuring: all that may cost time is off.
    lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True, **settings).fit(module, batches)
    return module.net


def transformers(batches: Batches, **settings: object) -> nn.Module:
    """`settings` are for the composition."""
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()

    class Plain(Trainer):
        def get_train_dataloader(self):
            return batches

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            input, target = inputs
            return cross_entropy(model(input), target)

    net = make()
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(**{
            "output_dir": folder, "num_train_epochs": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no",
            "logging_strategy": "no", "logging_nan_inf_filter": False, "disable_tqdm": True, "max_grad_norm": 0,
            "lr_scheduler_type": "constant", **settings})
        trainer = Plain(net, arguments, train_dataset=batches.dataset, optimizers=(sgd(net.parameters()), None))
        trainer.train()
    return net


def fastai(batches: Batches) -> nn.Module:
    from fastai.callback.core import TrainEvalCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    net = make()
    learner = Learner(DataLoaders(batches, []), net, nn.CrossEntropyLoss(), partial(OptimWrapper, opt=torch.optim.SGD),
                      lr=LR, cbs=TrainEvalCallback(), default_cbs=False)
    learner.fit(1)
    return net


def composer(batches: Batches) -> nn.Module:
    from composer import ComposerModel, Trainer

    class Model(ComposerModel):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, batch):
            return self.net(batch[0])

        def loss(self, outputs, batch):
            return cross_entropy(outputs, batch[1])

    net = Model()
    trainer = Trainer(model=net, train_dataloader=batches, max_duration="1ep", optimizers=sgd(net.parameters()),
                      device="cpu", progress_bar=False, log_to_console=False, device_train_microbatch_size=32)
    trainer.fit()
    trainer.close()
    return net


def keras(batches: Batches) -> nn.Module:
    import keras

    first, _, last = net = make()
    model = keras.Sequential([keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)])
    model.build((32, 64))
    model.set_weights([tensor.detach().numpy() for tensor in (first.weight.T, first.bias, last.weight.T, last.bias)])
    model.compile(keras.optimizers.SGD(LR), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(batches, epochs=1, verbose=0)
    trained = [torch.tensor(array) for array in model.get_weights()]
    with torch.no_grad():                   # it keeps matrices the other way round
        for parameter, tensor in zip(net.parameters(), trained, strict=True):
            parameter.copy_(tensor.T if tensor.ndim == 2 else tensor)
    return net


PEERS = {
    "pytorch-ignite": ignite, "poutyne": poutyne, "skorch": skorch, "mmengine": mmengine, "torchtnt": torchtnt,
    "accelerate": accelerate, "lightning": lightning, "transformers": transformers, "fastai": fastai,
    "mosaicml": composer, "keras": keras,
}
