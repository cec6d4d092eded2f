"""Structured pruning: whole channels are removed, so that file and latency really shrink."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from holotype.errors import ModelError, require
from holotype.models import Classifier, create, head_of
from holotype.models.widths import widths_of

__all__ = ["remove_channels"]


def remove_channels(classifier: Classifier, *, share: float, round_to: int) -> Classifier:
    """A copy without `share` of its channels, the least important of all layers together.

    What must go together (the two sides of a sum, a depthwise convolution and what feeds it) is found by
    tracing (Fang et al. 2023, DepGraph); a group counts by the norm of its weights. Layers keep a multiple of
    `round_to` channels; the classes stay. `ModelError` where the architecture's channels cannot be traced.
    """
    tp = require("torch_pruning", extra="train", purpose="structured pruning")
    pruned = copy.deepcopy(classifier).cpu().float().eval()
    size = classifier.architecture.height, classifier.architecture.width
    example = torch.zeros((1, *size, 3), dtype=torch.uint8)
    for parameter in pruned.parameters():
        parameter.requires_grad_(True)
    with warnings.catch_warnings(), _traceable(classifier):
        warnings.simplefilter("ignore")  # about scales of residual branches, which it prunes rightly
        pruner = tp.pruner.BasePruner(
            pruned,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            global_pruning=True,
            max_pruning_ratio=min(share + 0.3, 0.9),
            isomorphic=True,
            ignored_layers=[head_of(pruned).layer],
            round_to=round_to,
            num_heads=_heads(pruned),
        )
        pruner.step()
        plain = create(classifier.architecture.model_copy(update={"widths": {}}))
        widths = widths_of(pruned.network, plain.network)
        architecture = classifier.architecture.model_copy(update={"widths": widths})
        narrow = create(architecture).eval()
        narrow.network.load_state_dict(pruned.network.state_dict())
        narrow(example)
    return narrow


@contextmanager
def _traceable(classifier: Classifier) -> Iterator[None]:
    """Whatever breaks inside, in torch-pruning or in the network it made, is a `ModelError`."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(
            f"its channels cannot be pruned ({type(error).__name__}: {error})",
            where=classifier.architecture.name,
            fix="leave structured out of methods",
        ) from error


def _heads(classifier: Classifier) -> dict[nn.Module, int]:
    """Attention layers, whose channels are pruned head by head."""
    heads: dict[nn.Module, int] = {}
    for module in classifier.modules():
        layer, count = getattr(module, "qkv", None), getattr(module, "num_heads", None)
        if isinstance(layer, nn.Module) and isinstance(count, int):
            heads[layer] = count
    return heads
