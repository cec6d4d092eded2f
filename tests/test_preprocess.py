"""The pixel path on real bytes: colour by golden values, geometry by hand, one answer for the same image."""

from __future__ import annotations

import contextlib
import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

import awkward
from awkward import encode, photo_jpeg, picture, png, turned_upright, with_orientation
from holotype.errors import (
    BrokenImageError,
    EmptyImageError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
)
from holotype.preprocess import (
    SUFFIXES,
    Box,
    Facts,
    Limits,
    Preprocess,
    facts,
    read_full,
    read_pixels,
    read_views,
)

EXACT = Preprocess(height=8, width=8, background=(10, 20, 30))
"""8 x 8 images come out as they are, so that colour is all that is tested."""


def read(data: bytes, *, spec: Preprocess = EXACT, region: Box | None = None) -> awkward.Array:
    return read_pixels(data, spec=spec, region=region)


def gap(ours: awkward.Array, theirs: awkward.Array) -> awkward.Array:
    return np.abs(ours.astype(int) - theirs.astype(int))


def same_size(data: bytes, **options: object) -> Preprocess:
    """The spec under which the image in `data` is not resized."""
    with Image.open(io.BytesIO(data)) as image:
        return Preprocess(height=image.height, width=image.width, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ colour


@pytest.mark.parametrize("make", [awkward.grey16_png, awkward.grey16_tiff], ids=["png", "tiff"])
def test_sixteen_bit_grey_is_divided_by_257_to_the_nearest(make):
    values = np.zeros((8, 8), np.uint16)
    values[0] = [0, 128, 129, 385, 386, 32767, 65406, 65535]
    wanted = [0, 0, 1, 1, 2, 127, 254, 255]
    pixels = read(make(values))
    assert pixels[0].tolist() == [[level] * 3 for level in wanted]
    assert not pixels[1:].any()


def test_sixteen_bit_tiff_means_the_same_in_both_byte_orders():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    little, big = (read(awkward.grey16_tiff(values, order=order)) for order in "<>")
    assert np.array_equal(little, big)
    assert np.array_equal(little[..., 0], np.round(values / 257))


def test_sixteen_bit_tiff_with_white_as_zero_is_inverted():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1028
    assert np.array_equal(
        read(awkward.grey16_tiff(values, photometric=0)), 255 - read(awkward.grey16_tiff(values))
    )


def test_twelve_bit_tiff_uses_the_full_range():
    values = np.arange(64).reshape(8, 8) * 65
    assert np.array_equal(read(awkward.grey12_tiff(values))[..., 1], np.round(values * 255 / 4095))


def test_transparent_pixels_show_the_background_and_half_transparent_ones_a_mix():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = (200, 100, 50)
    pixels[0, :4, 3] = [0, 255, 51, 128]
    first = read(encode(pixels, "PNG"))[0]
    assert first[0].tolist() == [10, 20, 30]
    assert first[1].tolist() == [200, 100, 50]
    # colour * a + background * (1 - a), with a = 0.2 and 128/255
    assert first[2].tolist() == [48, 36, 34]
    assert first[3].tolist() == [105, 60, 40]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_hidden_colour_under_full_transparency_never_shows(kind):
    pixels = np.full((8, 8, 4), (250, 0, 0, 0), np.uint8)
    options = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100, "speed": 10}}
    shown = read(encode(pixels, kind, **options.get(kind, {})))
    assert np.unique(shown.reshape(-1, 3), axis=0).tolist() == [[10, 20, 30]]


def test_grey_with_alpha_is_composited():
    pixels = np.full((8, 8, 2), (100, 255), np.uint8)
    pixels[0, 0] = (100, 0)
    pixels[0, 1] = (100, 51)
    shown = read(encode(Image.fromarray(pixels), "PNG"))
    assert shown[0, :3].tolist() == [[10, 20, 30], [28, 36, 44], [100, 100, 100]]


def test_palette_with_transparency_is_composited():
    image = Image.new("P", (8, 8), 2)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    image.putpixel((1, 0), 1)
    shown = read(encode(image, "PNG", transparency=bytes([0, 51, 255])))
    assert shown[0, :3].tolist() == [[10, 20, 30], [8, 67, 24], [0, 0, 255]]


