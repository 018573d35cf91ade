"""Multiply-adds (MACs) of a layer's forward pass, by a formula for each layer of `torch.nn`.

A formula gets the module, its arguments and its output, and reads only attributes and shapes.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from loopctl.data.batch import iter_tensors

# Takes the module, the arguments and the output of one call; returns its multiply-adds. It reads no weight, because
# reading a parametrized weight computes it.
Formula = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], int]


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str) -> Any:
    """Return an argument that was passed by position or by name."""
    return args[index] if index < len(args) else kwargs[name]


def linear(module: nn.Linear, args: Any, kwargs: Any, output: Any) -> int:
    return argument(args, kwargs, 0, "input").numel() * module.out_features


def bilinear(module: nn.Bilinear, args: Any, kwargs: Any, output: Any) -> int:
    """One multiply-add per weight and sample, as in a linear layer."""
    return argument(args, kwargs, 0, "input1").numel() * module.in2_features * module.out_features


def convolution(module: nn.Conv2d, args: Any, kwargs: Any, output: Any) -> int:
    """Each output element is a sum over a kernel window of the input channels of its group."""
    elements = sum(tensor.numel() for tensor in iter_tensors(output))
    return elements * (module.in_channels // module.groups) * math.prod(module.kernel_size)


def transposed(module: nn.ConvTranspose2d, args: Any, kwargs: Any, output: Any) -> int:
    """Each input element adds to a kernel window of the output channels of its group."""
    elements = argument(args, kwargs, 0, "input").numel()
    return elements * (module.out_channels // module.groups) * math.prod(module.kernel_size)


def recurrent(gates: int, module: nn.RNNBase, args: Any, kwargs: Any, output: Any) -> int:
    sequence = argument(args, kwargs, 0, "input")
    data = sequence.data if isinstance(sequence, nn.utils.rnn.PackedSequence) else sequence
    directions, returned = 1 + module.bidirectional, module.proj_size or module.hidden_size
    inputs = module.input_size + (module.num_layers - 1) * directions * returned            # features of all layers
    weights = gates * module.hidden_size * (inputs + module.num_layers * returned)
    weights += module.num_layers * module.proj_size * module.hidden_size
    return math.prod(data.shape[:-1]) * directions * weights


def cell(gates: int, module: nn.RNNCellBase, args: Any, kwargs: Any, output: Any) -> int:
    items = math.prod(argument(args, kwargs, 0, "input").shape[:-1])
    return items * gates * module.hidden_size * (module.input_size + module.hidden_size)


def attention(module: nn.MultiheadAttention, args: Any, kwargs: Any, output: Any) -> int:
    """The projections of query, key, value and output (it does not call out_proj), and the two matrix products."""
    query, key, value = (argument(args, kwargs, index, name) for index, name in enumerate(["query", "key", "value"]))
    queries = query.numel() // module.embed_dim
    if query.is_nested:
        pairs = sum(len(one) * len(other) for one, other in zip(query.unbind(), key.unbind(), strict=True))
    else:
        pairs = queries * key.shape[1 if module.batch_first and key.dim() == 3 else 0]
    pairs += queries * ((module.bias_k is not None) + module.add_zero_attn)                 # added keys
    return module.embed_dim * (2 * query.numel() + key.numel() + value.numel() + 2 * pairs)


FORMULAS: dict[Any, Formula] = {
    nn.Linear.forward: linear, nn.Bilinear.forward: bilinear,
    nn.Conv1d.forward: convolution, nn.Conv2d.forward: convolution, nn.Conv3d.forward: convolution,
    nn.ConvTranspose1d.forward: transposed, nn.ConvTranspose2d.forward: transposed,
    nn.ConvTranspose3d.forward: transposed,
    nn.RNN.forward: partial(recurrent, 1), nn.RNNCell.forward: partial(cell, 1),
    nn.GRU.forward: partial(recurrent, 3), nn.GRUCell.forward: partial(cell, 3),
    nn.LSTM.forward: partial(recurrent, 4), nn.LSTMCell.forward: partial(cell, 4),
    nn.MultiheadAttention.forward: attention,
}
# Layers with parameters but without matrix products; _NormBase is the base class of all batch and instance norms.
NO_MACS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding,
           nn.EmbeddingBag)


def macs_formula(module: nn.Module) -> Formula | None:
    """Return the formula for `module`, chosen by its forward method; None for a forward that is not known."""
    return FORMULAS.get(getattr(module.forward, "__func__", None))
