"""Which parameters are the matrices of a model's hidden layers, for which optimizers such as Muon are made."""
from __future__ import annotations

from torch import nn

from loopctl.model.weight_decay import undecayed_parameters


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `model` with two dimensions that belong to its hidden layers, in the model's order.

    Left out are the output layer, which is the last module with a weight of two or more dimensions, and norms, biases,
    embeddings, tokens and positions, as `undecayed_parameters` finds them. A weight that the output layer shares with
    an embedding is left out too. The first layer of a model without embeddings counts as hidden.
    """
    others = undecayed_parameters(model, ("norms", "biases", "embeddings", "tokens"))
    output: list[nn.Parameter] = []
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= 2]
        if own and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            output = own
    left_out = others.union(output)
    return [parameter for parameter in model.parameters() if parameter.ndim == 2 and parameter not in left_out]
