"""The torch network of a bundle as a runtime, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from holotype.bundle import Bundle
from holotype.errors import require
from holotype.preprocess import Pixels
from holotype.runtime.contract import Outputs, Runtime

__all__ = ["open_torch", "torch_runtime"]


@dataclass(frozen=True)
class _TorchRuntime:
    classifier: Any
    device: str
    half: bool
    name: str = "torch"

    def run(self, images: Pixels, /) -> Outputs:
        import torch

        with (
            torch.inference_mode(),
            torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.half),
        ):
            batch = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            logits, embedding = self.classifier(batch)
        return Outputs(logits.float().cpu().numpy(), embedding.float().cpu().numpy())


def open_torch(bundle: Bundle, *, device: str, half: bool = False, threads: int | None = None) -> Runtime:
    """The network of a bundle; `threads` concern the whole process, None leaves torch's own number."""
    files = bundle.network_files(fix="use --runtime onnxruntime")
    require("torch", extra="train", purpose="the torch runtime")
    from holotype.models import choose_device, open_network

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    chosen = str(choose_device(device))
    return torch_runtime(open_network(*files), device=chosen, half=half)


def torch_runtime(classifier: Any, *, device: str, half: bool = False) -> Runtime:
    """A `models.Classifier` as a runtime; it is moved to `device` and put into evaluation mode.

    `half` computes in bf16 what may be, by torch's autocast.
    """
    import torch

    placed = classifier.eval().to(torch.device(device)).to(memory_format=torch.channels_last)
    return _TorchRuntime(classifier=placed, device=device, half=half)
