"""A schedule counts batches, as the documentation of the optimizers says, so it is written in batches."""
import sys
from pathlib import Path

import keras
from works import Work

sys.path.append(str(Path(__file__).parent))
from keras_tape import SGD, note_updates


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, work: Work):
        self.work = work

    def __call__(self, step):
        return self.work.lr * self.work.factor(int(step) // self.work.accumulate)


def train(work: Work, model, tape):
    network = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(model)])
    optimizer = SGD(Schedule(work), work.momentum, gradient_accumulation_steps=work.accumulate)
    network.compile(note_updates(optimizer, tape), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(work.train_loader(), epochs=work.epochs, verbose=0)
