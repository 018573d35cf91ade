"""AdamW with exclude_from_weight_decay, and the epsilon of torch."""
import sys
from pathlib import Path

import keras
from works import Work

sys.path.append(str(Path(__file__).parent))
from keras_tape import note_updates


def train(work: Work, model, tape):
    network = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(model)])
    optimizer = keras.optimizers.AdamW(work.lr, work.weight_decay, epsilon=1e-8)
    optimizer.exclude_from_weight_decay([each for each in network.trainable_variables if len(each.shape) == 1])
    network.compile(note_updates(optimizer, tape), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(work.train_loader(), epochs=work.epochs, verbose=0)
