"""The doors of a server beside /predict: other protocols, keys, administration, experiments, the page."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy
from PIL import Image

import awkward
from holotype.bundle import open_bundle
from holotype.database import FEEDBACK, PREDICTIONS, connect
from holotype.policy import Policy
from holotype.predictor import load
from holotype.serve.admin import without_paths
from servers import LIVENESS, Server, files, refused, serving, stalled, wait_for
from tiny import CLASSES, picture, tiny_baseline, tiny_model, write_tiny_bundle

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc to find processes")


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a policy that abstains, and a baseline."""
    policy = Policy(abstain="conformal", open_above=0.2, coverage=0.95, familiar=4.0)
    return write_tiny_bundle(
        tmp_path_factory.mktemp("knowing") / "colours", policy=policy, baseline=tiny_baseline()
    ).path


@pytest.fixture(scope="module")
def server(knowing: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(knowing, folder=tmp_path_factory.mktemp("api")) as started:
        yield started


def half(left: str, right: str) -> bytes:
    image = Image.new("RGB", (64, 64), left)
    image.paste(right, (32, 0, 64, 64))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


class TestPolicy:
    def test_a_clear_image_is_sure(self, server: Server) -> None:
        (answer,) = server.predict(picture("red")).json()["results"]
        assert (answer["label"], answer["sure"], answer["doubts"]) == ("red", True, [])
        assert answer["left_open"] == ["red"]
        assert answer["distance"] < 4

    def test_two_colours_leave_two_classes_open(self, server: Server) -> None:
        (answer,) = server.predict(half("red", "lime")).json()["results"]
        assert not answer["sure"]
        assert set(answer["left_open"]) == {"red", "green"}
        assert "several" in answer["doubts"]

    def test_another_kind_of_image_is_unfamiliar(self, server: Server) -> None:
        (answer,) = server.predict(picture("white")).json()["results"]
        assert "unfamiliar" in answer["doubts"]
        assert answer["distance"] > 4

    def test_it_is_the_same_everywhere(self, server: Server, knowing: Path) -> None:
        for image in (picture("blue"), half("red", "blue"), picture("white")):
            (answer,) = server.predict(image).json()["results"]
            for runtime in ("onnxruntime", "openvino"):
                own = load(knowing, runtime=runtime).predict(image)
                assert (own.sure, list(own.doubts)) == (answer["sure"], answer["doubts"])
                assert own.distance == pytest.approx(answer["distance"], rel=1e-4)


class TestAnswer:
    def test_who_answered_and_where_the_time_went(self, server: Server, knowing: Path) -> None:
        response = server.predict(picture(), top_k=1)
        assert response.headers["holotype-bundle"] == open_bundle(knowing).hash
        assert response.headers["holotype-arm"] == "champion"
        spans = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
        assert set(spans) == {"queued", "decoding", "inferring"}
        assert all(float(value) >= 0 for value in spans.values())

    def test_a_request_keeps_its_id(self, server: Server) -> None:
        response = server.client.get("/livez", headers={"X-Request-ID": "abc-1"})
        assert response.headers["x-request-id"] == "abc-1"
        odd = server.client.get("/livez", headers={"X-Request-ID": "a b\t" + "x" * 100})
        assert len(odd.headers["x-request-id"]) == 32
        named = server.client.post("/predict", content=picture(), headers={"X-Request-ID": "abc-2"})
        assert named.status_code == 200

        def lines() -> list[dict[str, Any]]:
            """Written by a thread of its own, so that no response waits for it."""
            whole = server.log.read_text().rpartition("\n")[0]
            return [line for line in map(json.loads, whole.splitlines()) if line.get("id") == "abc-2"]

        wait_for(lambda: bool(lines()), "line of the log")
        (line,) = lines()
        assert (line["route"], line["status"]) == ("/predict", 200)
        assert line["ms"] > 0

    def test_a_heat_map_shows_where(self, server: Server) -> None:
        (answer,) = server.predict(half("black", "red"), explain=True, show_input=True).json()["results"]
        grid = np.array(answer["heat_map"]["grid"])
        assert answer["heat_map"]["method"] == "cam"
        assert grid[:, : grid.shape[1] // 3].max() < 0.1 < grid[:, -grid.shape[1] // 3 :].min()
        seen = Image.open(io.BytesIO(base64.b64decode(answer["input"])))
        assert seen.size == (32, 32)

    def test_an_unknown_model_is_not_found(self, server: Server) -> None:
        refused(server.predict(picture(), model="other"), 404)


class TestInferenceProtocol:
    def infer(
        self, server: Server, *images: bytes, wanted: list[str] | None = None, **changes: Any
    ) -> httpx.Response:
        data = [base64.b64encode(image).decode() for image in images]
        tensor = {"name": "images", "shape": [len(data)], "datatype": "BYTES", "data": data, **changes}
        outputs = {} if wanted is None else {"outputs": [{"name": name} for name in wanted]}
        return server.client.post("/v2/models/colours/infer", json={"id": "7", "inputs": [tensor], **outputs})

    def test_metadata(self, server: Server) -> None:
        assert server.client.get("/v2/health/live").json() == {"live": True}
        assert server.client.get("/v2/health/ready").json() == {"ready": True}
        assert server.client.get("/v2").json()["name"] == "holotype"
        found = server.client.get("/v2/models/colours").json()
        assert found["inputs"] == [{"name": "images", "datatype": "BYTES", "shape": [-1]}]
        assert server.client.get("/v2/models/colours/ready").json()["ready"]
        refused(server.client.get("/v2/models/none"), 404)
        # No version is offered, since none has an address of its own.
        assert "versions" not in found
        refused(server.client.get("/v2/models/colours/versions/1"), 404)

    @pytest.mark.parametrize(
        "wanted", [["label"], ["probabilities", "label"], ["label", "sure", "probabilities"], []]
    )
    def test_outputs_are_those_that_are_asked_for(self, server: Server, wanted: list[str]) -> None:
        told = self.infer(server, picture("blue"), wanted=wanted).json()["outputs"]
        assert {one["name"] for one in told} == set(wanted or ["label", "sure", "probabilities"])
        assert [one["data"] for one in told if one["name"] == "label"] == [["blue"]]

    def test_an_output_that_there_is_not_is_refused(self, server: Server) -> None:
        told = refused(self.infer(server, picture(), wanted=["label", "embedding"]), 400)
        assert "there are label, sure, probabilities" in told
        refused(self.infer(server, picture(), wanted=["id"]), 400)  # nothing is kept here

    def test_answers_are_those_of_predict(self, server: Server) -> None:
        body = self.infer(server, picture("green"), picture("blue")).json()
        assert (body["id"], body["model_name"]) == ("7", "colours")
        outputs = {output["name"]: output for output in body["outputs"]}
        assert outputs["label"]["data"] == ["green", "blue"]
        assert outputs["sure"]["data"] == [True, True]
        assert outputs["probabilities"]["shape"] == [2, 3]
        (answer,) = server.predict(picture("green")).json()["results"]
        by_name = {choice["label"]: choice["probability"] for choice in answer["top"]}
        assert outputs["probabilities"]["data"][:3] == pytest.approx([by_name[name] for name in CLASSES])

    def test_who_speaks_it_can_tell_labels_too(self, knowing: Path, tmp_path: Path, server: Server) -> None:
        assert "id" not in [one["name"] for one in server.client.get("/v2/models/colours").json()["outputs"]]
        url = f"sqlite:///{tmp_path / 'answers.db'}"
        with serving(
            knowing, folder=tmp_path, records={"database": url, "journal": str(tmp_path)}
        ) as keeping:
            described = keeping.client.get("/v2/models/colours").json()["outputs"]
            assert {"name": "id", "datatype": "BYTES", "shape": [-1]} in described
            outputs = self.infer(keeping, picture("green"), picture("blue")).json()["outputs"]
            assert [output["name"] for output in outputs] == [one["name"] for one in described]
            (identities,) = [output["data"] for output in outputs if output["name"] == "id"]
            for identity, colour in zip(identities, ("green", "blue"), strict=True):
                told = keeping.client.post("/feedback", json={"id": identity, "label": colour})
                assert told.status_code == 202
        engine = connect(url)
        with engine.connect() as connection:
            rows = connection.execute(sqlalchemy.select(PREDICTIONS.c.id, FEEDBACK.c.label).join_from(
                PREDICTIONS, FEEDBACK, PREDICTIONS.c.id == FEEDBACK.c.id
            ))  # fmt: skip
            assert {row.id: row.label for row in rows} == dict(
                zip(identities, ("green", "blue"), strict=True)
            )
        engine.dispose()

    def test_what_is_wrong_is_said(self, server: Server) -> None:
        unreadable = self.infer(server, b"no image")
        refused(unreadable, 415)
        assert unreadable.headers["holotype-bundle"]
        assert "decoding" in unreadable.headers["server-timing"]
        assert "shape" in refused(self.infer(server, picture(), shape=[2]), 400)
        assert "base64" in refused(self.infer(server, picture(), data=["?"]), 400)
        refused(self.infer(server, picture(), datatype="UINT8"), 400)
        refused(server.client.post("/v2/models/colours/infer", content=b"{"), 400)


@pytest.fixture(scope="module")
def locked(knowing: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"HOLOTYPE_API_KEY": "client", "HOLOTYPE_ADMIN_KEY": "boss"}
    with serving(knowing, folder=tmp_path_factory.mktemp("locked"), env=env) as started:
        yield started


def test_examples_of_the_document_are_what_it_says(server: Server) -> None:
    """Requests as they are shown are understood, and answers look like those that are shown."""
    document = server.client.get("/openapi.json").json()
    paths = document["paths"]
    infer = paths["/v2/models/{name}/infer"]["post"]
    asked = infer["requestBody"]["content"]["application/json"]["example"]
    told = infer["responses"]["200"]["content"]["application/json"]["example"]
    answer = server.client.post("/v2/models/colours/infer", json=asked).json()
    assert set(answer) == set(told)
    shown = {output["name"]: output["datatype"] for output in told["outputs"]}
    assert shown.items() >= {output["name"]: output["datatype"] for output in answer["outputs"]}.items()
    load = document["components"]["schemas"]["_Load"]["properties"]
    assert all(one["examples"] for one in load.values())
    problems = [
        (address, status, media["application/problem+json"]["example"])
        for address, path in paths.items()
        for operation in path.values()
        for status, response in operation["responses"].items()
        if "application/problem+json" in (media := response.get("content", {}))
    ]
    assert len(problems) > 50
    real = {protocol: server.client.get(f"{protocol}/none").json() for protocol in ("", "/v2")}
    assert set(real["/v2"]) == {*real[""], "error"}
    for address, status, example in problems:
        assert set(example) == set(real["/v2" if address.startswith("/v2") else ""])
        assert str(example["status"]) == status
    promoted = paths["/admin/models/{name}/promote"]["post"]["responses"]["200"]["content"][
        "application/json"
    ]
    assert set(promoted["example"]) == {"name", "live", "challenger", "candidate", "previous"}


class TestKeys:
    def test_nobody_without_the_key(self, locked: Server) -> None:
        refused(locked.predict(picture()), 401)
        refused(locked.client.get("/info"), 401)
        refused(locked.client.get("/v2/models/colours"), 401)
        refused(locked.client.post("/predict", content=picture(), headers={"X-API-Key": "boss"}), 401)
        for headers in ({"X-API-Key": "client"}, {"Authorization": "Bearer client"}):
            assert locked.client.post("/predict", content=picture(), headers=headers).status_code == 200

    def test_health_and_the_page_need_none_on_loopback(self, locked: Server) -> None:
        for path in ("/livez", "/readyz", "/metrics", "/", "/docs", "/page/app.js", "/page/docs.js"):
            assert locked.client.get(path).status_code == 200, path

    def test_administration_has_a_key_of_its_own(self, locked: Server, server: Server) -> None:
        refused(locked.client.get("/admin/models", headers={"X-API-Key": "client"}), 401)
        assert locked.client.get("/admin/models", headers={"X-API-Key": "boss"}).status_code == 200
        assert "HOLOTYPE_ADMIN_KEY" in refused(server.client.get("/admin/models"), 403)


class TestReload:
    @pytest.fixture
    def managed(self, knowing: Path, tmp_path: Path) -> Iterator[tuple[Server, httpx.Client]]:
        with serving(knowing, folder=tmp_path, env={"HOLOTYPE_ADMIN_KEY": "boss"}) as started:
            headers = {"X-API-Key": "boss"}
            with httpx.Client(base_url=started.url, headers=headers, timeout=LIVENESS) as boss:
                yield started, boss

    def test_load_promote_and_roll_back(self, managed: tuple[Server, httpx.Client], tmp_path: Path) -> None:
        server, boss = managed
        old = server.info()["bundle"]
        policy = Policy(temperature=2.0)
        other = write_tiny_bundle(tmp_path / "other", policy=policy)
        loaded = boss.post("/admin/models", json={"path": str(other.path)}).json()
        assert (loaded["live"]["bundle"], loaded["candidate"]["bundle"]) == (old, other.hash)
        assert server.predict(picture()).json()["bundle"] == old
        promoted = boss.post("/admin/models/colours/promote").json()
        assert (promoted["live"]["bundle"], promoted["previous"]["bundle"]) == (other.hash, old)
        assert server.predict(picture()).json()["bundle"] == other.hash
        began = time.monotonic()
        boss.post("/admin/models/colours/rollback")
        assert server.predict(picture()).json()["bundle"] == old
        assert time.monotonic() - began < 5
        refused(boss.post("/admin/models/none/rollback"), 404)

    @pytest.mark.parametrize("fault", ["corrupt", "classes", "nan", "missing"])
    def test_what_is_wrong_is_refused_and_the_old_one_serves(
        self, managed: tuple[Server, httpx.Client], tmp_path: Path, fault: str
    ) -> None:
        server, boss = managed
        old = server.info()["bundle"]
        target = tmp_path / "bad"
        if fault == "classes":
            write_tiny_bundle(target, classes=("red", "green", "violet"))
        elif fault == "nan":
            model = tiny_model()
            (bias,) = [one for one in model.graph.initializer if one.name == "bias"]
            bias.raw_data = np.array([np.nan, 0, 0], dtype=np.float32).tobytes()
            write_tiny_bundle(target, model=model)
        elif fault == "corrupt":
            write_tiny_bundle(target)
            file = target / "model.onnx"
            file.write_bytes(file.read_bytes()[:-1] + b"\0")
        detail = refused(boss.post("/admin/models", json={"path": str(target)}), 409)
        assert detail.startswith("refused:")
        assert str(tmp_path) not in detail
        refused(boss.post("/admin/models/colours/promote"), 409)
        assert server.predict(picture()).json()["bundle"] == old

    def test_no_path_is_told_and_no_word_is_garbled(
        self, managed: tuple[Server, httpx.Client], tmp_path: Path
    ) -> None:
        server, boss = managed
        short = refused(boss.post("/admin/models", json={"path": "b"}), 409)
        assert short == refused(boss.post("/admin/models", json={"path": "a/place/of/none"}), 409)
        assert short == "refused: no such bundle or run folder"
        refused(boss.post("/admin/models", json={"path": "a\0b"}), 422)
        odd = tmp_path / "an odd one"
        write_tiny_bundle(odd)
        (odd / "holotype.json").unlink()
        (odd / "holotype.json").mkdir()
        detail = refused(boss.post("/admin/models", json={"path": str(odd)}), 409)
        assert "odd" not in detail
        # Which is for those who run it; lines are written by a thread of their own.
        wait_for(lambda: str(odd) in server.log.read_text(), "path in the log")

    def test_under_load_nobody_notices(self, managed: tuple[Server, httpx.Client], tmp_path: Path) -> None:
        server, boss = managed
        other = write_tiny_bundle(tmp_path / "other", policy=Policy(temperature=2.0))
        boss.post("/admin/models", json={"path": str(other.path)})
        asked = []
        for number in range(60):
            asked.append(server.send(picture(CLASSES[number % 3])))
            if number == 30:
                boss.post("/admin/models/colours/promote")
        answers = [one.result(LIVENESS) for one in asked]
        assert {answer.status_code for answer in answers} == {200}
        assert [a.json()["results"][0]["label"] for a in answers] == [CLASSES[n % 3] for n in range(60)]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[Errno 13] Permission denied: '/srv/my models/x.json'", "[Errno 13] Permission denied: a file"),
        ("class 'b' at 3 images/s, and/or nothing", "class 'b' at 3 images/s, and/or nothing"),
        ("file runs/x/best/model.onnx is bad (see /a/b/c)", "file the bundle is bad (see a file)"),
        (r"bad C:\\models\\x.onnx: no", "bad a file: no"),
        (f"from {Path('b').absolute()}/model.onnx, no", "from the bundle, no"),
    ],
)
def test_messages_without_paths(said: str, told: str) -> None:
    assert without_paths(said, Path("b"), Path("runs/x/best")) == told


