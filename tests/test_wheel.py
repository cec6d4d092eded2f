"""The built wheel, alone with its core dependencies, in a clean environment: no torch, and it serves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import httpx
import pytest

from holotype import TrainResult, load

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_core_install_predicts_and_serves(probe: TrainResult, digits: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, capture_output=True)
    listed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"^(torch|polars|timm|scipy|scikit-learn|matplotlib) ", listed, re.MULTILINE)
    holotype = tmp_path / "env" / "bin" / "holotype"
    file = next(digits.glob("test/0/*.png"))
    done = subprocess.run(
        [holotype, "predict", probe.best, file, "--json"], check=True, capture_output=True, text=True
    )
    wanted = load(probe.best).predict(file).label
    assert json.loads(done.stdout)["results"][0]["label"] == wanted
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([holotype, "serve", probe.best, "--port", "0"], stderr=stream)
    try:
        limit = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit
            time.sleep(0.05)
        answer = httpx.post(f"{found[0]}/predict", content=file.read_bytes(), timeout=30).json()
        assert answer["results"][0]["label"] == wanted
        assert answer["bundle"] == probe.bundle.hash
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
