"""An optimizer with gradient_accumulation_steps."""
import sys
from pathlib import Path

import keras
from works import Work

sys.path.append(str(Path(__file__).parent))
from keras_tape import note_updates


def train(work: Work, model, tape):
    network = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(model)])
    optimizer = keras.optimizers.SGD(work.lr, work.momentum, gradient_accumulation_steps=work.accumulate)
    network.compile(note_updates(optimizer, tape), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(work.train_loader(), epochs=work.epochs, verbose=0)
