"""BackupAndRestore, which saves after a number of batches and goes on in the next fit."""
import sys
from contextlib import suppress
from pathlib import Path

import keras
from works import Work

sys.path.append(str(Path(__file__).parent))
from keras_tape import SGD, note_updates


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, work: Work):
        self.work = work

    def __call__(self, step):
        return self.work.lr * self.work.factor(int(step))


class Interrupted(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    def __init__(self, work: Work):
        super().__init__()
        self.work = work

    def on_train_batch_end(self, batch, logs=None):
        if self.work.part == 1 and int(self.model.optimizer.iterations) == self.work.stop_after:
            raise Interrupted


def train(work: Work, model, tape):
    network = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(model)])
    network.compile(note_updates(SGD(Schedule(work), work.momentum), tape),
                    keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    backup = keras.callbacks.BackupAndRestore(str(work.folder), save_freq=work.stop_after)
    with suppress(Interrupted):
        network.fit(work.train_loader(), epochs=work.epochs, callbacks=[backup, Interrupt(work)], verbose=0)