def test_several_bundles_in_one_server(knowing: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(f"first={knowing}", f"second={tiny_bundle}", folder=tmp_path) as server:
        assert server.info()["models"] == ["first", "second"]
        first, second = (
            server.predict(picture("blue"), model=name).json()["bundle"] for name in ("first", "second")
        )
        assert first != second == open_bundle(tiny_bundle).hash
        assert server.predict(picture()).json()["bundle"] == first


def test_metrics_and_stats(server: Server) -> None:
    for number in range(60):
        server.predict(picture(CLASSES[number % 3]))
    refused(server.predict(b"no image"), 415)
    text = server.client.get("/metrics").text
    assert 'holotype_answers_total{arm="champion",label="red",model="colours",sure="true"}' in text
    assert 'holotype_requests_total{route="/predict",status="415"}' in text
    assert 'holotype_stage_seconds_count{stage="inferring"}' in text
    assert 'holotype_drift_effect{model="colours",what="classes"}' in text
    stats = server.client.get("/stats").json()
    assert sum(second["images"] for second in stats["seconds"]) >= 60
    assert stats["drift"]["colours"]["images"] >= 60


def test_drift_is_told(knowing: Path, tmp_path: Path) -> None:
    with serving(knowing, folder=tmp_path) as server:
        for _ in range(80):
            server.predict(picture("maroon"))
        movements = server.client.get("/stats").json()["drift"]["colours"]["movements"]
        moved = {one["what"] for one in movements if one["moved"]}
        assert {"brightness", "classes", "distance"} <= moved


class TestExperiment:
    @pytest.fixture
    def rivals(self, tmp_path: Path) -> tuple[Path, Path]:
        champion = write_tiny_bundle(tmp_path / "champion").path
        return champion, write_tiny_bundle(tmp_path / "challenger", policy=Policy(temperature=3.0)).path

    def test_keys_meet_the_same_arm_again_and_after_a_restart(
        self, rivals: tuple[Path, Path], tmp_path: Path
    ) -> None:
        database = f"sqlite:///{tmp_path / 'ab.db'}"
        settings = {"experiment": {"share": 0.5}, "records": {"database": database, "journal": str(tmp_path)}}
        met = []
        for workers in (1, 2):
            with serving(
                rivals[0], challenger=rivals[1], folder=tmp_path, workers=workers, threads=1, **settings
            ) as server:
                arms = []
                for user in [*range(20), *range(20)]:
                    response = server.client.post(
                        "/predict", content=picture(), headers={"X-Holotype-Subject": f"user-{user}"}
                    )
                    arms.append(response.headers["holotype-arm"])
                assert arms[:20] == arms[20:]
                assert set(arms) == {"champion", "challenger"}
                met.append(arms)
        assert met[0] == met[1]

    def test_labels_come_back_and_are_counted(self, rivals: tuple[Path, Path], tmp_path: Path) -> None:
        database = f"sqlite:///{tmp_path / 'ab.db'}"
        settings = {
            "experiment": {"share": 0.5, "least": 5},
            "records": {"database": database, "journal": str(tmp_path)},
        }
        with serving(rivals[0], challenger=rivals[1], folder=tmp_path, **settings) as server:
            for number in range(40):
                colour = CLASSES[number % 3]
                response = server.client.post(
                    "/predict", content=picture(colour), headers={"X-Holotype-Subject": str(number)}
                )
                identity = response.json()["results"][0]["id"]
                told = server.client.post("/feedback", json={"id": identity, "label": colour})
                assert told.status_code == 202
            refused(server.client.post("/feedback", json={"id": identity, "label": "violet"}), 422)
            refused(server.client.post("/feedback", json={"id": "7", "label": "red"}), 422)

            def counted() -> bool:
                status = server.client.get("/experiment").json()
                arms = status["champion"], status["challenger"]
                return sum(arm["labelled"] for arm in arms) == 40 == sum(arm["right"] for arm in arms)

            wait_for(counted, "labels")
            assert server.client.get("/experiment").json()["verdict"] == "undecided"

    def test_a_challenger_that_is_gone_costs_no_answer(
        self, rivals: tuple[Path, Path], tmp_path: Path
    ) -> None:
        settings = {"experiment": {"share": 0.9}, "records": {"journal": str(tmp_path)}}
        env = {"HOLOTYPE_CACHE": str(tmp_path / "cache"), "HOLOTYPE_ADMIN_KEY": "boss"}
        with serving(rivals[0], challenger=rivals[1], folder=tmp_path, env=env, **settings) as server:
            (model,) = server.client.get("/admin/models", headers={"X-API-Key": "boss"}).json()["models"]
            (worker,) = model["challenger"]["processes"]
            with stalled(worker), ThreadPoolExecutor(4) as clients:
                asked = [
                    clients.submit(
                        httpx.post,
                        f"{server.url}/predict",
                        content=picture(),
                        headers={"X-Holotype-Subject": str(number)},
                        timeout=LIVENESS,
                    )
                    for number in range(4)
                ]
                wait_for(lambda: server.info()["executing"] > 0, "image in the stalled process")
                time.sleep(0.2)
                os.kill(worker, signal.SIGKILL)
                answers = [one.result() for one in asked]
            assert [answer.status_code for answer in answers] == [200] * 4
            assert "champion" in {answer.headers["holotype-arm"] for answer in answers}
            for number in range(10):
                response = server.client.post(
                    "/predict", content=picture(), headers={"X-Holotype-Subject": str(number)}
                )
                assert response.status_code == 200

    def test_it_is_over_once_somebody_promotes(self, rivals: tuple[Path, Path], tmp_path: Path) -> None:
        env = {"HOLOTYPE_CACHE": str(tmp_path / "cache"), "HOLOTYPE_ADMIN_KEY": "boss"}
        settings = {"experiment": {"share": 0.5}, "records": {"journal": str(tmp_path)}}
        with serving(rivals[0], challenger=rivals[1], folder=tmp_path, env=env, **settings) as server:
            server.predict(picture())
            wait_for(lambda: self.answers(server) == 1, "row")
            server.client.post("/admin/models/champion/promote", headers={"X-API-Key": "boss"})
            assert server.client.get("/experiment").json()["over"]
            for number in range(5):
                told = server.client.post(
                    "/predict", content=picture(), headers={"X-Holotype-Subject": str(number)}
                )
                assert told.headers["holotype-bundle"] == open_bundle(rivals[1]).hash
            wait_for(lambda: server.client.get("/stats").json()["records"]["pending_bytes"] == 0, "rows")
            assert self.answers(server) == 1

    def answers(self, server: Server) -> int:
        status = server.client.get("/experiment").json()
        return int(status["champion"]["answers"] + status["challenger"]["answers"])

    def test_the_shadow_answers_beside(self, rivals: tuple[Path, Path], tmp_path: Path) -> None:
        database = f"sqlite:///{tmp_path / 'ab.db'}"
        settings = {
            "experiment": {"shadow": True},
            "records": {"database": database, "journal": str(tmp_path)},
        }
        with serving(rivals[0], challenger=rivals[1], folder=tmp_path, **settings) as server:
            for _ in range(20):
                response = server.predict(picture())
                assert response.headers["holotype-arm"] == "champion"
                time.sleep(0.02)

            def seen() -> bool:
                status = server.client.get("/experiment").json()
                both = status["champion"]["answers"], status["challenger"]["answers"]
                return both[0] == 20 and both[1] + status["skipped"] == 20 and both[1] > 0

            wait_for(seen, "shadow")

    def test_without_records_there_is_nothing_to_tell(self, server: Server) -> None:
        refused(server.client.post("/feedback", json={"id": "0" * 32, "label": "red"}), 409)
        refused(server.client.get("/experiment"), 409)


class TestBatches:
    def test_images_that_wait_are_answered_together_and_rightly(self, knowing: Path, tmp_path: Path) -> None:
        with serving(knowing, folder=tmp_path, max_batch=8) as server:
            with stalled(*server.workers):
                asked = [server.send(picture(CLASSES[number % 3])) for number in range(40)]
                server.wait_waiting(39)
            labels = [one.result(LIVENESS).json()["results"][0]["label"] for one in asked]
            assert labels == [CLASSES[number % 3] for number in range(40)]
            text = server.client.get("/metrics").text
            assert 'holotype_batch_images_bucket{le="4.0",model="colours"}' in text
            counts = {
                line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.startswith("holotype_batch_images")
            }
            assert counts['holotype_batch_images_sum{model="colours"}'] == 40
            assert counts['holotype_batch_images_count{model="colours"}'] < 30

    def test_a_poison_image_harms_nobody_in_its_batch(self, knowing: Path, tmp_path: Path) -> None:
        with serving(knowing, folder=tmp_path, max_batch=8) as server:
            images = [picture(CLASSES[number % 3]) for number in range(16)]
            images[5] = images[5][: len(images[5]) // 2]
            results = server.client.post("/predict", files=files(*images)).json()["results"]
            assert [result.get("label") for result in results] == [
                None if number == 5 else CLASSES[number % 3] for number in range(16)
            ]


@pytest.mark.parametrize("kind", sorted(awkward.VARIANTS))
def test_mutated_images_never_give_a_500(server: Server, kind: str) -> None:
    makers = awkward.VARIANTS[kind]
    originals = [make() for make in makers]
    statuses = set()
    for seed in range(120):
        data = awkward.mutate(originals[seed % len(originals)], seed=seed)
        statuses.add(server.predict(data).status_code)
    assert statuses <= {200, 400, 413, 415, 422}
    assert server.client.get("/readyz").status_code == 200
