"""A bundle is whole and unchanged, or it is refused with the first thing that is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holotype.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Golden,
    Lineage,
    Manifest,
    Payload,
    hash_file,
    open_bundle,
    read_golden,
    replace_folder,
    resolve,
    write_bundle,
    write_golden,
    write_text,
)
from holotype.errors import BundleError
from holotype.policy import Policy
from holotype.preprocess import Preprocess
from tiny import CLASSES, SIZE, golden_images


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def sign_again(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the manifest as someone would who also knows how its hash is made."""
    content = json.loads((folder / MANIFEST).read_text())
    del content["hash"]
    change(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    (folder / MANIFEST).write_text(json.dumps({"hash": hashlib.sha256(canonical).hexdigest(), **content}))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --------------------------------------------------------------------------------------------- round trips


def test_what_is_written_is_what_is_opened(tmp_path):
    weights, xml, binary = (tmp_path / name for name in ("weights.safetensors", "model.xml", "model.bin"))
    for file in (weights, xml, binary):
        file.write_bytes(os.urandom(1000))
    manifest = Manifest(
        classes=("Ähre", "b", "c d"),
        preprocess=Preprocess(height=64, width=96, resize="crop", background=(1, 2, 3)),
        policy=Policy(temperature=1.7),
        metrics={"accuracy": 0.1 + 0.2, "per_class": [0.5, None], "nested": {"n": 3}},
        lineage=Lineage(dataset="photos", parent="abc"),
        versions={"python": "3.11"},
    )
    written = write_bundle(
        tmp_path / "out" / "best",
        manifest,
        files={"weights": weights, "openvino": xml, "openvino_weights": binary},
    )
    opened = open_bundle(tmp_path / "out" / "best")
    assert opened == written
    assert opened.manifest.model_dump(exclude={"payloads"}) == manifest.model_dump(exclude={"payloads"})
    assert opened.payload("weights").read_bytes() == weights.read_bytes()
    assert opened.payload("openvino_weights") == opened.path / "openvino" / "model.bin"
    assert opened.payload("onnx") is None
    assert names(opened.path) == [
        "holotype.json",
        "openvino",
        "openvino/model.bin",
        "openvino/model.xml",
        "weights.safetensors",
    ]
    assert names(tmp_path / "out") == ["best", *(f"best/{name}" for name in names(opened.path))]


def test_a_payload_records_its_size_and_hash(tmp_path):
    source = tmp_path / "weights.safetensors"
    source.write_bytes(b"abc")
    written = write_bundle(
        tmp_path / "b", Manifest(classes=("x",), preprocess=Preprocess()), files={"weights": source}
    )
    assert written.manifest.payloads == {
        "weights": Payload(
            path="weights.safetensors",
            sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            bytes=3,
        )
    }


def test_the_hash_of_a_bundle_does_not_depend_on_where_it_lies(bundle, tmp_path):
    moved = bundle.rename(tmp_path / "elsewhere")
    assert open_bundle(moved).hash == json.loads((moved / MANIFEST).read_text())["hash"]


def test_the_hash_changes_with_any_payload(tmp_path):
    source, hashes = tmp_path / "weights.safetensors", set()
    for content in (b"a", b"b", b"a" * 2):
        source.write_bytes(content)
        manifest = Manifest(classes=("x",), preprocess=Preprocess())
        hashes.add(write_bundle(tmp_path / "b", manifest, files={"weights": source}).hash)
    assert len(hashes) == 3


def test_a_bundle_on_a_read_only_disk_opens(bundle):
    for path in (bundle, *bundle.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        assert open_bundle(bundle).manifest.classes == CLASSES
    finally:
        bundle.chmod(0o755)


def test_golden_arrays_come_back_as_they_were(bundle):
    golden = read_golden(open_bundle(bundle))
    assert golden.images.dtype == np.uint8
    assert golden.images.shape == (4, SIZE, SIZE, 3)
    assert golden.logits.dtype == np.float32
    assert np.array_equal(golden.images, golden_images())


# -------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", MANIFEST])
def test_one_flipped_bit_anywhere_is_refused(bundle, name):
    size = (bundle / name).stat().st_size
    for at in (0, size // 3, size // 2, size - 2):
        flip(bundle / name, at)
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            open_bundle(bundle)
        flip(bundle / name, at)
    open_bundle(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(classes=["green", "red", "blue"]),
        lambda m: m["policy"].update(temperature=2.0),
        lambda m: m["preprocess"].update(resize="crop"),
        lambda m: m["metrics"].update(accuracy=1.0),
        lambda m: m["lineage"].update(parent="forged"),
        lambda m: m["payloads"]["onnx"].update(sha256="0" * 64),
        lambda m: m["payloads"].pop("golden"),
    ],
)
def test_an_edited_manifest_is_refused(bundle, change):
    content = json.loads((bundle / MANIFEST).read_text())
    change(content)
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="manifest was changed after it was written; restore the bundle"):
        open_bundle(bundle)


def test_another_layout_of_the_same_manifest_is_the_same_bundle(bundle):
    before = open_bundle(bundle)
    content = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(dict(reversed(content.items()))))
    assert open_bundle(bundle) == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"{}",
        b'{"hash": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"hash": null}',
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(bundle, content):
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"holotype\.json"):
        open_bundle(bundle)