def test_palette_with_one_transparent_entry_is_composited_in_png_and_gif():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        shown = read(encode(image, kind, transparency=0))
        assert shown[0, :2].tolist() == [[10, 20, 30], [0, 255, 0]], kind


def test_palette_with_an_alpha_band_is_composited():
    image = Image.new("PA", (8, 8))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), (1, 255))
    image.putpixel((1, 0), (1, 51))
    shown = read(encode(image, "TIFF"))
    assert shown[0, :3].tolist() == [[0, 255, 0], [8, 67, 24], [10, 20, 30]]


@pytest.mark.parametrize(
    ("bits", "key", "row", "wanted"),
    [
        (1, 1, bytes([0b01000000]), [[0] * 3, [10, 20, 30], [0] * 3]),
        (2, 2, bytes([0b00_10_11_01, 0]), [[0] * 3, [10, 20, 30], [255] * 3, [85] * 3]),
        (4, 3, bytes([0x03, 0xF2, 0, 0]), [[0] * 3, [10, 20, 30], [255] * 3, [34] * 3]),
        (8, 3, bytes([0, 3, 255, 4, 0, 0, 0, 0]), [[0] * 3, [10, 20, 30], [255] * 3, [4] * 3]),
        (
            16,
            300,
            struct.pack(">8H", 0, 300, 65535, 299, 0, 0, 0, 0),
            [[0] * 3, [10, 20, 30], [255] * 3, [1] * 3],
        ),
    ],
)
def test_one_transparent_grey_level_is_composited_at_every_depth(bits, key, row, wanted):
    extra = ((b"tRNS", struct.pack(">H", key)),)
    shown = read(png(8, 8, bits=bits, colour=awkward.GREY, rows=row * 8, extra=extra))
    assert shown[0, : len(wanted)].tolist() == wanted


@pytest.mark.parametrize(("bits", "scale"), [(8, 1), (16, 257)])
def test_one_transparent_colour_is_composited_at_every_depth(bits, scale):
    letter = "B" if bits == 8 else "H"
    colours = [(0, 0, 0), (90, 80, 70), (90, 80, 71), (255, 255, 255), *[(1, 2, 3)] * 4]
    row = struct.pack(f">24{letter}", *(level * scale for colour in colours for level in colour))
    extra = ((b"tRNS", struct.pack(">3H", 90 * scale, 80 * scale, 70 * scale)),)
    shown = read(png(8, 8, bits=bits, colour=awkward.RGB, rows=row * 8, extra=extra))
    assert shown[0, :5].tolist() == [[0, 0, 0], [10, 20, 30], [90, 80, 71], [255, 255, 255], [1, 2, 3]]


def test_sixteen_bit_colour_keeps_its_high_byte():
    row = struct.pack(">24H", *[0x1234, 0xFFFF, 0x00FF] * 8)
    shown = read(png(8, 8, bits=16, colour=awkward.RGB, rows=row * 8))
    assert shown[3, 3].tolist() == [0x12, 0xFF, 0]


def test_one_bit_images_are_black_and_white():
    bits = np.indices((8, 8)).sum(axis=0) % 3 == 0
    for kind, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "group4"})):
        shown = read(encode(Image.fromarray(bits), kind, **options))
        assert np.array_equal(shown, np.repeat(bits[..., None], 3, axis=2) * np.uint8(255)), kind


def test_grey_becomes_three_equal_channels():
    grey = picture(8, 8)[..., 0]
    shown = read(encode(grey, "PNG"))
    assert np.array_equal(shown, np.repeat(grey[..., None], 3, axis=2))


def ink_to_light(inks: tuple[int, int, int, int]) -> list[float]:
    return [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]


@pytest.mark.parametrize(
    "inks",
    [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (51, 102, 0, 128), (200, 30, 90, 20)],
)
def test_cmyk_ink_absorbs_light(inks):
    wanted = np.array(ink_to_light(inks))
    tiff = encode(Image.new("CMYK", (8, 8), inks), "TIFF")
    assert np.abs(read(tiff)[4, 4] - wanted).max() <= 1
    for make in (awkward.cmyk_jpeg, awkward.ycck_jpeg):
        shown = read(make(inks))
        assert np.abs(shown[4, 4] - wanted).max() <= 3, make.__name__


