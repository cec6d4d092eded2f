"""LitServe with an onnxruntime INT8 session and its dynamic batching, in an environment of its own.

    python benchmarks/servers/lit.py MODEL.onnx CLASSES SIZE PORT WORKERS BATCH WAIT

Images come as base64 in JSON: files of a form cannot be handed to LitServe's workers. Decoding is by Pillow
in the worker.
"""

from __future__ import annotations

import base64
import io
import json
import sys

import litserve
import numpy as np
import onnxruntime
from PIL import Image


class Classifier(litserve.LitAPI):
    def __init__(self, model: str, classes: list[str], size: int, threads: int, **settings: float) -> None:
        super().__init__(**settings)
        self.model, self.classes, self.size, self.threads = model, classes, size, threads

    def setup(self, device: str) -> None:  # noqa: ARG002 - as LitServe calls it
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        image = Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB")
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, images: np.ndarray) -> np.ndarray:
        images = images if images.ndim == 4 else images[None]
        logits = self.session.run(["logits"], {"images": images})[0]
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        return chances / chances.sum(axis=1, keepdims=True)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, object]:
        chances = output.reshape(-1)
        best = int(chances.argmax())
        return {"label": self.classes[best], "probability": float(chances[best])}


if __name__ == "__main__":
    model, classes, size, port, workers, batch, wait = sys.argv[1:8]
    api = Classifier(
        model,
        json.loads(classes),
        int(size),
        max(2 // int(workers), 1),
        max_batch_size=int(batch),
        batch_timeout=float(wait),
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers))
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")