def test_a_missing_payload_is_refused_by_name(bundle):
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: payload is missing .*restore the bundle"):
        open_bundle(bundle)


def test_a_folder_in_place_of_a_payload_is_refused(bundle):
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").mkdir()
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(bundle)


def test_a_symlink_in_place_of_a_payload_is_refused_even_with_the_right_content(bundle, tmp_path):
    elsewhere = (bundle / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (bundle / "model.onnx").symlink_to(elsewhere)
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(bundle)


def test_a_symlink_to_another_file_of_the_bundle_is_refused(bundle):
    (bundle / "model.onnx").rename(bundle / "real.onnx")
    (bundle / "model.onnx").symlink_to("real.onnx")
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(bundle)


def test_a_payload_reached_through_a_linked_folder_is_refused(bundle, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle / "model.onnx").rename(outside / "model.onnx")
    (bundle / "sub").symlink_to(outside)
    sign_again(bundle, lambda m: m["payloads"]["onnx"].update(path="sub/model.onnx"))
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(bundle)


@pytest.mark.parametrize("kind", ["../{name}", "sub/../../{name}", "{absolute}"])
def test_a_payload_path_that_leaves_the_bundle_is_refused_even_with_a_valid_hash(bundle, tmp_path, kind):
    outside = (bundle / "model.onnx").rename(tmp_path / "outside.onnx")
    path = kind.format(name=outside.name, absolute=outside)
    sign_again(bundle, lambda m: m["payloads"]["onnx"].update(path=path))
    with pytest.raises(BundleError, match="leaves the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.update(classes="red"), "classes"),
        (lambda m: m.pop("preprocess"), "preprocess"),
        (lambda m: m["preprocess"].update(width=1), "preprocess.width"),
        (lambda m: m["policy"].update(temperature=-1), "policy.temperature"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m["payloads"].update(pickle=m["payloads"]["onnx"]), "payloads.pickle"),
    ],
)
def test_a_manifest_of_the_wrong_shape_is_refused_with_the_place(bundle, change, place):
    sign_again(bundle, change)
    with pytest.raises(BundleError, match=f"invalid manifest at {place}"):
        open_bundle(bundle)


# ---------------------------------------------------------------------------------------------- versions


def test_a_newer_schema_says_to_upgrade_whatever_else_it_holds(bundle):
    sign_again(bundle, lambda m: m.update(schema_version=SCHEMA_VERSION + 1, novelty={"a": 1}, payloads=[]))
    with pytest.raises(
        BundleError, match=rf"schema version {SCHEMA_VERSION + 1} is newer .*; upgrade holotype"
    ):
        open_bundle(bundle)


def test_a_manifest_written_before_a_field_existed_is_read_with_its_default(bundle):
    def without_later_fields(manifest: dict[str, Any]) -> None:
        for name in ("policy", "metrics", "lineage", "versions"):
            del manifest[name]
        del manifest["preprocess"]["crop_fraction"]

    sign_again(bundle, without_later_fields)
    manifest = open_bundle(bundle).manifest
    assert manifest.policy == Policy()
    assert manifest.preprocess.crop_fraction == Preprocess().crop_fraction


# ------------------------------------------------------------------------------------------------ resolve


def test_a_run_folder_means_its_best(bundle, tmp_path):
    run = tmp_path / "runs" / "photos"
    run.mkdir(parents=True)
    bundle.rename(run / "best")
    assert resolve(run) == run / "best"
    assert resolve(str(run / "best")) == run / "best"
    assert open_bundle(run).path == run / "best"


def test_a_missing_folder_is_an_error_that_names_the_fix(tmp_path):
    with pytest.raises(
        BundleError, match=r"nowhere: no such bundle or run folder; check the path, or run holotype train"
    ):
        open_bundle(tmp_path / "nowhere")


