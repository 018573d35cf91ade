"""Which parameters usually have no weight decay: norms, biases, embeddings, tokens and positions."""
from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from torch import nn

from loopctl.model.own_names import own_parameters

Kind = Literal["norms", "biases", "embeddings", "tokens"]
# The last part of a name: bias, in_proj_bias, bias_ih_l0; cls_token, class_embedding, pos_embed, position_embeddings.
BIAS = re.compile(r"(^|_)bias(_|$)")
TOKEN = re.compile(r"(^|_)(tokens?|class_embedding|pos(ition|itional)?_emb\w*)$")


def undecayed_parameters(model: nn.Module, kinds: Collection[Kind]) -> set[nn.Parameter]:
    """Return the parameters of `model` that are of one of the `kinds`. A shared parameter is what it is anywhere.

    norms: the parameters of modules whose class has "Norm" in its name. biases: those with "bias" in their own name,
    such as also the table of relative positions of a Swin transformer. embeddings: the weights of nn.Embedding and
    nn.EmbeddingBag. tokens: class, mask and register tokens and embeddings of positions that are parameters
    themselves, by their names in timm, torchvision and CLIP, and what the model's own `no_weight_decay()` returns, as
    timm's and BEiT's models have it.
    """
    found: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_kind: dict[Kind, bool] = {
                "norms": "Norm" in type(module).__name__, "biases": bool(BIAS.search(name)),
                "embeddings": isinstance(module, nn.Embedding | nn.EmbeddingBag), "tokens": bool(TOKEN.search(name))}
            if any(is_kind[kind] for kind in kinds):
                found.add(parameter)
        if "tokens" in kinds and callable(own := getattr(module, "no_weight_decay", None)):
            excluded = set(own())
            found |= {parameter for name, parameter in own_parameters(module, remove_duplicate=False).items()
                      if name in excluded}
    return found
