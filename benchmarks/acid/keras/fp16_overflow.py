"""LossScaleOptimizer, with torch's autocast: the policy mixed_float16 does not cast the weights of a torch module."""
import sys
from pathlib import Path

import keras
import torch
from works import Work

sys.path.append(str(Path(__file__).parent))
from keras_tape import note_updates


class Network(keras.Model):
    def __init__(self, model):
        super().__init__()
        self.inner = keras.layers.TorchModuleWrapper(model)

    def call(self, input, training=None):
        with torch.autocast("cpu", torch.float16):
            return self.inner(input, training=training)


def train(work: Work, model, tape):
    network = Network(model)
    optimizer = keras.optimizers.SGD(work.lr, work.momentum, global_clipnorm=work.max_norm)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0 ** 16)
    network.compile(note_updates(optimizer, tape), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(work.train_loader(), epochs=work.epochs, verbose=0)
