from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from holotype.config import FitConfig
from holotype.dataset import Shape
from holotype.errors import ConfigError
from holotype.fit.precision import choose_compile, choose_precision
from holotype.models import Classifier
from networks import small_network

CPU = torch.device("cpu")
SIZE = Shape(64, 64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOLOTYPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "measured"


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return small_network("mobilenetv3_small_050", side=SIZE.height, dropout=0.5)


def config(**settings: object) -> FitConfig:
    return FitConfig.model_validate({"unfreeze": "most", "freeze_norm": True, **settings})


def able() -> bool:
    """Whether this CPU computes in bf16, so that there is something to measure."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


needs_bf16 = pytest.mark.skipif(not able(), reason="needs a CPU with bf16 instructions")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_asked_for_is_not_measured(classifier: Classifier, cache: Path, precision: str) -> None:
    assert choose_precision(classifier, config(precision=precision), size=SIZE, device=CPU) == precision
    assert not cache.exists()


def test_fp16_on_a_cpu_is_refused(classifier: Classifier) -> None:
    with pytest.raises(ConfigError, match=r"fit\.precision: fp16 training needs a GPU; use bf16 or fp32"):
        choose_precision(classifier, config(precision="fp16"), size=SIZE, device=CPU)


def test_deterministic_runs_and_cpus_that_emulate_bf16_train_in_fp32(
    classifier: Classifier, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_precision(classifier, config(deterministic=True), size=SIZE, device=CPU) == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert choose_precision(classifier, config(), size=SIZE, device=CPU) == "fp32"
    assert not cache.exists()


@needs_bf16
def test_the_fastest_is_measured_once_and_remembered(
    classifier: Classifier, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = choose_precision(classifier, config(), size=SIZE, device=CPU)
    (file,) = cache.iterdir()
    seconds = json.loads(file.read_text())["seconds_per_image"]
    assert found == min(seconds, key=seconds.get)
    assert set(seconds) == {"fp32", "bf16"}
    assert "ms per image" in capsys.readouterr().err

    other = next(name for name in seconds if name != found)
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "seconds_per_image": {found: 2.0, other: 1.0}})
    )
    assert choose_precision(classifier, config(), size=SIZE, device=CPU) == other
    assert not capsys.readouterr().err
    assert list(cache.iterdir()) == [file]


@needs_bf16
@pytest.mark.parametrize("content", ["", "[]", '{"seconds_per_image": {"fp32": "no"}}'])
def test_a_damaged_memory_is_measured_again(classifier: Classifier, cache: Path, content: str) -> None:
    choose_precision(classifier, config(), size=SIZE, device=CPU)
    (file,) = cache.iterdir()
    file.write_text(content)
    choose_precision(classifier, config(), size=SIZE, device=CPU)
    assert json.loads(file.read_text())["seconds_per_image"]["fp32"] > 0


@needs_bf16
def test_what_changes_the_speed_is_measured_anew(classifier: Classifier, cache: Path) -> None:
    choose_precision(classifier, config(), size=SIZE, device=CPU)
    choose_precision(classifier, config(patience=9), size=SIZE, device=CPU)
    assert len(list(cache.iterdir())) == 1
    choose_precision(classifier, config(), size=Shape(96, 64), device=CPU)
    choose_precision(classifier, config(unfreeze="all"), size=SIZE, device=CPU)
    assert len(list(cache.iterdir())) == 3


@needs_bf16
def test_measuring_leaves_no_trace_in_the_network(classifier: Classifier, cache: Path) -> None:
    classifier.eval()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    choose_precision(classifier, config(freeze_norm=False), size=SIZE, device=CPU)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in classifier.modules())
    assert not any("forward" in vars(module) for module in classifier.modules())
    for name, parameter in classifier.named_parameters():
        assert parameter.grad is None, name
        assert parameter.requires_grad, name
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_cpu_never_compiles_by_itself(classifier: Classifier, cache: Path) -> None:
    for asked in ("auto", False):
        settings = config(compile=asked)
        assert choose_compile(classifier, settings, size=SIZE, device=CPU, precision="fp32") is False
    assert not cache.exists()


COMPILE = """
import torch
from holotype.config import FitConfig
from holotype.dataset import Shape
from holotype.errors import ConfigError
from holotype.fit.precision import choose_compile
from holotype.models import Architecture, create

size, cpu = Shape(32, 32), torch.device("cpu")
classifier = create(
    Architecture(name="resnet18", classes=3, height=32, width=32, mean=(0, 0, 0), std=(1, 1, 1))
)
names = list(classifier.state_dict())
try:
    print(choose_compile(classifier, FitConfig(compile=True), size=size, device=cpu, precision="fp32"))
except ConfigError as error:
    print(error)
classifier.compile()
assert list(classifier.state_dict()) == names
"""


def try_to_compile(tmp_path: Path, *, path: str) -> str:
    """What is said with `path` to look for compilers in, and with nothing compiled before."""
    environment = {**os.environ, "PATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_compiling_without_a_compiler_is_a_clear_error(tmp_path: Path) -> None:
    said = try_to_compile(tmp_path, path="/nonexistent")
    assert said.startswith("fit.compile=true: torch.compile does not work on this machine (")
    assert said.endswith("; install a C++ compiler (on a GPU also triton), or set fit.compile to auto")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiling_with_a_compiler_is_done_when_asked_for(tmp_path: Path) -> None:
    assert try_to_compile(tmp_path, path=os.environ["PATH"]) == "True"
