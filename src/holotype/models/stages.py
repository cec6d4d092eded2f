"""The parts of a backbone from the input to the output: what is frozen, and what has a rate of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from holotype.models.architecture import Classifier, head_of

__all__ = ["Stage", "blocks", "stages"]


@dataclass(frozen=True)
class Stage:
    """One of a model's own stages: its name, and all of its parameters."""

    name: str
    parameters: tuple[nn.Parameter, ...]


def stages(classifier: Classifier) -> tuple[Stage, ...]:
    """The model's own stages from the input to the output: stem, stage 1 to n, final; no head.

    As timm groups its layers coarsely: a CNN's resolutions, the blocks of a ViT. "final" is what lies between
    the last stage and the head, such as a norm, where timm does not count it as part of that stage.
    """
    groups = _groups(classifier, coarse=True)
    names = ["stem", *(f"stage {number}" for number in range(1, len(groups)))]
    if groups[-1].beside_head:
        names[-1] = "final"
    return tuple(Stage(name, tuple(group.parameters)) for name, group in zip(names, groups, strict=True))


def blocks(classifier: Classifier) -> list[list[nn.Parameter]]:
    """The backbone's parameters from the input to the output, in timm's own layer groups; no head."""
    return [group.parameters for group in _groups(classifier, coarse=False)]


@dataclass(frozen=True)
class _Group:
    """Parameters of the backbone that belong together, and whether timm counts the head among them."""

    parameters: list[nn.Parameter]
    beside_head: bool


def _groups(classifier: Classifier, *, coarse: bool) -> list[_Group]:
    network = cast("Any", classifier.network)
    head = {id(parameter) for parameter in head_of(classifier).layer.parameters()}
    parameters = dict(network.named_parameters())
    found = []
    for names in _layers(network, coarse=coarse):
        group = [parameters[name] for name in names]
        backbone = [parameter for parameter in group if id(parameter) not in head]
        if backbone:
            found.append(_Group(backbone, beside_head=len(backbone) < len(group)))
    return found


def _layers(network: Any, *, coarse: bool) -> list[list[str]]:
    """Names of parameters by timm's groups, or by the network's top modules where timm has no groups."""
    from timm.models import group_parameters

    try:
        matcher = network.group_matcher(coarse=coarse)
    except (AttributeError, AssertionError):  # not written for this family, or not at this grain
        tops: dict[str, list[str]] = {}
        for name, _ in network.named_parameters():
            top = name.partition(".")[0] if "." in name else ""  # tokens and positions belong to the stem
            tops.setdefault(top, []).append(name)
        tokens = tops.pop("", [])
        first, *others = tops.values()
        return [tokens + first, *others]
    return [names for _, names in sorted(group_parameters(network, matcher).items())]
