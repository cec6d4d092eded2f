"""What is trained and what stays as it is: frozen stages, gradual unfreezing, batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from holotype.config import FitConfig
from holotype.errors import ConfigError
from holotype.models import Classifier, Stage, blocks, fresh_parts, head_of, stages

__all__ = ["FreezePlan", "apply_freezing", "training_mode"]

# The first blocks are the slowest (their maps are the largest) and the most general.
_MOST = 0.6


@dataclass(frozen=True)
class FreezePlan:
    """Which of a model's stages have no trained parameter, or only some; how many parameters are trained.

    `fresh` is what is trained within stages that are frozen, as it is random: it is left out of the others.
    """

    stages: tuple[str, ...]
    frozen: tuple[str, ...]
    partly: tuple[str, ...]
    fresh: tuple[str, ...]
    trained: int
    total: int

    @property
    def summary(self) -> str:
        """One line to print."""
        counts = f"training {_count(self.trained)} of {_count(self.total)} parameters"
        held = " to ".join(dict.fromkeys((self.frozen[0], self.frozen[-1]))) if self.frozen else ""
        parts = [*([held] if held else []), *(f"part of {name}" for name in self.partly)]
        but = f", but for the fresh {' and '.join(self.fresh)}" if self.fresh else ""
        return f"frozen: {' and '.join(parts) or 'nothing'}{but} (of {len(self.stages)} stages); {counts}"

    def opening(self, before: FreezePlan, *, epoch: int) -> str:
        """One line to print where the epoch `before` had another plan."""
        opened = [name for name in before.frozen if name not in self.frozen]
        return f"from epoch {epoch} on {' and '.join(opened)} is trained too; {self.summary}"


def apply_freezing(classifier: Classifier, config: FitConfig, *, epoch: int) -> FreezePlan:
    """Set what is trained in an epoch, counted from 1; depends on nothing but the arguments.

    At most the last `unfreeze` blocks, or all but the first `freeze` stages. With `gradual` k, of these only
    the last stage in the first k epochs, and one more for every k epochs after that; what lies between the
    last stage and the head goes with it. The head is always trained, and so is what is fresh beside
    pretrained weights, which frozen would stay random. `ConfigError` for more than there are.
    """
    own = stages(classifier)
    allowed = _after_stages(own, config) if config.freeze is not None else _last_blocks(classifier, config)
    if config.gradual:
        opened = 1 + (epoch - 1) // config.gradual + (own[-1].name == "final")
        allowed &= _ids(parameter for stage in own[-opened:] for parameter in stage.parameters)
    allowed |= _ids(head_of(classifier).layer.parameters())
    fresh = {
        name: parameter
        for name, parameter in classifier.network.named_parameters()
        if name in classifier.fresh and id(parameter) not in allowed
    }
    allowed |= _ids(fresh.values())
    for parameter in classifier.parameters():
        parameter.requires_grad_(id(parameter) in allowed)
        if id(parameter) not in allowed:
            parameter.grad = None  # an optimizer passes over parameters without a gradient, decay included
    return _plan(classifier, own, fresh=fresh)


def training_mode(classifier: Classifier, *, freeze_norm: bool) -> None:
    """Training mode; batch norms keep their statistics where they are frozen, or all with `freeze_norm`.

    Fresh ones never do: theirs are of nothing.
    """
    classifier.train()
    for name, module in classifier.network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            weights = list(module.parameters(recurse=False))
            frozen = bool(weights) and not any(weight.requires_grad for weight in weights)
            fresh = f"{name}.running_mean" in classifier.fresh
            module.train(fresh or not (freeze_norm or frozen))


def _after_stages(own: Sequence[Stage], config: FitConfig) -> set[int]:
    if config.unfreeze not in ("auto", "all"):
        raise ConfigError(
            f"fit.freeze={config.freeze} and fit.unfreeze={config.unfreeze} say the same thing twice",
            where="fit.freeze",
            fix="give one of them",
        )
    count = config.freeze or 0
    if count > len(own):
        raise ConfigError(
            f"the backbone has {len(own)} stages ({', '.join(stage.name for stage in own)}), {count} were"
            " asked for",
            where="fit.freeze",
            fix=f"use 0 to {len(own)}",
        )
    return _ids(parameter for stage in own[count:] for parameter in stage.parameters)


def _last_blocks(classifier: Classifier, config: FitConfig) -> set[int]:
    groups, unfreeze = blocks(classifier), config.unfreeze
    if unfreeze == "auto":
        raise AssertionError("fit.unfreeze is settled before training")
    named = {"all": len(groups), "most": round(_MOST * len(groups))}
    keep = named[unfreeze] if isinstance(unfreeze, str) else unfreeze
    if not 0 <= keep <= len(groups):
        raise ConfigError(
            f"the backbone has {len(groups)} blocks, {unfreeze} were asked for",
            where="fit.unfreeze",
            fix=f"use 0 to {len(groups)}, most or all",
        )
    return _ids(parameter for group in groups[len(groups) - keep :] for parameter in group)


def _plan(classifier: Classifier, own: Sequence[Stage], *, fresh: Mapping[str, nn.Parameter]) -> FreezePlan:
    beside = _ids(fresh.values())
    shares = {
        stage.name: sum(p.requires_grad and id(p) not in beside for p in stage.parameters)
        / len(stage.parameters)
        for stage in own
    }
    parameters = list(classifier.parameters())
    return FreezePlan(
        stages=tuple(shares),
        frozen=tuple(name for name, share in shares.items() if share == 0),
        partly=tuple(name for name, share in shares.items() if 0 < share < 1),
        fresh=fresh_parts(fresh),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        total=sum(parameter.numel() for parameter in parameters),
    )


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number:,}"
