"""The server of the usual tutorial: FastAPI, `async def predict`, the torch network in the handler.

python benchmarks/servers/tutorial.py BUNDLE PORT
"""

from __future__ import annotations

import io
import sys

import torch
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from torchvision.transforms import v2

from holotype.bundle import open_bundle
from holotype.models import open_network


def create_app(folder: str) -> FastAPI:
    bundle = open_bundle(folder)
    spec, classes = bundle.manifest.preprocess, bundle.manifest.classes
    network = open_network(*bundle.network_files(fix="give what train wrote")).eval()
    resize = v2.Compose([v2.PILToTensor(), v2.Resize((spec.height, spec.width), antialias=True)])
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, object]:
        image = Image.open(io.BytesIO(await request.body())).convert("RGB")
        pixels = resize(image).permute(1, 2, 0)[None]
        with torch.inference_mode():
            chances = network(pixels)[0].softmax(dim=1)[0]
        best = int(chances.argmax())
        return {"label": classes[best], "probability": float(chances[best])}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
