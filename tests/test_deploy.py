"""What is in deploy/ fits the server that is here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from holotype.cli import run
from servers import LIVENESS, launch, serving, wait_for
from tiny import tiny_baseline, write_tiny_bundle

DEPLOY = Path(__file__).parents[1] / "deploy"


def instructions() -> dict[str, str]:
    """Of the Dockerfile, the last one of each name."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "").splitlines()
    return dict(line.split(" ", 1) for line in lines if line)


@pytest.mark.parametrize("key", [None, "secret", "schlüssel"])
def test_the_container_is_healthy_with_a_key_and_without(
    tiny_bundle: Path, tmp_path: Path, key: str | None
) -> None:
    """The command of HEALTHCHECK against a server that listens as ENTRYPOINT lets it."""
    said = instructions()
    assert "--host 0.0.0.0" in " ".join(json.loads(said["ENTRYPOINT"]))
    _, _, command = said["HEALTHCHECK"].partition("CMD ")
    python, *arguments = json.loads(command)
    assert python == "/opt/holotype/bin/python"
    log = tmp_path / "log"
    env = {"HOLOTYPE_API_KEY": key or ""}
    process = launch(tiny_bundle, log_file=log, env=env, host="0.0.0.0")
    try:
        wait_for(lambda: b"serving" in log.read_bytes() or process.poll() is not None, "server")
        found = re.search(r"http://0\.0\.0\.0:(\d+)", log.read_text())
        assert found, log.read_text()
        own = [part.replace("127.0.0.1:8000", f"127.0.0.1:{found[1]}") for part in arguments]
        assert found[1] in " ".join(own)
        done = subprocess.run(
            [sys.executable, *own],
            env={**os.environ, **env},
            capture_output=True,
            check=False,
            timeout=LIVENESS,
        )
        assert done.returncode == 0, done.stderr.decode()
        if key is not None:
            assert httpx.get(f"http://127.0.0.1:{found[1]}/readyz").status_code == 401
            wrong = {**os.environ, "HOLOTYPE_API_KEY": "wrong"}
            assert subprocess.run(
                [sys.executable, *own], env=wrong, capture_output=True, check=False
            ).returncode
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIVENESS)


def understood(command: list[str], *, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that `holotype serve` knows the flags of a command: it refuses but one more."""
    assert command[1] == "serve"
    assert run(["serve", str(target), *command[3:], "--share", "10%"]) == 2
    assert "--share: means nothing without a challenger" in capsys.readouterr().err


def test_the_container_starts_with_flags_that_there_are(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    understood(json.loads(instructions()["ENTRYPOINT"]), target=tiny_bundle, capsys=capsys)


def test_the_unit_is_one(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DEPLOY / "holotype.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", text, flags=re.MULTILINE)
    command = shlex.split(start)
    understood(command, target=tiny_bundle, capsys=capsys)
    # The server takes thirty seconds at most to end.
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", text, flags=re.MULTILINE)[1]) > 30
    if (verify := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd is not here to verify it")
    unit = tmp_path / "holotype.service"
    unit.write_text(text.replace(command[0], sys.executable))  # it has to exist
    done = subprocess.run(
        [verify, "verify", unit], capture_output=True, text=True, check=False, timeout=LIVENESS
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_dashboard_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    champion = write_tiny_bundle(tmp_path / "champion", baseline=tiny_baseline()).path
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"\bholotype_\w+", expression)}
    assert len(names) > 10
    with serving(champion, folder=tmp_path) as server:
        text = server.client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, flags=re.MULTILINE))
    told = set(kinds)
    for name, kind in kinds.items():
        told |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else set()
    assert names <= told
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(titles)) == len(titles)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
