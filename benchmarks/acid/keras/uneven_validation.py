"""The val_loss of fit, with validation data."""
import sys
from pathlib import Path

import keras
from works import Work

sys.path.append(str(Path(__file__).parent))
from keras_tape import note_updates


def train(work: Work, model, tape):
    network = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(model)])
    optimizer = keras.optimizers.SGD(work.lr, work.momentum)
    network.compile(note_updates(optimizer, tape), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = network.fit(work.train_loader(), epochs=work.epochs, validation_data=work.valid_loader(), verbose=0)
    return {"valid_loss": history.history["val_loss"][-1]}
