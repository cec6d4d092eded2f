"""An A/B test that ends by itself, that begins without its database, and whose challenger fails."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from holotype.bundle import Golden, open_bundle, write_golden
from holotype.policy import Policy
from holotype.runtime import load_onnx
from servers import Server, serving, stalled, wait_for
from tiny import CLASSES, golden_images, picture, poisoned_model, tiny_model, write_tiny_bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc to find processes"),
]


def confused(target: Path) -> Path:
    """A bundle that takes every colour for another one."""
    model = tiny_model()
    for tensor in model.graph.initializer:
        if tensor.name == "weight":
            turned = np.roll(numpy_helper.to_array(tensor), 1, axis=1)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turned), "weight"))
    return _with_own_golden(target, model)


def _with_own_golden(target: Path, model: onnx.ModelProto) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    file, images = target.with_name(f"{target.name}.onnx"), golden_images()
    file.write_bytes(model.SerializeToString())
    golden = target.with_name(f"{target.name}.npz")
    write_golden(golden, Golden(images=images, logits=load_onnx(file, threads=1).run(images).logits))
    return write_tiny_bundle(target, model=model, golden=golden).path


def rule(tmp_path: Path, **experiment: Any) -> dict[str, Any]:
    database = f"sqlite:///{tmp_path / 'ab.db'}"
    return {"experiment": experiment, "records": {"database": database, "journal": str(tmp_path)}}


def answer_and_tell(server: Server, *, count: int) -> None:
    """Ask about colours under keys of their own, and tell what they really are."""
    for number in range(count):
        colour = CLASSES[number % 3]
        key = {"X-Holotype-Subject": f"user-{number}"}
        answer = server.client.post("/predict", content=picture(colour), headers=key)
        assert answer.status_code == 200
        told = {"id": answer.json()["results"][0]["id"], "label": colour}
        assert server.client.post("/feedback", json=told).status_code == 202


def live(server: Server) -> str:
    return str(server.info()["bundle"])


def test_a_better_challenger_is_promoted(tmp_path: Path) -> None:
    champion, challenger = confused(tmp_path / "champion"), write_tiny_bundle(tmp_path / "challenger").path
    settings = rule(tmp_path, share=0.5, least=5, auto="both", slower=1000)
    with serving(champion, challenger=challenger, folder=tmp_path, **settings) as server:
        answer_and_tell(server, count=60)
        wait_for(lambda: live(server) == open_bundle(challenger).hash, "promotion")
        assert server.client.get("/experiment").json()["over"]
        assert server.predict(picture("red")).json()["results"][0]["label"] == "red"


def test_a_worse_one_is_sent_away(tmp_path: Path) -> None:
    champion, challenger = write_tiny_bundle(tmp_path / "champion").path, confused(tmp_path / "challenger")
    settings = rule(tmp_path, share=0.5, least=5, auto="both")
    with serving(champion, challenger=challenger, folder=tmp_path, **settings) as server:
        answer_and_tell(server, count=60)
        wait_for(lambda: len(server.workers) == 1, "end of the challenger's process")
        assert live(server) == open_bundle(champion).hash
        assert server.client.get("/experiment").json()["over"]


def slow(target: Path) -> Path:
    """The tiny bundle, with a tenth of a second of products of matrices that add nothing."""
    model = tiny_model()
    graph = model.graph
    constants = {
        "nothing": np.array(0, dtype=np.float32),
        "square": np.array([600, 600], dtype=np.int64),
        "all": np.array([0, 1], dtype=np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    graph.node[-1].output[0] = "quick"
    nodes = [
        helper.make_node("ReduceSum", ["embedding"], ["light"], keepdims=0),
        helper.make_node("Mul", ["light", "nothing"], ["dark"]),
        helper.make_node("Expand", ["dark", "square"], ["product0"]),
    ]
    count = 15
    for number in range(count):
        nodes.append(
            helper.make_node("MatMul", [f"product{number}", f"product{number}"], [f"product{number + 1}"])
        )
    nodes.append(helper.make_node("ReduceSum", [f"product{count}", "all"], ["zero"], keepdims=0))
    nodes.append(helper.make_node("Add", ["quick", "zero"], ["logits"]))
    graph.node.extend(nodes)
    return _with_own_golden(target, model)


def test_a_challenger_that_is_too_slow_is_not_promoted(tmp_path: Path) -> None:
    """However much better it is; another look of the server's changes nothing."""
    champion, challenger = confused(tmp_path / "champion"), slow(tmp_path / "challenger")
    settings = rule(tmp_path, share=0.5, least=5, auto="both")
    with serving(champion, challenger=challenger, folder=tmp_path, **settings) as server:
        answer_and_tell(server, count=60)
        wait_for(lambda: server.client.get("/experiment").json()["verdict"] == "better", "verdict")
        status = server.client.get("/experiment").json()
        assert status["challenger"]["p95_ms"] > 1.5 * status["champion"]["p95_ms"]
        assert status["too_slow"]
        assert "too slow" in status["advice"]
        time.sleep(6)
        assert live(server) == open_bundle(champion).hash
        assert not server.client.get("/experiment").json()["over"]


