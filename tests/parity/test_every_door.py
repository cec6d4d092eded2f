"""One image, one answer: through every runtime, the command line and HTTP."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from awkward import (
    animation,
    cmyk_jpeg,
    encode,
    grey16_png,
    grey16_tiff,
    photo_jpeg,
    picture,
    two_frame_mpo,
    with_orientation,
    ycck_jpeg,
)
from holotype import Predictor, TrainResult, load
from holotype.cli import run

AWKWARD: dict[str, Callable[[], bytes]] = {
    **{f"exif-{n}": lambda n=n: with_orientation(picture(120, 90), "JPEG", n) for n in range(1, 9)},
    "cmyk": lambda: cmyk_jpeg((10, 200, 30, 5), size=(80, 60)),
    "ycck": lambda: ycck_jpeg((200, 20, 30, 5), size=(80, 60)),
    "grey-16": lambda: grey16_png((np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64)),
    "grey-16-tiff": lambda: grey16_tiff((np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64), order=">"),
    "palette-alpha": lambda: encode(
        Image.fromarray(picture(64, 48)).quantize(16), "PNG", transparency=bytes(range(0, 160, 10))
    ),
    "grey-alpha": lambda: encode(Image.fromarray(picture(64, 48)).convert("LA"), "PNG"),
    "rgba": lambda: encode(
        Image.fromarray(np.dstack([picture(64, 48), picture(64, 48, seed=2)[..., :1]])), "PNG"
    ),
    "one-bit": lambda: encode(Image.fromarray(picture(64, 48)[..., 0] > 120), "PNG"),
    "grey": lambda: encode(Image.fromarray(picture(64, 48)[..., 0]), "JPEG"),
    "one-pixel": lambda: encode(picture(1, 1), "PNG"),
    "12-megapixel": photo_jpeg,
    "mpo": lambda: two_frame_mpo(picture(80, 60), picture(80, 60, seed=1)),
    "gif": lambda: animation("GIF", frames=5, side=48),
    "webp": lambda: encode(picture(80, 60), "WEBP"),
    "avif": lambda: encode(picture(80, 60), "AVIF"),
    "bmp": lambda: encode(picture(80, 60), "BMP"),
}


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awkward")
    for name, make in AWKWARD.items():
        (folder / name).write_bytes(make())
    return folder


@pytest.fixture(scope="module")
def predictors(probe: TrainResult) -> dict[str, Predictor]:
    return {name: load(probe.best, runtime=name) for name in ("torch", "onnxruntime", "openvino")}


@pytest.fixture(scope="module")
def url(probe: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the bundle, started as a user starts it."""
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "holotype", "serve", str(probe.folder), "--port", "0"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stderr=stream)
    try:
        limit = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.05)
        yield found[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


@pytest.mark.parametrize("name", AWKWARD)
def test_same_answer_everywhere(name: str, awkward: Path, predictors: dict[str, Predictor], url: str) -> None:
    data = (awkward / name).read_bytes()
    answers = {runtime: predictor.predict(data) for runtime, predictor in predictors.items()}
    served = httpx.post(f"{url}/predict", content=data, timeout=30).json()["results"][0]
    wanted = answers["onnxruntime"]
    for runtime, answer in answers.items():
        assert answer.label == wanted.label, runtime
        assert answer.probability == pytest.approx(wanted.probability, abs=1e-4), runtime
    assert served["label"] == wanted.label
    assert served["probability"] == pytest.approx(wanted.probability, abs=1e-6)


def test_the_command_line_and_a_form_of_several_say_it_too(
    awkward: Path,
    predictors: dict[str, Predictor],
    url: str,
    probe: TrainResult,
    capfd: pytest.CaptureFixture[str],
) -> None:
    files = sorted(awkward.iterdir())
    wanted = [predictors["onnxruntime"].predict(file) for file in files]
    capfd.readouterr()
    assert run(["predict", str(probe.best), *(str(file) for file in files), "--json", "--quiet"]) == 0
    printed = json.loads(capfd.readouterr().out)["results"]
    form = [("files", (file.name, file.read_bytes())) for file in files]
    served = httpx.post(f"{url}/predict", files=form, timeout=60).json()["results"]
    for answer, line, result in zip(wanted, printed, served, strict=True):
        assert answer.label == line["label"] == result["label"]
        assert line["probability"] == pytest.approx(answer.probability, abs=1e-5)
        assert result["probability"] == pytest.approx(answer.probability, abs=1e-5)


def test_training_saw_the_pixels_that_serving_sees(probe: TrainResult, digits: Path) -> None:
    from holotype.config import DataConfig
    from holotype.dataset import open_dataset

    predictor = load(probe.best)
    dataset = open_dataset(digits, spec=predictor.bundle.manifest.preprocess, config=DataConfig())
    rows = dataset.rows("train")
    cached = np.concatenate(list(dataset.pixels([rows])))
    for path, pixels in zip(dataset.paths(rows), cached, strict=True):
        assert np.array_equal(predictor.read(dataset.file(path)), pixels)
