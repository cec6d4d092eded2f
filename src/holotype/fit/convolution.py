"""Convolutions that train faster on a CPU: the same function of the same parameters by other kernels.

Batch norm with frozen statistics is a scale and a shift per channel, so it is folded into the weights of the
convolution before it at every step, and gradients reach the parameters of both through the fold. That spares
two passes over each activation, and keeping one of them for the backward pass. A depthwise convolution's
weight gradient has a fast oneDNN kernel for 3x3 only: larger windows are put together from 3x3 ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import pad_same
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from holotype.models import Classifier

__all__ = ["faster_convolutions"]

# In fp32 oneDNN's own kernel is slow only on small maps: 1.6x at 11x11 positions, no gain at 14x14.
_SMALL_MAP = 128


@contextmanager
def faster_convolutions(classifier: Classifier) -> Iterator[int]:
    """Within, `classifier` computes the same up to rounding; yields how many batch norms are folded.

    A norm that is in training mode, or that hooks watch, is computed as ever. Parameters, their names and
    gradients stay; a copy of the classifier that is made within stays faster. Elsewhere than on a CPU
    nothing changes.
    """
    if classifier.scale.device.type != "cpu":
        yield 0
        return
    modes = {module: module.training for module in classifier.modules()}
    images = _probe(classifier)
    with torch.no_grad():
        classifier.eval()
        before, folds = _find_folds(classifier, images)
        changed = _change(classifier, folds)
        # Where something else also reads what a convolution gives, folding would change the outcome.
        after, _ = classifier(images)
        finite = bool(before.isfinite().all())  # else the first step will say so, with the images' names
        if not finite or not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
            _restore(changed)
            folds = {}
            changed = _change(classifier, folds)
    for module, training in modes.items():
        module.training = training
    try:
        yield len(folds)
    finally:
        _restore(changed)


def _probe(classifier: Classifier) -> torch.Tensor:
    shape = (1, classifier.architecture.height, classifier.architecture.width, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def _find_folds(
    classifier: Classifier, images: torch.Tensor
) -> tuple[torch.Tensor, dict[nn.Conv2d, nn.BatchNorm2d]]:
    """Logits of `images`, and the batch norm that directly follows each convolution and is no one else's."""
    made: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def remember(module: nn.Conv2d, _: Any, output: torch.Tensor) -> None:
        made[id(output)] = module, output  # the output is kept so that its id stays its own

    def match(module: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    hooks = []
    for module in classifier.modules():
        if _is_plain(module):
            hooks.append(module.register_forward_hook(remember))
        elif (
            type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.affine and module.track_running_stats
        ):
            hooks.append(module.register_forward_pre_hook(match))
    try:
        logits, _ = classifier(images)
    finally:
        for hook in hooks:
            hook.remove()
    uses = Counter(module for pair in pairs for module in pair)
    return logits, {conv: norm for conv, norm in pairs if uses[conv] == uses[norm] == 1}


def _change(classifier: Classifier, folds: dict[nn.Conv2d, nn.BatchNorm2d]) -> list[nn.Module]:
    """Give modules a faster `forward` of their own; returns those that have one."""
    changed: list[nn.Module] = []
    for module in classifier.modules():
        if isinstance(module, nn.Conv2d) and (module in folds or _is_slow(module)):
            module.forward = partial(_convolve, module, folds.get(module))  # type: ignore[method-assign]
            changed.append(module)
    for norm in folds.values():
        norm.forward = partial(_activate, norm)  # type: ignore[method-assign]
        changed.append(norm)
    return changed


def _restore(changed: Sequence[nn.Module]) -> None:
    for module in changed:
        del module.forward


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Conv2d, Conv2dSame) and getattr(module, "padding_mode", None) == "zeros"


def _is_slow(conv: nn.Conv2d) -> bool:
    """Whether oneDNN may lack a kernel for some gradient of this depthwise convolution."""
    return (
        _is_plain(conv)
        and conv.groups == conv.in_channels == conv.out_channels > 1
        and conv.kernel_size[0] == conv.kernel_size[1] >= 3
        and (conv.kernel_size[0] > 3 or max(conv.stride) > 1)
        and conv.dilation == (1, 1)
        and not isinstance(conv.padding, str)
    )


