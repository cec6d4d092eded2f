from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional

from holotype.errors import TrainingError
from holotype.fit import checkpoint
from holotype.fit.checkpoint import (
    Checkpoint,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)


def numbered(number: int, *, size: int = 1000) -> Checkpoint:
    """A checkpoint that is whole only if all of its values are `number`."""
    return Checkpoint({"a": torch.full((size,), float(number)), "b": torch.tensor(number)}, {"n": number})


def number_of(checkpoint: Checkpoint) -> int:
    """The number of a checkpoint that was made by `numbered`; fails if it is a mixture."""
    number = checkpoint.state["n"]
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.tensors["a"].eq(number).all()
    assert int(checkpoint.tensors["b"]) == number
    return int(number)


def test_everything_comes_back_bit_by_bit(tmp_path: Path) -> None:
    shared = torch.randn(4, 3, 5, 5)
    tensors = {
        "half": torch.randn(3, 7).bfloat16(),
        "mask": torch.tensor([True, False]),
        "count": torch.tensor(2**62 + 1),
        "empty": torch.empty(0, 3),
        "odd": torch.tensor([math.nan, math.inf, -0.0]),
        "last": shared.to(memory_format=torch.channels_last),
        "shared": shared,
        "shared too": shared,
        "part": shared[1],
    }
    state = {"rate": 0.1 + 0.2, "best": -math.inf, "rows": [[1, "é", None], {"deep": 1e-320}], "done": False}
    save_checkpoint(tmp_path / "last", Checkpoint(tensors, state))
    loaded = load_checkpoint(tmp_path / "last")
    assert loaded.state == state
    assert set(loaded.tensors) == set(tensors)
    for name, tensor in loaded.tensors.items():
        assert tensor.dtype == tensors[name].dtype, name
        assert tensor.shape == tensors[name].shape, name
        assert torch.equal(bits(tensor), bits(tensors[name])), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_the_newest_and_the_one_before_it_are_kept(tmp_path: Path) -> None:
    files = [save_checkpoint(tmp_path, numbered(n)) for n in range(1, 5)]
    assert sorted(tmp_path.iterdir()) == files[2:]
    assert number_of(load_checkpoint(tmp_path)) == 4


def test_a_folder_without_checkpoints_says_how_to_go_on(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(TrainingError, match=r"holds no checkpoint; start again without --resume"):
            load_checkpoint(folder)


def test_a_damaged_checkpoint_is_named_set_aside_and_not_fallen_back_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path, numbered(1))
    broken = save_checkpoint(tmp_path, numbered(2))
    broken.write_bytes(broken.read_bytes()[:-1])
    assert number_of(load_checkpoint(tmp_path)) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"{broken} is damaged" in told
    assert broken.with_suffix(".damaged").exists()
    save_checkpoint(tmp_path, numbered(3)).unlink()  # as if it were lost: number 1 must still be there
    assert number_of(load_checkpoint(tmp_path)) == 1


