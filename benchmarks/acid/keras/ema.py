"""An optimizer with use_ema and gradient_accumulation_steps; fit ends with the average in the model."""
import sys
from pathlib import Path

import keras
import torch
from works import Work

sys.path.append(str(Path(__file__).parent))
from keras_tape import note_updates


def train(work: Work, model, tape):
    network = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(model)])
    optimizer = keras.optimizers.SGD(work.lr, work.momentum, gradient_accumulation_steps=work.accumulate,
                                     use_ema=True, ema_momentum=work.ema_decay)
    network.compile(note_updates(optimizer, tape), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(work.train_loader(), epochs=work.epochs, verbose=0)
    loss = network.evaluate(work.valid_loader(), verbose=0)
    return {"average": torch.cat([weight.detach().flatten() for weight in model.parameters()]), "valid_loss": loss}