def test_who_answered_in_the_shadow_serves_like_any_other(tmp_path: Path) -> None:
    champion = write_tiny_bundle(tmp_path / "champion").path
    challenger = write_tiny_bundle(tmp_path / "challenger", policy=Policy(temperature=3.0)).path
    env = {"HOLOTYPE_ADMIN_KEY": "boss"}
    with serving(
        champion, challenger=challenger, folder=tmp_path, env=env, **rule(tmp_path, shadow=True)
    ) as server:
        boss = {"X-API-Key": "boss"}
        (before,) = server.client.get("/admin/models", headers=boss).json()["models"]
        assert niceness(before["challenger"]["processes"][0]) == 19
        response = server.client.post(f"/admin/models/{before['name']}/promote", headers=boss)
        assert response.json()["live"]["bundle"] == open_bundle(challenger).hash
        assert [niceness(process) for process in response.json()["live"]["processes"]] == [0]
        assert server.predict(picture()).status_code == 200


def niceness(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[16])


def failures(server: Server) -> int:
    """Of the challenger, as Prometheus is told."""
    lines = server.client.get("/metrics").text.splitlines()
    return round(
        sum(float(one.split()[-1]) for one in lines if one.startswith("holotype_challenger_failures_total"))
    )


def test_a_challenger_that_fails_is_noticed_by_nobody_who_asks(tmp_path: Path) -> None:
    """Its answer on a white image is no number. The experiment counts it, a label of the answer too."""
    champion = write_tiny_bundle(tmp_path / "champion").path
    challenger = write_tiny_bundle(tmp_path / "challenger", model=poisoned_model()).path
    with serving(champion, challenger=challenger, folder=tmp_path, **rule(tmp_path, share=0.5)) as server:
        arms = set()
        for number in range(40):
            key = {"X-Holotype-Subject": f"user-{number}"}
            answer = server.client.post("/predict", content=picture("white"), headers=key)
            assert answer.status_code == 200
            arms.add(answer.headers["holotype-arm"])
            result = answer.json()["results"][0]
            told = {"id": result["id"], "label": result["label"]}
            assert server.client.post("/feedback", json=told).status_code == 202
        assert arms == {"champion"}

        def counted() -> bool:
            status = server.client.get("/experiment").json()
            return bool(status["champion"]["labelled"] + status["challenger"]["labelled"] == 40)

        wait_for(counted, "labels")
        status = server.client.get("/experiment").json()
        assert 5 < status["challenger"]["failed"] == status["challenger"]["keys"] < 35
        assert status["challenger"]["failed"] == failures(server)
        assert status["challenger"]["answers"] == status["challenger"]["right"] == 0
        # That the champion stepped in is no merit of its arm, and breaks no ratio.
        assert status["champion"]["answers"] == status["champion"]["keys"] == 40 - failures(server)
        assert not status["ratio_is_off"]
        assert status["fails_more"]
        assert not status["over"]


@pytest.mark.parametrize("shadow", [False, True])
def test_a_challenger_that_fails_is_sent_away(tmp_path: Path, shadow: bool) -> None:
    """Though it is right about every other image, and the champion about none; no label is needed."""
    champion = confused(tmp_path / "champion")
    challenger = write_tiny_bundle(tmp_path / "challenger", model=poisoned_model()).path
    arms = {"shadow": True} if shadow else {"share": 0.5}
    settings = rule(tmp_path, **arms, least=5, auto="both", slower=1000)
    with serving(champion, challenger=challenger, folder=tmp_path, **settings) as server:
        for number in range(40):
            key = {"X-Holotype-Subject": f"user-{number}"}
            answer = server.client.post("/predict", content=picture("white"), headers=key)
            assert answer.status_code == 200
            time.sleep(0.02 * shadow)
        answer_and_tell(server, count=20)
        wait_for(lambda: len(server.workers) == 1, "end of the challenger's process")
        status = server.client.get("/experiment").json()
        assert status["over"]
        assert status["challenger"]["failed"] > 5
        assert live(server) == open_bundle(champion).hash


