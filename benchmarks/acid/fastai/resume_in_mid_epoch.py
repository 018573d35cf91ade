"""`fit` has `start_epoch`, and nothing for a batch."""
from works import NotOffered, Work


def train(work: Work, model, tape):
    raise NotOffered("fit(start_epoch=N) goes on with the first batch of an epoch")
