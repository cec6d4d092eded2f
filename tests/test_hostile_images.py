"""Images that were sent to hurt: each costs one clear error, never the process, its memory or its log."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import awkward
from awkward import encode, picture
from holotype.errors import (
    BrokenImageError,
    ConfigError,
    EmptyImageError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
)
from holotype.predictor import Failure, load
from holotype.preprocess import Box, Facts, Limits, Preprocess, facts, read_pixels

SPEC = Preprocess(height=32, width=32)


def run_child(code: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python `code` in a process of its own, with this folder importable and warnings as errors."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-W", "error", "-X", "faulthandler", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


def refused(data: bytes, kind: type[ImageError], *, match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        read_pixels(data, spec=SPEC)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- what is not an image


def test_an_empty_file_is_a_400():
    refused(b"", EmptyImageError, match="empty")
    assert EmptyImageError.status == 400


@pytest.mark.parametrize("name", sorted(awkward.not_images()))
def test_what_is_not_an_image_is_a_415_that_lists_the_formats(name):
    refused(awkward.not_images()[name], UnsupportedImageError, match=r"not an image we read; use JPEG, PNG")
    assert UnsupportedImageError.status == 415


def test_no_process_is_started_and_no_file_opened_for_any_of_them():
    code = """
import sys
import awkward
from holotype.errors import ImageError
from holotype.preprocess import Preprocess, read_pixels

files = list(awkward.not_images().values()) + [make() for make in awkward.SMALL.values()]
spec = Preprocess(height=32, width=32)
for data in files[-8:]:
    read_pixels(data, spec=spec)  # imports what is imported late

seen = []
def watch(event, arguments):
    if event in {"open", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system",
                 "socket.connect", "ctypes.dlopen", "pty.spawn"}:
        seen.append((event, str(arguments)))
sys.addaudithook(watch)
for data in files:
    try:
        read_pixels(data, spec=spec)
    except ImageError:
        pass
assert not seen, seen
open(sys.argv[0] if sys.argv[0] != "-c" else "/dev/null").close()
assert seen, "the hook hears nothing"
print("quiet")
"""
    result = run_child(code)
    assert result.stdout.strip() == "quiet", result.stderr


def test_a_header_alone_is_never_an_image():
    for make in awkward.SMALL.values():
        data = make()
        for length in range(1, 40):
            with pytest.raises((BrokenImageError, UnsupportedImageError)):
                read_pixels(data[:length], spec=SPEC)


# --------------------------------------------------------------------------------------------- too large


def test_a_png_header_of_60000_x_60000_is_a_413_that_costs_no_memory():
    code = """
import resource, sys
import awkward
from holotype.errors import ImageTooLargeError
from holotype.preprocess import Preprocess, read_pixels

