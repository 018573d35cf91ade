"""EarlyStopping, and BackupAndRestore, which goes on in the next fit."""
import sys
from contextlib import suppress
from pathlib import Path

import keras
from works import Work

sys.path.append(str(Path(__file__).parent))
from keras_tape import note_updates


class Interrupted(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    def __init__(self, work: Work):
        super().__init__()
        self.work = work

    def on_epoch_end(self, epoch, logs=None):
        if self.work.part == 1 and epoch + 1 == self.work.stop_after:
            raise Interrupted


def train(work: Work, model, tape):
    network = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(model)])
    optimizer = keras.optimizers.SGD(work.lr, work.momentum)
    network.compile(note_updates(optimizer, tape), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=work.patience)
    backup = keras.callbacks.BackupAndRestore(str(work.folder))
    history = keras.callbacks.History()
    with suppress(Interrupted):
        network.fit(work.train_loader(), epochs=work.epochs, validation_data=work.valid_loader(), verbose=0,
                    callbacks=[stopping, history, backup, Interrupt(work)])
    return {"epochs": history.epoch[-1] + 1}