def test_another_folder_is_an_error_that_names_the_fix(tmp_path):
    with pytest.raises(BundleError, match=r"neither a bundle nor a run folder .*; give the folder that"):
        open_bundle(tmp_path)


def test_a_bundle_without_golden_inputs_says_so(tmp_path):
    source = tmp_path / "weights.safetensors"
    source.write_bytes(b"abc")
    manifest = Manifest(classes=("x",), preprocess=Preprocess())
    with pytest.raises(BundleError, match="no golden inputs"):
        read_golden(write_bundle(tmp_path / "b", manifest, files={"weights": source}))


@pytest.mark.parametrize("content", ["text", "object", "incomplete", "archive"])
def test_golden_inputs_that_are_no_arrays_are_refused_and_never_unpickled(tmp_path, content):
    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "canary",))

    file = tmp_path / "golden.npz"
    match content:
        case "text":
            file.write_text("hello")
        case "object":
            np.savez(file, images=np.array([Canary()], dtype=object), logits=np.zeros((1, 1)))
        case "incomplete":
            np.savez(file, images=golden_images())
        case "archive":
            file.write_bytes(b"PK\x03\x04" + bytes(60))
    manifest = Manifest(classes=("x",), preprocess=Preprocess())
    written = write_bundle(tmp_path / "b", manifest, files={"golden": file})
    with pytest.raises(BundleError, match="unreadable golden inputs"):
        read_golden(written)
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------------------------------- replacing a folder


def test_replacing_leaves_the_old_folder_when_the_block_fails(tmp_path):
    target = tmp_path / "best"
    target.mkdir()
    (target / "old").write_text("old")

    def write_half() -> None:
        with replace_folder(target) as folder:
            (folder / "new").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert names(tmp_path) == ["best", "best/old"]


def test_replacing_swaps_the_whole_folder_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "deep" / "best"
    for content in ("one", "two"):
        with replace_folder(target) as folder:
            (folder / content).write_text(content)
            assert not (target / content).exists()
        assert names(tmp_path) == ["deep", "deep/best", f"deep/best/{content}"]


def test_replacing_puts_the_old_folder_back_when_the_swap_itself_fails(tmp_path, monkeypatch):
    target = tmp_path / "best"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def fails_on_the_new_one(self: Path, to: Path) -> Path:
        if Path(to) == target and not self.name.endswith(".old"):
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails_on_the_new_one)
    with pytest.raises(OSError, match="no"), replace_folder(target) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["best", "best/old"]


def test_writing_a_bundle_again_replaces_the_old_one(bundle):
    manifest = open_bundle(bundle).manifest
    again = write_bundle(bundle, manifest, files={"onnx": bundle / "model.onnx"})
    assert open_bundle(bundle) == again
    assert names(bundle) == ["holotype.json", "model.onnx"]


def test_a_failing_write_leaves_the_old_bundle(bundle, tmp_path):
    before = open_bundle(bundle)
    with pytest.raises(FileNotFoundError):
        write_bundle(
            bundle, before.manifest, files={"onnx": bundle / "model.onnx", "weights": tmp_path / "none"}
        )
    assert open_bundle(bundle) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    manifest = Manifest(classes=("x",), preprocess=Preprocess())
    write_bundle(photos, manifest, files={})  # an empty folder is free to use
    shutil.rmtree(photos)
    photos.mkdir()
    (photos / "holiday.jpg").write_bytes(b"precious")
    for target in (photos, photos / "holiday.jpg"):
        with pytest.raises(BundleError, match="in the way and not a bundle; choose another path"):
            write_bundle(target, manifest, files={})
    assert (photos / "holiday.jpg").read_bytes() == b"precious"
    assert names(tmp_path) == ["photos", "photos/holiday.jpg"]


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "state.json"
    write_text(file, "erste Ähre")
    assert file.read_text(encoding="utf-8") == "erste Ähre"

    def no_space(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "second")
    assert file.read_text(encoding="utf-8") == "erste Ähre"
    assert names(tmp_path) == ["state.json"]


def test_hash_file_is_sha256(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"abc" * 1_000_000)
    assert hash_file(file) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_golden_files_hold_plain_arrays(tmp_path):
    write_golden(tmp_path / "g.npz", Golden(images=golden_images(), logits=np.zeros((4, 3), np.float32)))
    with np.load(tmp_path / "g.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"images", "logits"}