def test_an_outage_of_the_challenger_is_no_failure_of_each_key(tmp_path: Path) -> None:
    """Its process cannot be started again for a while. Nobody notices, and afterwards it has its chance."""
    champion = write_tiny_bundle(tmp_path / "champion").path
    challenger = write_tiny_bundle(tmp_path / "challenger", policy=Policy(temperature=3.0)).path
    boss, settings = {"X-API-Key": "boss"}, rule(tmp_path, share=0.5)

    def processes(server: Server) -> list[int]:
        (model,) = server.client.get("/admin/models", headers=boss).json()["models"]
        return list(model["challenger"]["processes"])

    def ask(server: Server, *, first: int, last: int) -> None:
        for number in range(first, last):
            key = {"X-Holotype-Subject": f"user-{number}"}
            assert server.client.post("/predict", content=picture(), headers=key).status_code == 200

    def status(server: Server, *, keys: int) -> dict[str, Any]:
        def counted() -> bool:
            found = server.client.get("/experiment").json()
            return bool(found["champion"]["keys"] + found["challenger"]["keys"] == keys)

        wait_for(counted, "rows")
        return dict(server.client.get("/experiment").json())

    env = {"HOLOTYPE_ADMIN_KEY": "boss"}
    with serving(champion, challenger=challenger, folder=tmp_path, env=env, **settings) as server:
        (lost,) = processes(server)
        challenger.rename(tmp_path / "away")
        os.kill(lost, signal.SIGKILL)
        wait_for(lambda: not processes(server), "loss")
        ask(server, first=0, last=60)
        assert failures(server) > 20
        during = status(server, keys=60 - failures(server))
        assert during["challenger"]["keys"] == during["challenger"]["failed"] == 0
        assert not during["fails_more"]
        assert during["ratio_is_off"], "an outage shows, and nothing is promoted in it"
        (tmp_path / "away").rename(challenger)
        wait_for(lambda: bool(processes(server)), "another process")
        missing = failures(server)
        ask(server, first=60, last=120)
        after = status(server, keys=120 - missing)
        assert after["challenger"]["answers"] > 20
        assert not after["fails_more"]


def test_a_challenger_that_is_late_is_slow_and_not_the_champion(tmp_path: Path) -> None:
    """Who asks has the champion's answer in time, and that the challenger was waited for is not its time."""
    champion = write_tiny_bundle(tmp_path / "champion").path
    challenger = write_tiny_bundle(tmp_path / "challenger", policy=Policy(temperature=3.0)).path
    env = {"HOLOTYPE_ADMIN_KEY": "boss"}
    settings = rule(tmp_path, share=0.5) | {"deadline_seconds": 3}
    with serving(champion, challenger=challenger, folder=tmp_path, env=env, **settings) as server:
        (model,) = server.client.get("/admin/models", headers={"X-API-Key": "boss"}).json()["models"]
        with stalled(*model["challenger"]["processes"]):
            for number in range(12):
                key = {"X-Holotype-Subject": f"user-{number}"}
                answer = server.client.post("/predict", content=picture(), headers=key)
                assert answer.status_code == 200
                assert answer.headers["holotype-arm"] == "champion"

        def counted() -> bool:
            status = server.client.get("/experiment").json()
            return bool(status["champion"]["keys"] + status["challenger"]["keys"] == 12)

        wait_for(counted, "rows")
        status = server.client.get("/experiment").json()
        assert status["challenger"]["failed"] == status["challenger"]["keys"] == failures(server) > 0
        assert status["challenger"]["p95_ms"] > 1400
        assert status["champion"]["p95_ms"] < 1400
        assert status["too_slow"]


def test_a_shadow_that_had_no_time_has_not_failed(tmp_path: Path) -> None:
    champion = write_tiny_bundle(tmp_path / "champion").path
    challenger = write_tiny_bundle(tmp_path / "challenger", policy=Policy(temperature=3.0)).path
    env = {"HOLOTYPE_ADMIN_KEY": "boss"}
    settings = rule(tmp_path, shadow=True) | {"deadline_seconds": 1, "stuck_seconds": 60}
    with serving(champion, challenger=challenger, folder=tmp_path, env=env, **settings) as server:
        (model,) = server.client.get("/admin/models", headers={"X-API-Key": "boss"}).json()["models"]
        with stalled(*model["challenger"]["processes"]):
            assert server.predict(picture()).status_code == 200
            time.sleep(1.5)
        wait_for(lambda: server.client.get("/experiment").json()["skipped"] == 1, "deadline")
        status = server.client.get("/experiment").json()
        assert status["challenger"]["keys"] == status["challenger"]["failed"] == failures(server) == 0


def test_the_database_may_come_later(tmp_path: Path) -> None:
    champion = write_tiny_bundle(tmp_path / "champion").path
    challenger = write_tiny_bundle(tmp_path / "challenger", policy=Policy(temperature=3.0)).path
    later = tmp_path / "later"
    settings = {
        "experiment": {"share": 0.5},
        "records": {"database": f"sqlite:///{later / 'ab.db'}", "journal": str(tmp_path)},
    }
    with serving(champion, challenger=challenger, folder=tmp_path, **settings) as server:
        for number in range(10):
            key = {"X-Holotype-Subject": f"user-{number}"}
            assert server.client.post("/predict", content=picture(), headers=key).status_code == 200
        assert not server.client.get("/stats").json()["records"]["database"]
        wait_for(lambda: b"database is down" in server.log.read_bytes(), "warning")
        later.mkdir()

        def arrived() -> bool:
            response = server.client.get("/experiment")
            found = response.json()
            return (
                response.status_code == 200
                and sum(found[arm]["answers"] for arm in ("champion", "challenger")) == 10
            )

        wait_for(arrived, "answers of before")