@pytest.mark.parametrize("make", [awkward.float_tiff, awkward.int32_tiff])
def test_pixels_without_a_fixed_range_are_refused_with_the_remedy(make):
    with pytest.raises(UnsupportedImageError, match=r"no fixed range.*convert to 8 or 16 bits"):
        read(make(np.arange(64).reshape(8, 8)))


def test_a_colour_profile_does_not_change_pixels():
    pixels = picture(8, 8)
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for content in (profile, b"not a profile at all"):
        assert np.array_equal(read(encode(pixels, "PNG", icc_profile=content)), pixels)


def test_bmp_gif_webp_and_tiff_keep_lossless_pixels():
    pixels = picture(8, 8)
    for kind, options in (("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        assert np.array_equal(read(encode(pixels, kind, **options)), pixels), kind
    few = np.array(Image.fromarray(pixels).quantize(16).convert("RGB"))
    assert np.array_equal(read(encode(Image.fromarray(few).quantize(16), "GIF")), few)


# ------------------------------------------------------------------------------------------- orientation

EVERY_KIND = pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("MPO", {"quality": 90}),
        ("AVIF", {"quality": 90, "speed": 10}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)


@pytest.mark.parametrize("orientation", range(1, 9))
@EVERY_KIND
def test_an_oriented_image_has_the_pixels_of_the_turned_png(kind, options, orientation):
    stored = picture(40, 24)
    data = with_orientation(stored, kind, orientation, **options)
    plain = awkward.decode(encode(stored, kind, **options))
    spec = Preprocess(height=20, width=28)
    wanted = read(encode(turned_upright(plain, orientation), "PNG"), spec=spec)
    assert np.array_equal(read(data, spec=spec), wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_turned_upright_once(orientation):
    pytest.importorskip("pillow_heif")
    stored = picture(64, 32)
    upright = turned_upright(stored, orientation)
    spec = Preprocess(height=upright.shape[0], width=upright.shape[1])
    assert gap(read(awkward.heic(stored, orientation=orientation), spec=spec), upright).mean() < 12


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_region_is_a_box_of_the_upright_image(orientation):
    stored = picture(40, 24)
    upright = turned_upright(stored, orientation)
    box = Box(3, 5, 19, 17)
    shown = read(
        with_orientation(stored, "PNG", orientation), spec=Preprocess(height=12, width=16), region=box
    )
    assert np.array_equal(shown, upright[5:17, 3:19])


def test_a_damaged_exif_block_leaves_the_image_upright():
    pixels = picture(40, 24)
    spec = Preprocess(height=24, width=40)
    wanted = read(encode(pixels, "JPEG"), spec=spec)
    assert np.array_equal(read(awkward.corrupt_exif_jpeg(pixels), spec=spec), wanted)
    plain = encode(pixels, "JPEG")
    for block in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0junk",
    ):
        assert np.array_equal(read(awkward.with_app1(plain, block), spec=spec), wanted), block


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_outside_of_the_standard_means_upright(value):
    pixels = picture(16, 8)
    assert np.array_equal(
        read(with_orientation(pixels, "PNG", value), spec=Preprocess(height=8, width=16)), pixels
    )


# ---------------------------------------------------------------------------------------------- geometry


def test_squash_stretches_the_whole_image():
    pixels = np.zeros((16, 64, 3), np.uint8)
    pixels[:, :32] = (250, 0, 0)
    pixels[:, 32:] = (0, 0, 250)
    shown = read(encode(pixels, "PNG"), spec=Preprocess(height=40, width=20, resize="squash"))
    assert shown.shape == (40, 20, 3)
    assert np.array_equal(shown[:, :8], np.full((40, 8, 3), (250, 0, 0)))
    assert np.array_equal(shown[:, 12:], np.full((40, 8, 3), (0, 0, 250)))


def test_letterbox_keeps_the_aspect_and_pads_with_the_background():
    pixels = np.full((20, 40, 3), (0, 200, 0), np.uint8)
    spec = Preprocess(height=64, width=32, resize="letterbox", background=(9, 8, 7))
    shown = read(encode(pixels, "PNG"), spec=spec)
    assert shown.shape == (64, 32, 3)
    inside = (shown == (0, 200, 0)).all(axis=2)
    assert np.array_equal(np.flatnonzero(inside.all(axis=1)), np.arange(24, 40))
    assert np.array_equal(shown[~inside], np.full(((64 - 16) * 32, 3), (9, 8, 7)))


def test_letterbox_of_a_tall_image_pads_left_and_right():
    pixels = np.full((60, 20, 3), (0, 200, 0), np.uint8)
    shown = read(encode(pixels, "PNG"), spec=Preprocess(height=30, width=50, resize="letterbox"))
    inside = (shown == (0, 200, 0)).all(axis=2)
    assert np.array_equal(np.flatnonzero(inside.all(axis=0)), np.arange(20, 30))
    assert (shown[~inside] == 255).all()


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "lanczos"])
def test_letterbox_never_mixes_the_background_into_the_image(kind):
    pixels = np.full((90, 33, 3), 0, np.uint8)
    spec = Preprocess(height=32, width=32, resize="letterbox", filter=kind)
    assert set(np.unique(read(encode(pixels, "PNG"), spec=spec))) == {0, 255}


