"""Keras has no L-BFGS."""
from works import NotOffered, Work


def train(work: Work, model, tape):
    raise NotOffered("keras.optimizers has no L-BFGS, and its optimizers take gradients, not a function that gives the "
                     "loss again")