def _convolve(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, images: torch.Tensor) -> torch.Tensor:
    """`conv`, and the scale and shift of `norm` where its statistics are frozen."""
    weight, bias = conv.weight, conv.bias
    if norm is not None and _is_folded(norm):
        weight, bias = _folded(conv, norm)
    padding: Any = conv.padding
    if isinstance(conv, Conv2dSame):
        images = pad_same(images, list(conv.kernel_size), list(conv.stride), list(conv.dilation))
        padding = (0, 0)
    if not _is_slow(conv):
        return functional.conv2d(images, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
    if torch.is_autocast_enabled(images.device.type):
        dtype = torch.get_autocast_dtype(images.device.type)
        images, weight = images.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    stride = conv.stride[0], conv.stride[1]
    result: torch.Tensor = _Depthwise.apply(images, weight, bias, _Geometry(stride, padding))
    return result


def _is_folded(norm: nn.BatchNorm2d) -> bool:
    """Whether the convolution before `norm` does its work: not where hooks look at what goes into it."""
    return not (norm.training or norm._forward_pre_hooks or norm._forward_hooks)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of `conv` with the scale and shift of `norm` (Jacob et al. 2018, eq. 14)."""
    if norm.running_mean is None or norm.running_var is None:
        raise AssertionError("a norm without statistics cannot be out of training mode")
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale


def _activate(norm: nn.BatchNorm2d, images: torch.Tensor) -> torch.Tensor:
    """What remains of `norm` when its scale and shift are folded: the activation, where it has one."""
    if not _is_folded(norm):
        return type(norm).forward(norm, images)
    if isinstance(norm, BatchNormAct2d):
        activated: torch.Tensor = norm.act(norm.drop(images))
        return activated
    return images


class _Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution: `[N, C, H, W]` by weight `[C, 1, K, K]` to `[N, C, H', W']`."""

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: _Geometry
    ) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.geometry = geometry
        return functional.conv2d(images, weight, bias, *geometry, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        half = weight.dtype == torch.bfloat16
        small = gradient.shape[2] * gradient.shape[3] <= _SMALL_MAP
        to_images = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            # bf16 has no depthwise kernel for strides: oneDNN's dense one takes 20 to 40 times as long.
            dtype = torch.float32 if half and max(ctx.geometry.stride) > 1 else weight.dtype
            parts = gradient.to(dtype), images.to(dtype), weight.to(dtype), ctx.geometry
            to_images = _backward(*parts, of_weight=False).to(images.dtype)
        if ctx.needs_input_grad[1] and weight.shape[2] > 3 and (half or small):
            to_weight = _from_windows(gradient, images, weight, ctx.geometry)
        elif ctx.needs_input_grad[1]:
            to_weight = _backward(gradient, images, weight, ctx.geometry, of_weight=True)
        if ctx.needs_input_grad[2]:
            to_bias = gradient.sum((0, 2, 3))
        return to_images, to_weight, to_bias, None


def _from_windows(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, geometry: _Geometry
) -> torch.Tensor:
    """The gradient of a weight `[C, 1, K, K]`, K > 3, by windows of 3x3 taps; the last may overlap others."""
    starts = [*range(0, weight.shape[2] - 3, 3), weight.shape[2] - 3]
    (above, beside), (down, right) = geometry.padding, geometry.stride
    padded = functional.pad(images, (beside, beside, above, above))
    height, width = (gradient.shape[2] - 1) * down + 3, (gradient.shape[3] - 1) * right + 3
    result, window = torch.empty_like(weight), weight[:, :, :3, :3]
    for top in starts:
        for left in starts:
            seen = padded[:, :, top : top + height, left : left + width]
            part = _backward(gradient, seen, window, _Geometry(geometry.stride, (0, 0)), of_weight=True)
            result[:, :, top : top + 3, left : left + 3] = part
    return result


def _backward(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    geometry: _Geometry,
    *,
    of_weight: bool,
) -> torch.Tensor:
    """The gradient of a depthwise convolution's weight, or of its input."""
    gradients = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, *geometry, (1, 1), False, (0, 0), len(weight),
        (not of_weight, of_weight, False),
    )  # fmt: skip
    found: torch.Tensor = gradients[1 if of_weight else 0]
    return found