def test_nothing_whole_left_is_one_clear_error(tmp_path: Path) -> None:
    for n in (1, 2):
        save_checkpoint(tmp_path, numbered(n)).write_bytes(b"")
    with pytest.raises(TrainingError, match=r"every checkpoint is damaged .*; start again") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    damage=st.lists(
        st.tuples(
            st.sampled_from([1, 2]),
            st.sampled_from(["cut", "flip", "grow", "delete", "empty"]),
            st.floats(0, 1, exclude_max=True),
            st.integers(1, 255),
        ),
        max_size=3,
    )
)
def test_no_damage_is_ever_taken_for_a_checkpoint(damage: list[tuple[int, str, float, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {n: save_checkpoint(folder, numbered(n, size=30)) for n in (1, 2)}
        whole = {n: file.read_bytes() for n, file in files.items()}
        for n, kind, place, value in damage:
            spoil(files[n], kind, place=place, value=value)
        # Two changes of one file may undo each other.
        left = [n for n, file in files.items() if file.exists() and file.read_bytes() == whole[n]]
        if left:
            assert number_of(load_checkpoint(folder)) == max(left)
        else:
            with pytest.raises(TrainingError):
                load_checkpoint(folder)


def spoil(file: Path, kind: str, *, place: float, value: int) -> None:
    content = bytearray(file.read_bytes()) if file.exists() else bytearray()
    if kind == "delete":
        file.unlink(missing_ok=True)
        return
    if kind == "flip" and content:
        content[int(place * len(content))] ^= value
    elif kind == "grow":
        content += bytes([value])
    else:
        content = content[: int(place * len(content)) if kind == "cut" else 0]
    file.write_bytes(content)


WRITER = """
import importlib.util, os, random, signal, sys, time
from pathlib import Path
import torch

# The module alone: some of what its package imports starts threads, and a process with threads cannot fork.
spec = importlib.util.spec_from_file_location("checkpoint", sys.argv[3])
module = sys.modules["checkpoint"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
torch.set_num_threads(1)
assert len(os.listdir("/proc/self/task")) == 1

folder, kills, delays = Path(sys.argv[1]), int(sys.argv[2]), random.Random(1)

def save(number):
    tensors = {"a": torch.full((100_000,), float(number)), "b": torch.tensor(number)}
    module.save_checkpoint(folder, module.Checkpoint(tensors, {"n": number}))

def load():
    loaded = module.load_checkpoint(folder)
    number = loaded.state["n"]
    assert loaded.tensors["a"].eq(number).all() and int(loaded.tensors["b"]) == number
    return number

save(0)
for kill in range(kills):
    first = load() + 1
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for number in range(first, first + 100_000):
            save(number)
            os.write(write, number.to_bytes(8, "big"))
        os._exit(1)
    os.close(write)
    last = int.from_bytes(os.read(read, 8), "big")  # the first save of this child is done
    time.sleep(delays.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    last = max(last, int.from_bytes(os.read(read, 1 << 20)[-8:], "big"))
    os.close(read)
    # What was reported as saved is there; at most one more was saved, but not yet reported.
    number = load()
    assert last <= number <= last + 1, (kill, last, number)
    assert len(list(folder.glob("checkpoint-*"))) <= 3, kill
    assert not list(folder.glob("*.damaged")), kill
print("survived", kills, number)
"""


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path: Path, kills: int) -> None:
    done = run(WRITER, tmp_path, kills, checkpoint.__file__)
    assert f"survived {kills}" in done.stdout, done.stderr
    assert int(done.stdout.split()[-1]) > kills


def run(script: str, *arguments: object, within: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = (*within, sys.executable, "-c", script, *map(str, arguments))
    # Only a process without threads may fork, and numpy's BLAS starts some when it is imported.
    single = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=single)


FULL_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import check_full_disk
check_full_disk(Path(sys.argv[1]), capacity=1 << 20)
print("refused")
"""


def check_full_disk(folder: Path, *, capacity: int) -> None:
    """On a disk with room for `capacity` bytes: the error is clear, what was saved before stays."""
    save_checkpoint(folder, numbered(1))
    before = sorted(folder.iterdir())
    with pytest.raises(TrainingError) as caught:
        save_checkpoint(folder, numbered(2, size=capacity))  # four bytes a value
    assert str(folder) in str(caught.value)
    assert "make room for 4." in str(caught.value)
    assert sorted(folder.iterdir()) == before
    assert number_of(load_checkpoint(folder)) == 1
    save_checkpoint(folder, numbered(3))
    assert number_of(load_checkpoint(folder)) == 3


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_is_valid(tmp_path: Path) -> None:
    """On a real tmpfs of 1 MB, mounted in a namespace of its own."""
    unshare, mount = shutil.which("unshare"), shutil.which("mount")
    if unshare is None or mount is None:
        pytest.skip("needs unshare and mount")
    prefix = (unshare, "--mount", "--user", "--map-root-user")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel gives no mount namespaces to users")
    shell = f'{mount} -t tmpfs -o size=1m tmpfs "{tmp_path}" && exec "$@"'
    done = run(FULL_DISK, tmp_path / "last", Path(__file__).parent, within=(*prefix, "sh", "-c", shell, "sh"))
    assert done.stdout == "refused\n", done.stderr


def test_a_file_size_limit_is_a_clear_error_too(tmp_path: Path) -> None:
    with file_size_limit(1 << 20):
        check_full_disk(tmp_path, capacity=1 << 20)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "last").write_text("a file")
    with pytest.raises(TrainingError, match="could not be written"):
        save_checkpoint(tmp_path / "last", numbered(1))


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return network.to(memory_format=torch.channels_last)


def take_steps(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        functional.cross_entropy(network(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
        optimizer.step()


OPTIMIZERS = ["adamw", "sgd", "lamb", "lion", "adafactor", "adafactorbv", "muon", "lookahead_adamw"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_exactly_where_it_stopped(name: str, tmp_path: Path) -> None:
    network = small_network()
    optimizer = create_optimizer_v2(network, opt=name, lr=1e-3, weight_decay=0.01, momentum=0.9)
    take_steps(network, optimizer, range(7))
    optimizer.param_groups[0]["lr"] = 0.1 + 0.2
    tensors, state = pack_optimizer(optimizer)
    weights = {f"network.{key}": value for key, value in network.state_dict().items()}
    save_checkpoint(tmp_path, Checkpoint({**weights, **tensors}, {"optimizer": state}))
    take_steps(network, optimizer, range(7, 13))

    loaded = load_checkpoint(tmp_path)
    resumed = small_network()
    resumed.load_state_dict({key: loaded.tensors[f"network.{key}"] for key in resumed.state_dict()})
    again = create_optimizer_v2(resumed, opt=name, lr=0.5, weight_decay=0.5, momentum=0.1)
    unpack_optimizer(again, loaded.tensors, loaded.state["optimizer"])
    assert again.param_groups[0]["lr"] == 0.1 + 0.2
    take_steps(resumed, again, range(7, 13))
    for key, value in network.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    ours, theirs = pack_optimizer(again), pack_optimizer(optimizer)
    assert json.dumps(ours[1]) == json.dumps(theirs[1])
    assert list(ours[0]) == list(theirs[0])
    for key, value in ours[0].items():
        assert torch.equal(bits(value), bits(theirs[0][key])), key
        assert value.stride() == theirs[0][key].stride(), key


def test_the_state_of_another_optimizer_is_refused() -> None:
    network = small_network()
    tensors, state = pack_optimizer(torch.optim.SGD(network.parameters()))
    other = torch.optim.SGD([{"params": [parameter]} for parameter in network.parameters()])
    with pytest.raises(TrainingError, match="of another optimizer"):
        unpack_optimizer(other, tensors, state)


def test_what_no_checkpoint_can_hold_is_refused_when_it_is_packed() -> None:
    optimizer = torch.optim.SGD(small_network().parameters())
    optimizer.param_groups[0]["hook"] = os.getcwd
    with pytest.raises(TrainingError, match=r"param_groups\.0\.hook is a builtin_function_or_method"):
        pack_optimizer(optimizer)