spec = Preprocess()
read_pixels(awkward.SMALL["PNG"](), spec=spec)
data = awkward.png_claiming(60_000, 60_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_pixels(data, spec=spec)
except ImageTooLargeError as error:
    print(error.status, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = run_child(code)
    assert result.returncode == 0, result.stderr
    status, megabytes = map(int, result.stdout.split())
    assert status == 413
    assert megabytes < 50


def test_a_png_of_9500_x_9500_is_a_413_whether_or_not_warnings_are_errors():
    refused(awkward.huge_png(), ImageTooLargeError, match="over the limit of 50,000,000 pixels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(awkward.huge_png(), ImageTooLargeError, match="over the limit of 50,000,000 pixels")


def test_a_large_header_is_refused_in_every_format_before_decoding():
    headers = {
        "PNG": awkward.png_claiming(8000, 7000),
        "BMP": patched(
            awkward.SMALL["BMP"](), 18, (8000).to_bytes(4, "little") + (7000).to_bytes(4, "little")
        ),
        "GIF": patched(
            awkward.SMALL["GIF"](), 6, (8000).to_bytes(2, "little") + (7000).to_bytes(2, "little")
        ),
        "TIFF": awkward.tiff(b"\0" * 10, width=8000, height=7000, bits=8),
        "JPEG": jpeg_claiming(8000, 7000),
    }
    for kind, data in headers.items():
        started = time.process_time()
        with pytest.raises(ImageTooLargeError, match="8000 x 7000"):
            read_pixels(data, spec=SPEC)
        assert time.process_time() - started < 0.5, kind


@pytest.fixture
def guard(monkeypatch):
    """Pillow's own limit, which is put back afterwards."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    return Image.MAX_IMAGE_PIXELS


def test_a_limit_above_the_bomb_guard_of_pillow_is_the_one_that_counts(guard):
    photo = encode(Image.new("L", (15_000, 13_000), 90), "JPEG")
    allowed = Limits(max_pixels=195_000_000)
    assert allowed.max_pixels > 2 * guard
    assert np.array_equal(read_pixels(photo, spec=SPEC, limits=allowed), np.full((32, 32, 3), 90, np.uint8))
    assert facts(awkward.png_claiming(15_000, 13_000), limits=allowed) == Facts("PNG", "RGB", 15_000, 13_000)
    for limit in (194_999_999, 100_000_000, 50_000_000):
        message = f"15000 x 13000 pixels is over the limit of {limit:,} pixels"
        with pytest.raises(ImageTooLargeError, match=message):
            read_pixels(photo, spec=SPEC, limits=Limits(max_pixels=limit))
    with pytest.raises(ImageTooLargeError, match="over the limit of 195,000,000 pixels"):
        read_pixels(awkward.png_claiming(60_000, 60_000), spec=SPEC, limits=allowed)


def test_threads_with_limits_of_their_own_keep_to_them(guard):
    data = jpeg_claiming(15_000, 13_000)

    def refusal(millions: int) -> str:
        try:
            read_pixels(data, spec=SPEC, limits=Limits(max_pixels=millions * 1_000_000))
        except ImageError as error:
            return str(error)
        return "read"

    limits = [50, 90, 190, 195, 200, 300, 1000] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(refusal, limits))
    wanted = ["read" if limit >= 195 else f"over the limit of {limit},000,000 pixels" for limit in limits]
    assert all(said.endswith(end) for said, end in zip(found, wanted, strict=True)), set(found)


def test_no_limit_is_beyond_what_a_machine_holds(guard):
    with pytest.raises(ImageTooLargeError, match=r"over the limit of 1,000,000,000 pixels"):
        read_pixels(awkward.png_claiming(60_000, 60_000), spec=SPEC, limits=Limits(max_pixels=10**9))
    with pytest.raises(ConfigError, match=r"10,000,000,000 pixels .*; set at most 1,000,000,000"):
        Limits(max_pixels=10**10)


def test_the_guard_of_pillow_is_left_alone_where_nobody_asks_for_more(guard, monkeypatch):
    for limits in (None, Limits(max_pixels=60_000_000)):
        read_pixels(awkward.SMALL["PNG"](), spec=SPEC, limits=limits)
        assert guard == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # by a program that is stricter
    with pytest.raises(ImageTooLargeError, match="over the limit of 1,000 pixels"):
        read_pixels(encode(picture(64, 48), "PNG"), spec=SPEC)


def patched(data: bytes, at: int, content: bytes) -> bytes:
    return data[:at] + content + data[at + len(content) :]


def jpeg_claiming(width: int, height: int) -> bytes:
    data = awkward.SMALL["JPEG"]()
    return patched(data, data.index(b"\xff\xc0") + 5, height.to_bytes(2, "big") + width.to_bytes(2, "big"))


def test_a_progressive_jpeg_with_thousands_of_scans_is_refused_at_once():
    data = awkward.progressive_jpeg(extra_scans=5000)
    started = time.process_time()
    refused(data, BrokenImageError, match="JPEG with 50.. scans")
    assert time.process_time() - started < 0.5


def test_the_larger_a_jpeg_the_fewer_scans_it_may_have():
    read_pixels(awkward.progressive_jpeg(extra_scans=60), spec=SPEC)
    large = encode(Image.new("RGB", (5000, 5000)), "JPEG", progressive=True)
    last = large.rindex(b"\xff\xda")
    bomb = large[:-2] + large[last:-2] * 60 + large[-2:]
    refused(bomb, BrokenImageError, match="more than the 40 allowed at its size")


@pytest.mark.parametrize("scans", [5, 300])
def test_a_sequential_jpeg_may_be_written_in_several_scans_but_not_in_hundreds(scans):
    grey = encode(picture(64, 48)[..., 0], "JPEG")
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    components = b"\x03" + b"".join(bytes([name, 0x11, 0]) for name in (1, 2, 3))
    header = grey[:frame] + b"\xff\xc0\x00\x11" + grey[frame + 4 : frame + 9] + components
    data = header + grey[frame + 13 : scan] + grey[scan:-2] * scans + b"\xff\xd9"
    if scans == 5:
        read_pixels(data, spec=SPEC)
    else:
        refused(data, BrokenImageError, match="JPEG with 300 scans")


def test_a_scan_hidden_behind_a_marker_without_length_is_counted():
    data = awkward.progressive_jpeg(extra_scans=300)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    refused(data[:second] + b"\xff\x01" + data[second:], BrokenImageError, match="JPEG with 310 scans")


@pytest.mark.parametrize("filler", [b"\xff", b"\xff\x00", b"\xff\xd0", b"\xff\xda", b"\xff\xe0\x00\x02"])
def test_megabytes_of_markers_behind_a_scan_take_no_time(filler):
    data = encode(picture(64, 48), "JPEG", progressive=True)
    bomb = data[:-2] + filler * (4_000_000 // len(filler))
    started = time.process_time()
    with contextlib.suppress(BrokenImageError):
        read_pixels(bomb, spec=SPEC)
    assert time.process_time() - started < 2


def test_an_ordinary_progressive_jpeg_with_a_thumbnail_and_a_video_behind_it_is_read():
    photo = encode(picture(64, 48), "JPEG", progressive=True)
    thumbnail = encode(picture(16, 12), "JPEG", progressive=True)
    video = b"\0\0\0\x18ftypmp42" + b"\xff\xda\x00\x08" * 500
    whole = awkward.with_app1(photo, b"thumbnail\0" + thumbnail) + video
    assert np.array_equal(read_pixels(whole, spec=SPEC), read_pixels(photo, spec=SPEC))


# ------------------------------------------------------------------------------------------ several frames


def test_of_an_mpo_the_first_frame_is_read():
    first, second = picture(48, 32), 255 - picture(48, 32)
    data = awkward.two_frame_mpo(first, second)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    spec = Preprocess(height=32, width=48)
    assert np.array_equal(read_pixels(data, spec=spec), awkward.decode(encode(first, "JPEG", quality=90)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_500_frames_the_first_is_read_in_bounded_time(kind):
    data = awkward.animation(kind)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 500
    started = time.process_time()
    assert (read_pixels(data, spec=SPEC) == 200).all()
    assert time.process_time() - started < 1


def test_of_a_tiff_with_pages_the_first_is_read():
    pages = [picture(32, 32, seed=seed) for seed in range(5)]
    assert np.array_equal(read_pixels(awkward.pages_tiff(pages), spec=SPEC), pages[0])


# ------------------------------------------------------------------------------------------------- damaged


def test_a_jpeg_cut_in_half_is_a_422_that_says_truncated():
    for data in (encode(picture(200, 150), "JPEG"), encode(picture(200, 150), "JPEG", progressive=True)):
        refused(data[: len(data) // 2], BrokenImageError, match=r"^truncated image$")
    data = awkward.photo_jpeg(1031, 777)  # through the scaled decoder
    refused(data[: len(data) // 2], BrokenImageError, match=r"^truncated image$")
    assert BrokenImageError.status == 422


@pytest.mark.parametrize("kind", sorted(awkward.SMALL))
def test_half_a_file_is_never_half_an_image(kind):
    data = awkward.SMALL[kind]()
    if kind == "MPO":  # its first frame ends in the middle of the file
        data = data[: len(data) // 2]
    if kind == "GIF":
        data = encode(picture(24, 16), "GIF")
    with pytest.raises(BrokenImageError):
        read_pixels(data[: len(data) // 2], spec=SPEC)


def test_messages_hold_no_address_and_no_path():
    for kind, make in awkward.SMALL.items():
        data = make()
        for seed in range(60):
            try:
                read_pixels(awkward.mutate(data, seed=seed), spec=SPEC)
            except ImageError as error:
                text = str(error)
                assert "0x" not in text, (kind, seed, text)
                assert "site-packages" not in text, (kind, seed, text)
                assert len(text) < 300, (kind, seed, text)
                assert text.isprintable(), (kind, seed, text)


# ------------------------------------------------------------------------------------------------ warnings


def chatty() -> dict[str, bytes]:
    """Readable images that Pillow warns about."""
    pixels = picture(24, 16)
    tiff = encode(pixels, "TIFF", description="x" * 40)
    offset = tiff.index(b"x" * 40)
    pointer = tiff.index(offset.to_bytes(4, "little"))
    return {
        "damaged EXIF": awkward.corrupt_exif_jpeg(pixels),
        "TIFF tag outside of the file": patched(tiff, pointer - 4, (10**9).to_bytes(4, "little")),
        "palette with many alphas": encode(
            Image.fromarray(pixels).quantize(8), "PNG", transparency=bytes(range(0, 240, 30))
        ),
    }


@pytest.mark.parametrize("name", sorted(chatty()))
def test_strange_metadata_changes_neither_pixels_nor_log_with_any_warning_filter(name):
    data = chatty()[name]
    results = []
    for action in ("error", "always", "default", "ignore"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(action)
            results.append(read_pixels(data, spec=SPEC))
        assert not caught, [str(warning.message) for warning in caught]
    assert all(np.array_equal(results[0], other) for other in results)


def test_pillow_does_warn_about_at_least_one_of_them():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        awkward.decode(chatty()["TIFF tag outside of the file"])
    assert caught


def test_a_caller_still_hears_warnings_that_are_not_about_the_image():
    read_pixels(awkward.SMALL["PNG"](), spec=SPEC)
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)
    with (
        pytest.raises(Image.DecompressionBombWarning),
        Image.open(io.BytesIO(awkward.huge_png())),
    ):
        pass


def test_threads_with_warnings_as_errors_all_read_the_chatty_images():
    files = list(chatty().values()) * 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(lambda data: read_pixels(data, spec=SPEC), files))) == len(files)


# ---------------------------------------------------------------------------------------------------- HEIC


def test_heic_without_its_library_is_a_415_that_names_the_extra(monkeypatch):
    header = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    refused(
        header, UnsupportedImageError, match=r"HEIC images need an extra; run: pip install 'holotype\[heic\]'"
    )


def test_avif_in_a_general_container_is_read_without_the_heic_library(monkeypatch):
    data = awkward.SMALL["AVIF"]()
    assert data[8:12] == b"avif"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    general = data[:8] + b"mif1" + data[12:]
    assert b"avif" in general[16:40]
    assert np.array_equal(read_pixels(general, spec=SPEC), read_pixels(data, spec=SPEC))


def test_heic_is_read_with_its_library():
    pytest.importorskip("pillow_heif")
    pixels = picture(64, 48)
    shown = read_pixels(awkward.heic(pixels), spec=Preprocess(height=48, width=64))
    assert np.abs(shown.astype(int) - pixels).mean() < 12
    data = awkward.heic(pixels)
    refused(data[: len(data) // 2], BrokenImageError, match="broken")


# --------------------------------------------------------------------------------------------- a predictor


def test_a_predictor_answers_each_image_or_says_why_not(tiny_bundle, tmp_path):
    files = {
        "good.png": (encode(Image.new("RGB", (40, 30), (255, 0, 0)), "PNG"), None),
        "empty.jpg": (b"", 400),
        "huge.png": (awkward.png_claiming(60_000, 60_000), 413),
        "script.jpg": (awkward.not_images()["eps"], 415),
        "cut.jpg": (awkward.SMALL["JPEG"]()[:700], 422),
        "last.webp": (encode(Image.new("RGB", (40, 30), (0, 0, 255)), "WEBP"), None),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    answers = list(
        load(tiny_bundle).predict_many([*(tmp_path / name for name in files), tmp_path / "none.jpg"])
    )
    statuses = [answer.error.status if answer.error else None for answer in answers]
    assert statuses == [*(status for _, status in files.values()), 404]
    assert (answers[0].label, answers[5].label) == ("red", "blue")


def test_a_name_that_no_file_can_have_is_an_error_of_its_row(tiny_bundle, tmp_path):
    good = tmp_path / "good.png"
    good.write_bytes(encode(Image.new("RGB", (40, 30), (255, 0, 0)), "PNG"))
    names = [str(good), f"{good}\0{good}", f"{tmp_path}/\ud800.png", str(good)]
    answers = list(load(tiny_bundle).predict_many(names))
    refused = Failure(404, "cannot be read (no file can be called so)")
    assert [answer.label for answer in answers] == ["red", None, None, "red"]
    assert [answer.path for answer in answers] == names
    assert [answer.error for answer in answers] == [None, refused, refused, None]


def test_a_region_never_lets_a_hostile_image_pass():
    for data, kind in ((b"", EmptyImageError), (awkward.png_claiming(60_000, 60_000), ImageTooLargeError)):
        with pytest.raises(kind):
            read_pixels(data, spec=SPEC, region=Box(0, 0, 10, 10))


# ----------------------------------------------------------------------------------------------- mutations


MUTATED = sorted(awkward.VARIANTS)


def survive(kind: str, *, start: int, count: int, timeout: float) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    code = "import sys, awkward; awkward.hammer(sys.argv[1], start=int(sys.argv[2]), count=int(sys.argv[3]))"
    result = run_child(code, kind, str(start), str(count), timeout=timeout)
    seeds = result.stdout.split()
    last = seeds[-1] if seeds else "none"
    assert result.returncode == 0, f"{kind}: mutation with seed {last} ended it\n{result.stderr[-3000:]}"
    assert len(seeds) == count


@pytest.mark.parametrize("kind", MUTATED)
def test_500_mutations_give_pixels_or_an_image_error(kind):
    survive(kind, start=0, count=500, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATED)
def test_10000_mutations_give_pixels_or_an_image_error(kind):
    survive(kind, start=1_000, count=10_000, timeout=900)


def test_mutations_reach_both_success_and_failure_in_every_format():
    for kind in awkward.SMALL:
        makers = awkward.VARIANTS[kind]
        outcomes = set()
        for seed in range(120):
            try:
                read_pixels(awkward.mutate(makers[0](), seed=seed), spec=SPEC)
                outcomes.add("read")
            except ImageError:
                outcomes.add("refused")
        assert outcomes == {"read", "refused"}, kind


def test_the_decoders_under_test_are_there():
    assert all(features.check(name) for name in ("jpg", "zlib", "libtiff", "webp", "avif"))
    assert set(awkward.SMALL) == set(awkward.VARIANTS) - {"HEIF"}
