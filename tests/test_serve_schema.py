"""The server's own OpenAPI document, taken at its word by schemathesis."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from servers import serving
from tiny import tiny_baseline, write_tiny_bundle


@pytest.mark.slow
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "colours", baseline=tiny_baseline()).path
    rival = write_tiny_bundle(tmp_path / "rival").path
    settings = {
        "records": {"database": f"sqlite:///{tmp_path / 'ab.db'}", "journal": str(tmp_path)},
        "log": "none",
    }
    env = {"HOLOTYPE_ADMIN_KEY": "boss"}
    # No schema can say which bytes are an image, or where on the server a bundle is.
    (tmp_path / "schemathesis.toml").write_text(
        "".join(
            f'[[operations]]\ninclude-path = "{path}"\nchecks.positive_data_acceptance.enabled = false\n'
            for path in ("/predict", "/v2/models/{name}/infer")
        )
    )
    with serving(bundle, challenger=rival, folder=tmp_path, env=env, **settings) as server:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
                "--header", "X-API-Key: boss", "--max-examples", "40", "--seed", "1",
                "--exclude-path-regex", "^/admin/.*(promote|rollback)", "--no-color",
            ],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
