"""Heat maps over HTTP, by every way there is; and what works where torch is not installed."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from holotype.bundle import Golden, Manifest, write_bundle, write_golden
from holotype.models import save_weights
from holotype.onnx_export import export_onnx
from holotype.policy import Policy
from holotype.preprocess import Preprocess
from holotype.runtime import load_onnx
from networks import small_network
from servers import Server, refused, serving, wait_for
from tiny import CLASSES, picture, tiny_model, write_tiny_bundle

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc to find processes")

SIDE = 64


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a transformer, whose embedding is a class token: only gradients tell where it looked."""
    folder = tmp_path_factory.mktemp("tokens")
    network, preprocess = small_network("test_vit", side=SIDE), Preprocess(height=SIDE, width=SIDE)
    names = {"weights": "weights.safetensors", "architecture": "architecture.json", "onnx": "model.onnx"}
    files = {name: folder / file for name, file in {**names, "golden": "golden.npz"}.items()}
    save_weights(network, files["weights"])
    files["architecture"].write_text(network.architecture.model_dump_json())
    export_onnx(network, files["onnx"], classes=CLASSES, preprocess=preprocess)
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    logits = load_onnx(files["onnx"], threads=1).run(images).logits
    write_golden(files["golden"], Golden(images=images, logits=logits))
    manifest = Manifest(classes=CLASSES, preprocess=preprocess, policy=Policy())
    return write_bundle(folder / "tokens", manifest, files=files).path


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that does not find torch and its company."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(dict.fromkeys(('torch', 'torchvision', 'timm', 'accelerate')))\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def explained(server: Server) -> dict:
    (answer,) = server.predict(picture(), explain=True).json()["results"]
    return dict(answer["heat_map"])


def test_gradients_where_the_graph_tells_no_places(tokens: Path, tmp_path: Path) -> None:
    with serving(tokens, folder=tmp_path) as server:
        assert server.info()["heat_maps"] == "grad-cam"
        found = explained(server)
        assert found["method"] == "grad-cam"
        grid = np.array(found["grid"])
        assert grid.ndim == 2
        assert min(grid.shape) >= 14
        assert 0 <= grid.min() <= grid.max() <= 1
        assert "heat_map" not in server.predict(picture()).json()["results"][0]


def test_without_torch_it_says_so_and_answers(
    tokens: Path, tmp_path: Path, without_torch: dict[str, str]
) -> None:
    with serving(tokens, folder=tmp_path, env=without_torch) as server:
        said = refused(server.predict(picture(), explain=True), 501)
        assert said.startswith("no heat maps here: ")
        assert "gradients need torch, which is not installed" in said
        assert server.predict(picture()).status_code == 200
        assert server.info()["heat_maps"] in said


def test_without_weights_it_says_so_and_answers(tmp_path: Path) -> None:
    """A graph whose embedding is no mean of places, and nothing else in the bundle."""
    model = tiny_model()
    model.graph.node[1].output[0] = "mean"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "one"))
    model.graph.node.insert(2, onnx.helper.make_node("Mul", ["mean", "one"], ["embedding"]))
    bundle = write_tiny_bundle(tmp_path / "odd", model=model).path
    with serving(bundle, folder=tmp_path) as server:
        said = refused(server.predict(picture(), explain=True), 501)
        assert "not a mean of features" in said
        assert "no torch weights for gradients" in said
        assert server.predict(picture("blue")).json()["results"][0]["label"] == "blue"


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory, without_torch: dict[str, str]) -> Iterator[Server]:
    """An A/B test where torch is not installed."""
    folder = tmp_path_factory.mktemp("server")
    champion = write_tiny_bundle(folder / "champion").path
    challenger = write_tiny_bundle(folder / "challenger", policy=Policy(temperature=2.0)).path
    settings = {
        "records": {"database": f"sqlite:///{folder / 'ab.db'}", "journal": str(folder)},
        "experiment": {"share": 0.5, "least": 5},
    }
    with serving(champion, challenger=challenger, folder=folder, env=without_torch, **settings) as started:
        yield started
        for process in (started.process.pid, *started.workers):
            assert "libtorch" not in Path(f"/proc/{process}/maps").read_text()


class TestWithoutTorch:
    """Everything but gradients: the map from the graph, the other protocol, an A/B test with its labels."""

    def test_heat_maps_of_the_graph(self, lean: Server) -> None:
        assert lean.info()["heat_maps"] == "cam"
        assert explained(lean)["method"] == "cam"

    def test_the_other_protocol(self, lean: Server) -> None:
        data = [base64.b64encode(picture(colour)).decode() for colour in CLASSES]
        asked = {"inputs": [{"name": "images", "shape": [3], "datatype": "BYTES", "data": data}]}
        body = lean.client.post("/v2/models/champion/infer", json=asked).json()
        (labels,) = [output["data"] for output in body["outputs"] if output["name"] == "label"]
        assert labels == list(CLASSES)

    def test_an_experiment(self, lean: Server) -> None:
        arms = set()
        for number in range(20):
            colour = CLASSES[number % 3]
            key = {"X-Holotype-Subject": f"user-{number}"}
            answer = lean.client.post("/predict", content=picture(colour), headers=key)
            arms.add(answer.headers["holotype-arm"])
            told = {"id": answer.json()["results"][0]["id"], "label": colour}
            assert lean.client.post("/feedback", json=told).status_code == 202
        assert arms == {"champion", "challenger"}

        def counted() -> bool:
            status = lean.client.get("/experiment").json()
            return sum(status[arm]["labelled"] for arm in arms) == 20

        wait_for(counted, "labels")
