"""Optimizers: parameter groups with their own rates and decay, and timm's optimizers by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from timm.optim._optim_factory import (
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
)
from torch import nn

from holotype.config import AdamW, FitConfig, Optimizer, Sgd, TimmOptimizer
from holotype.errors import ConfigError
from holotype.models import Classifier, blocks

__all__ = ["add_l2", "build_optimizer"]

_LOOKAHEAD = "lookahead_"
_FIX = "use adamw, sgd, lamb, lion, nadamw or another of timm's"


def build_optimizer(classifier: Classifier, config: FitConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over all parameters, frozen ones too: what has no gradient is passed over.

    The head has the full rate, the last block `backbone_rate` of it, and every block `layer_decay` of the
    next one's. Norms, biases and what timm's `no_weight_decay` names do not decay. Each group holds what a
    schedule starts from (`initial_lr`, `initial_momentum`) and its share of the head's rate (`lr_scale`).
    `ConfigError` for names and options that timm does not know, and for optimizers that a loop of plain,
    reproducible steps cannot use.
    """
    optimizer = _build(_groups(classifier, config), config.optimizer)
    for group in optimizer.param_groups:
        group["initial_momentum"] = group.get("momentum", group.get("betas", (0.0,))[0])
    return optimizer


def add_l2(classifier: Classifier, l2: float) -> None:
    """Add the gradient of l2 / 2 * |w|^2 to those of all trained weights but norms and biases, in place.

    For gradients of their true scale, that is after the unscaling of fp16 and before clipping.
    """
    weights = [weight for weight, decays in _weights(classifier) if decays and weight.grad is not None]
    if weights:
        gradients = [cast("torch.Tensor", weight.grad) for weight in weights]
        with torch.no_grad():
            torch._foreach_add_(gradients, cast("list[torch.Tensor]", weights), alpha=l2)


def _groups(classifier: Classifier, config: FitConfig) -> list[dict[str, Any]]:
    """Parameters with equal rate and decay together, in the order of the network."""
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    backbone = blocks(classifier)
    scales = {
        id(parameter): config.backbone_rate * config.layer_decay ** (len(backbone) - 1 - place)
        for place, block in enumerate(backbone)
        for parameter in block
    }
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter, decays in _weights(classifier):
        scale = scales.get(id(parameter), 1.0)
        group = groups.setdefault(
            (scale, decays),
            {
                "params": [],
                "lr": rate * scale,
                "initial_lr": rate * scale,
                "lr_scale": scale,
                "weight_decay": decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _weights(classifier: Classifier) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every parameter, and whether it decays."""
    network = cast("Any", classifier.network)
    spared = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    for name, parameter in network.named_parameters():
        small = parameter.ndim <= 1 or name.endswith(".bias")
        yield parameter, not small and not any(fnmatch.fnmatch(name, pattern) for pattern in spared)


def _build(groups: list[dict[str, Any]], settings: Optimizer) -> torch.optim.Optimizer:
    # The fused kernels also exist for CPUs, where a step over many small tensors is mostly overhead.
    if isinstance(settings, AdamW):
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    if isinstance(settings, Sgd):
        return _build_sgd(groups, settings)
    return _build_timm(groups, settings)


def _build_sgd(groups: list[dict[str, Any]], settings: Sgd) -> torch.optim.Optimizer:
    momentum = settings.momentum
    optimizer = torch.optim.SGD(
        groups, lr=settings.learning_rate, momentum=momentum, nesterov=momentum > 0, fused=True
    )
    if momentum:
        # The fused step fails where only some buffers are there yet, as after a stage was unfrozen.
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _build_timm(groups: list[dict[str, Any]], settings: TimmOptimizer) -> torch.optim.Optimizer:
    base = settings.name.removeprefix(_LOOKAHEAD)
    where = f"fit.optimizer.name={settings.name}"
    known = [str(name) for name in list_optimizers()]
    if base not in known:
        near = difflib.get_close_matches(base.lower(), known, n=3)
        raise ConfigError(
            "timm has no such optimizer",
            where=where,
            fix=f"did you mean {', '.join(near)}?" if near else _FIX,
        )
    reason = _unusable(base)
    if reason is not None:
        raise ConfigError(reason, where=where, fix=_FIX)
    _check_options(base, settings)
    try:
        return create_optimizer_v2(
            groups,
            settings.name,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            **settings.options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{settings.name} does not take these values ({error})",
            where="fit.optimizer.options",
            fix="see its documentation in timm.optim",
        ) from error


def _unusable(base: str) -> str | None:
    """Why an optimizer of timm cannot be used here."""
    info = get_optimizer_info(base)
    if info.second_order:
        return "it needs second derivatives, which training does not compute"
    if isinstance(info.opt_class, str):
        return f"it is part of {info.opt_class.partition('.')[0]}, not of timm or torch"
    if base.startswith("kron"):
        return "it draws at random within its steps, in each process differently"
    return None


def _check_options(base: str, settings: TimmOptimizer) -> None:
    arguments = inspect.signature(get_optimizer_class(base, bind_defaults=False)).parameters
    known = sorted(set(arguments) - {"self", "params", "lr", "weight_decay"})
    for name in settings.options:
        if name not in known:
            raise ConfigError(
                f"{settings.name} has no such option",
                where=f"fit.optimizer.options.{name}",
                fix=f"it has {', '.join(known)}; rate and decay have keys of their own",
            )
