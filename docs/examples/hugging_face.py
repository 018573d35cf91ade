"""A model of Hugging Face's transformers, with its own loss: it tells lines of Python from lines of its manual."""
import inspect
import re
from functools import partial
from pydoc_data.topics import topics
from zlib import crc32

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from loopctl import fit
from loopctl.metrics.named import accuracy


def tokenize(line):
    """The words and signs of a line as numbers from 1, by a hash, so that no tokenizer has to be downloaded."""
    return torch.tensor([1 + crc32(word.encode()) % 999 for word in re.findall(r"\w+|[^\w\s]", line)][:32])


def collate(samples):
    """A batch as the model takes it: a dict of its arguments, with all lines filled up to the longest."""
    tokens = pad_sequence([tokens for tokens, _ in samples], batch_first=True)
    labels = torch.tensor([label for _, label in samples])
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": labels}


def data(batch_size: int = 32):
    """Lines of Python's module inspect, label 1, and of its manual, label 0; every fifth is to validate on."""
    texts = "\n".join(topics[name] for name in sorted(topics)), inspect.getsource(inspect)
    prose, code = ([line for line in text.splitlines() if len(line.strip()) > 20] for text in texts)
    samples = [(tokenize(line), label) for pair in zip(prose, code, strict=False) for label, line in enumerate(pair)]
    train, valid = [sample for number, sample in enumerate(samples) if number % 5], samples[::5]
    return [DataLoader(part, batch_size, shuffle=part is train, collate_fn=collate) for part in (train, valid)]


def model(width: int = 32, layers: int = 2):
    """A small BERT with random weights; `BertForSequenceClassification.from_pretrained(NAME)` has trained ones."""
    return BertForSequenceClassification(BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=32, num_labels=2))


def main():
    torch.manual_seed(0)
    train, valid = data()
    return fit(
        model(), None, partial(torch.optim.AdamW, lr=0.005), train, valid, epochs=2, metrics={"accuracy": accuracy},
        seed=0, plugins=["clip:max_norm=1", "warmup:length=10%,start_factor=0",
                         "linear:by=step,start=10%,start_factor=1,end_factor=0,total_iters=none"])


if __name__ == "__main__":
    print(main().history[-1])