def test_crop_keeps_the_centre():
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[6:94, 56:144] = 255  # the central 0.8 of the shorter side, and what the filter reaches around it
    spec = Preprocess(height=40, width=40, resize="crop", crop_fraction=0.8)
    assert (read(encode(pixels, "PNG"), spec=spec) == 255).all()
    shown = read(encode(pixels, "PNG"), spec=spec.model_copy(update={"crop_fraction": 1.0}))
    # 100 pixels become 40: a dark frame of 6 becomes one of 2.4 on each of the four sides
    assert (shown[4:-4, 4:-4] == 255).all()
    for side in (shown[:2], shown[-2:], shown[:, :2], shown[:, -2:]):
        assert side.max() < 64


def test_crop_to_a_wide_target_keeps_the_aspect_of_the_content():
    down, across = np.mgrid[0:120, 0:120]
    disc = ((down - 59.5) ** 2 + (across - 59.5) ** 2 < 25**2).astype(np.uint8) * 255
    spec = Preprocess(height=40, width=80, resize="crop", crop_fraction=1.0)
    shown = read(encode(disc, "PNG"), spec=spec)[..., 0] > 127
    # 120 pixels across become 80, so a disc of 50 pixels is 33 across and down
    assert abs(int(shown.any(axis=0).sum()) - 33) <= 1
    assert abs(int(shown.any(axis=1).sum()) - 33) <= 1


def test_downscaling_averages_instead_of_picking_pixels():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    shown = read(encode(stripes, "PNG"), spec=Preprocess(height=16, width=16))
    assert gap(shown, np.full_like(shown, 127))[:, 2:-2].max() <= 1


@pytest.mark.parametrize("policy", ["squash", "letterbox", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (8000, 3), (3, 8000)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_extreme_shapes_are_read_under_every_policy(kind, size, policy):
    data = encode(Image.new("RGB", size, (200, 10, 10)), kind, **({"quality": 95} if kind == "JPEG" else {}))
    shown = read(data, spec=Preprocess(height=48, width=32, resize=policy, background=(0, 0, 255)))
    assert shown.shape == (48, 32, 3)
    red = gap(shown, np.full_like(shown, (200, 10, 10))).max(axis=2) <= 4
    blue = (shown == (0, 0, 255)).all(axis=2)
    assert red.any()
    assert (red | blue).all()
    assert policy == "letterbox" or red.all()


# ------------------------------------------------------------------------------------------------ region


def test_a_region_is_what_cutting_it_out_first_would_give_up_to_its_border():
    pixels = picture(60, 40)
    for policy in ("squash", "letterbox", "crop"):
        spec = Preprocess(height=16, width=24, resize=policy)
        whole = read(encode(pixels[8:32, 10:50], "PNG"), spec=spec)
        shown = read(encode(pixels, "PNG"), spec=spec, region=Box(10, 8, 50, 32))
        assert gap(shown, whole)[4:-4, 4:-4].max() <= 1, policy
        assert gap(shown, whole).mean() < 2, policy


def test_a_region_over_the_edge_is_clipped_to_the_image():
    pixels = picture(20, 16)
    spec = Preprocess(height=16, width=10)
    assert np.array_equal(
        read(encode(pixels, "PNG"), spec=spec, region=Box(10, -50, 900, 50)), pixels[:, 10:]
    )


@pytest.mark.parametrize(
    "box", [Box(30, 0, 40, 8), Box(-9, 0, 0, 8), Box(4, 4, 4, 8), Box(8, 4, 2, 8), Box(0, 16, 9, 20)]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_region_outside_of_the_image_is_an_error_that_names_it(box, kind):
    with pytest.raises(BrokenImageError, match=r"region \(.*\) lies outside the image"):
        read(encode(picture(20, 16), kind), region=box)


def test_a_region_of_a_large_jpeg_is_close_to_the_full_decode():
    data = photo_jpeg(2003, 1501, exif=exif_turning(6))
    upright = turned_upright(awkward.decode(data), 6)
    spec = Preprocess(height=96, width=96)
    for box in (Box(101, 203, 1100, 1400), Box(700, 1200, 1501, 2003), Box(10.5, 20.5, 800.25, 1500.75)):
        wanted = read(encode(upright, "BMP"), spec=spec, region=box)
        assert gap(read(data, spec=spec, region=box), wanted).mean() < 1.2, box


def test_a_small_region_of_a_large_jpeg_is_decoded_at_full_detail():
    data = photo_jpeg(2003, 1501)
    spec = Preprocess(height=96, width=96)
    box = Box(640, 480, 760, 600)
    wanted = read(encode(awkward.decode(data), "BMP"), spec=spec, region=box)
    assert np.array_equal(read(data, spec=spec, region=box), wanted)


def test_a_region_larger_than_the_image_loses_no_detail():
    data = photo_jpeg(600, 400)
    spec = Preprocess(height=200, width=300)
    wanted = read(data, spec=spec)
    assert np.array_equal(read(data, spec=spec, region=Box(-4000, -4000, 9000, 9000)), wanted)


# ------------------------------------------------------------------------------------------------- draft


def exif_turning(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[awkward.ORIENTATION] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("policy", ["squash", "letterbox", "crop"])
@pytest.mark.parametrize("size", [(4000, 3000), (2501, 1667), (1667, 2501), (1031, 777)])
def test_a_large_jpeg_is_close_to_full_decode_and_resize(size, policy):
    data = photo_jpeg(*size)
    full = encode(awkward.decode(data), "BMP")
    for spec in (
        Preprocess(height=224, width=224, resize=policy),
        Preprocess(height=160, width=96, resize=policy),
    ):
        difference = gap(read(data, spec=spec), read(full, spec=spec))
        assert difference.mean() < 1.0, str(spec)
        assert np.percentile(difference, 99.9) < 12, str(spec)


@pytest.mark.parametrize("size", [(2501, 1667), (1000, 3000), (660, 660)])
@pytest.mark.parametrize("policy", ["squash", "crop"])
def test_scaled_decoding_keeps_the_finest_detail_that_fits_the_target(size, policy):
    """Stripes of 2.5 target pixels, down and across, keep their contrast."""
    width, height = size
    spec = Preprocess(height=224, width=224, resize=policy, crop_fraction=1.0)
    seen = (width, height) if policy == "squash" else (min(size), min(size))
    down, across = np.mgrid[0:height, 0:width] * 2 * np.pi * 224 / 2.5
    stripes = (127 + 60 * np.sin(across / seen[0]) + 60 * np.sin(down / seen[1])).astype(np.uint8)
    data = encode(stripes, "JPEG", quality=92)
    wanted = read(encode(awkward.decode(data), "BMP"), spec=spec)
    assert read(data, spec=spec).std() > 0.92 * wanted.std()


def test_a_large_jpeg_is_not_shifted_by_scaled_decoding():
    """Edges must stay where they are: compare with shifts of the reference by a third of a pixel."""
    data = photo_jpeg(2501, 1667)
    full = encode(awkward.decode(data), "BMP")
    spec = Preprocess(height=200, width=300)
    shown = read(data, spec=spec)
    still = gap(shown, read(full, spec=spec)).mean()
    step = 2501 / 300 / 3
    for box in (Box(step, 0, 2501, 1667), Box(0, step, 2501, 1667), Box(0, 0, 2501 - step, 1667 - step)):
        assert still < gap(shown, read(full, spec=spec, region=box)).mean(), box


def test_the_exact_view_does_not_depend_on_what_else_is_asked_for():
    data = photo_jpeg(2501, 1667)
    spec = Preprocess(height=128, width=128)
    alone = read(data, spec=spec)
    larger, exact = read_views(data, spec=spec, sizes=((160, 160), (128, 128)))
    exact_too, smaller, huge = read_views(data, spec=spec, sizes=((128, 128), (32, 64), (600, 600)))
    assert np.array_equal(alone, exact)
    assert np.array_equal(alone, exact_too)
    assert [view.shape for view in (larger, smaller, huge)] == [(160, 160, 3), (32, 64, 3), (600, 600, 3)]


def test_a_larger_view_shows_the_same_content():
    data = photo_jpeg(1031, 777)
    for policy in ("squash", "letterbox", "crop"):
        spec = Preprocess(height=64, width=64, resize=policy)
        exact, double = read_views(data, spec=spec, sizes=((64, 64), (128, 128)))
        halved = np.array(Image.fromarray(double).resize((64, 64), Image.Resampling.BICUBIC))
        assert gap(exact, halved).mean() < 4, policy


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_large_jpeg_turned_by_exif_is_the_plain_one_turned(orientation):
    size = (1001, 801)  # one column and row more than the decoder's blocks: the worst case for its rounding
    plain = read(photo_jpeg(*size), spec=Preprocess(height=60, width=80))
    shape = turned_upright(plain, orientation).shape
    data = photo_jpeg(*size, exif=exif_turning(orientation))
    shown = read(data, spec=Preprocess(height=shape[0], width=shape[1]))
    assert gap(shown, turned_upright(plain, orientation)).max() <= 1


def test_progressive_and_baseline_of_the_same_photo_agree():
    spec = Preprocess(height=96, width=128)
    assert np.array_equal(
        read(photo_jpeg(1031, 777), spec=spec), read(photo_jpeg(1031, 777, progressive=True), spec=spec)
    )


# ------------------------------------------------------------------------------------------ pure function


def test_the_same_bytes_give_the_same_pixels_in_many_threads():
    files = [make() for kind in awkward.SMALL for make in awkward.VARIANTS[kind]] + [photo_jpeg(1031, 777)]
    spec = Preprocess(height=64, width=48, resize="letterbox")
    wanted = [read(data, spec=spec) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for data, pixels in zip(files, pool.map(lambda data: read(data, spec=spec), files), strict=True):
                assert np.array_equal(pixels, wanted[files.index(data)])


def test_pixels_are_writable_contiguous_rgb_bytes():
    for make in awkward.SMALL.values():
        pixels = read(make(), spec=Preprocess(height=24, width=40))
        assert pixels.shape == (24, 40, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable


@pytest.mark.parametrize("kind", sorted(awkward.SMALL))
def test_every_promised_format_is_read(kind):
    data = awkward.SMALL[kind]()
    spec = same_size(data)
    if kind in ("GIF", "MPO"):
        wanted = awkward.decode(data)
    else:
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == kind
            wanted = np.array(image.convert("RGB"))
    assert np.array_equal(read(data, spec=spec), wanted)


def test_suffixes_are_lower_case_with_a_dot():
    assert {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".heic"} <= SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)


# -------------------------------------------------------------------------------------------------- spec

BASE = Preprocess()
CHANGED = {
    "height": 225,
    "width": 225,
    "resize": "letterbox",
    "crop_fraction": 0.9,
    "filter": "bilinear",
    "background": (255, 255, 254),
}


def test_the_digest_is_the_same_on_every_machine():
    assert BASE.digest == Preprocess().digest
    assert BASE.digest == Preprocess.model_validate_json(BASE.model_dump_json()).digest
    # Pinned: a change means that every cache and bundle made so far is read differently.
    assert BASE.digest == DIGEST_OF_DEFAULTS


@pytest.mark.parametrize("field", CHANGED)
def test_the_digest_changes_with_every_field(field):
    assert BASE.model_copy(update={field: CHANGED[field]}).digest != BASE.digest


def test_every_field_of_the_spec_is_covered_by_the_digest_test():
    assert set(Preprocess.model_fields) == {"version", *CHANGED}


def test_a_spec_prints_as_one_line():
    assert str(BASE) == "v1 224x224 squash bicubic on #ffffff"
    spec = Preprocess(height=96, width=128, resize="crop", filter="lanczos", background=(0, 16, 255))
    assert str(spec) == "v1 96x128 crop 0.875 lanczos on #0010ff"


@pytest.mark.parametrize(
    "field",
    [
        {"height": 7},
        {"width": 4097},
        {"resize": "stretch"},
        {"filter": "nearest"},
        {"crop_fraction": 0},
        {"crop_fraction": 1.01},
        {"background": (0, 0, 256)},
        {"background": (-1, 0, 0)},
        {"background": (0, 0)},
        {"version": 2},
        {"colour": "sepia"},
    ],
    ids=str,
)
def test_a_spec_that_cannot_be_followed_is_refused(field):
    with pytest.raises(ValidationError):
        Preprocess(**field)


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError):
        BASE.height = 8  # type: ignore[misc]


def test_a_limit_of_ones_own_is_kept():
    data = encode(Image.new("L", (100, 100)), "PNG")
    read_pixels(data, spec=EXACT, limits=Limits(max_pixels=10_000))
    with pytest.raises(ImageTooLargeError, match=r"100 x 100 pixels is over the limit of 9,999 pixels"):
        read_pixels(data, spec=EXACT, limits=Limits(max_pixels=9_999))


# --------------------------------------------------------------------------- what the header says; full size


@pytest.mark.parametrize("orientation", range(1, 9))
@EVERY_KIND
def test_facts_tell_the_upright_size(kind, options, orientation):
    data = with_orientation(picture(40, 24), kind, orientation, **options)
    width, height = (24, 40) if orientation >= 5 else (40, 24)
    assert facts(data) == Facts("JPEG" if kind == "MPO" else kind, "RGB", width, height)


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("add", [PngInfo.add_itxt, PngInfo.add_text], ids=["iTXt", "text"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_facts_turn_a_png_with_xmp_as_its_pixels_are_turned(orientation, add, packed, behind):
    stored, notes = picture(40, 24), PngInfo()
    xmp = f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
    add(notes, "XML:com.adobe.xmp", xmp, zip=packed)
    plain, chunk = encode(stored, "PNG"), awkward.png_chunk(*notes.chunks[0][:2])
    place = -12 if behind else 33  # before the end, or after the header
    data = plain[:place] + chunk + plain[place:]
    pixels = read_full(data)
    assert np.array_equal(pixels, turned_upright(stored, orientation))
    assert facts(data) == Facts("PNG", "RGB", pixels.shape[1], pixels.shape[0])


@pytest.mark.parametrize(
    ("data", "kind", "mode"),
    [
        (awkward.cmyk_jpeg((10, 100, 200, 50)), "JPEG", "CMYK"),
        (awkward.grey16_png(np.zeros((16, 16), np.uint16)), "PNG", "I;16"),
        (encode(Image.new("LA", (16, 16)), "PNG"), "PNG", "LA"),
        (encode(Image.new("1", (16, 16)), "BMP"), "BMP", "1"),
        (encode(Image.fromarray(picture(16, 16)).quantize(16), "GIF"), "GIF", "P"),
        (awkward.two_frame_mpo(picture(16, 16), picture(16, 16, seed=1)), "MPO", "RGB"),
        (awkward.float_tiff(np.zeros((16, 16))), "TIFF", "F"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_facts_name_format_and_mode_as_pillow_does(data, kind, mode):
    assert facts(data) == Facts(kind, mode, 16, 16)


def test_facts_need_no_pixels_and_so_tell_of_broken_images_too():
    whole = encode(picture(640, 480), "JPEG")
    assert facts(whole[:2000]) == facts(whole) == Facts("JPEG", "RGB", 640, 480)
    over_the_limit = encode(Image.new("1", (9000, 6000)), "PNG")
    assert facts(over_the_limit) == Facts("PNG", "1", 9000, 6000)


@pytest.mark.parametrize("read_it", [facts, read_full], ids=["facts", "read_full"])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", EmptyImageError),
        (b"Dear customer,", UnsupportedImageError),
        (encode(picture(16, 16), "PNG")[:12], BrokenImageError),
        (awkward.png_claiming(60000, 60000), ImageTooLargeError),
    ],
    ids=["empty", "text", "header cut off", "60000 x 60000"],
)
def test_facts_and_full_size_refuse_what_the_pixel_path_refuses(read_it, data, kind):
    with pytest.raises(kind) as caught:
        read_it(data)
    assert type(caught.value) is kind


@pytest.mark.parametrize("orientation", range(1, 9))
@EVERY_KIND
def test_full_size_is_the_plain_decode_upright(kind, options, orientation):
    stored = picture(40, 24)
    plain = awkward.decode(encode(stored, kind, **options))
    pixels = read_full(with_orientation(stored, kind, orientation, **options))
    assert np.array_equal(pixels, turned_upright(plain, orientation))


@pytest.mark.parametrize("kind", sorted(awkward.VARIANTS))
def test_full_size_has_the_size_that_the_facts_tell(kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    for make in awkward.VARIANTS[kind]:
        found, pixels = facts(make()), read_full(make())
        assert pixels.shape == (found.height, found.width, 3)
        assert pixels.dtype == np.uint8


def test_a_large_jpeg_is_decoded_at_full_detail():
    data = photo_jpeg(1600, 1200)
    assert np.array_equal(read_full(data), awkward.decode(data))


def test_full_size_goes_beyond_the_sizes_of_a_spec():
    assert read_full(encode(Image.new("L", (5000, 3), 7), "PNG")).shape == (3, 5000, 3)
    assert read_full(encode(Image.new("L", (1, 1), 7), "PNG")).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_region_at_full_size_is_cut_out_of_the_upright_image(orientation):
    data = with_orientation(picture(60, 40), "PNG", orientation)
    whole = read_full(data)
    assert np.array_equal(read_full(data, region=Box(5, 8, 25, 31)), whole[8:31, 5:25])
    # To whole pixels, and over the edge to the edge.
    assert np.array_equal(read_full(data, region=Box(4.6, 8.4, 25.3, 30.8)), whole[8:31, 5:25])
    assert np.array_equal(read_full(data, region=Box(-9, 30, 10, 999)), whole[30:, :10])
    # Never less than a pixel.
    assert np.array_equal(read_full(data, region=Box(7.1, 9.1, 7.2, 9.2)), whole[9:10, 7:8])
    right, bottom = whole.shape[1], whole.shape[0]
    corner = Box(right - 0.3, bottom - 0.3, right, bottom)
    assert np.array_equal(read_full(data, region=corner), whole[-1:, -1:])


def test_a_region_at_full_size_outside_of_the_image_is_an_error():
    with pytest.raises(BrokenImageError, match="lies outside the image"):
        read_full(encode(picture(20, 20), "PNG"), region=Box(30, 0, 40, 10))


def test_at_full_size_colour_is_that_of_the_pixel_path():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = (200, 100, 50)
    pixels[0, :2, 3] = [0, 255]
    assert read_full(encode(pixels, "PNG"))[0, :2].tolist() == [[255, 255, 255], [200, 100, 50]]
    for data in (awkward.cmyk_jpeg((10, 100, 200, 50)), awkward.grey16_png(np.full((16, 16), 30000))):
        assert np.array_equal(read_full(data), read(data, spec=same_size(data)))


def test_the_limit_of_pixels_holds_at_full_size():
    data = encode(Image.new("L", (100, 100)), "PNG")
    read_full(data, limits=Limits(max_pixels=10_000))
    with pytest.raises(ImageTooLargeError, match=r"100 x 100 pixels is over the limit of 9,999 pixels"):
        read_full(data, limits=Limits(max_pixels=9_999))


@pytest.mark.parametrize("kind", sorted(awkward.SMALL))
def test_damaged_files_have_facts_and_pixels_or_an_image_error(kind):
    for seed in range(60):
        data = awkward.mutate(awkward.SMALL[kind](), seed=seed)
        for read_it in (facts, read_full):
            with contextlib.suppress(ImageError):
                read_it(data)


DIGEST_OF_DEFAULTS = "9772ea8c427463976f9cacba2d07fc62fe23be255acf248ab92d4e3bc73b4306"
