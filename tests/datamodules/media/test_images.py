import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from longrl.datamodules.media.images import read_image
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import read_video
from longrl.types import UnusableSample


def test_an_image_is_one_rgb_frame(tmp_path):
    image = Image.new("RGB", (5, 3), (200, 100, 50))
    image.save(tmp_path / "i.png")
    frames = read_image(tmp_path / "i.png")
    assert (frames.kind, frames.timestamps, frames.duration_s) == ("image", (0.0,), 0.0)
    assert tuple(frames.pixels.shape) == (1, 3, 3, 5)
    assert frames.pixels[0, :, 1, 2].tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("i.tif" if mode == "CMYK" else "i.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    assert read_image(path).pixels.unique().tolist() == [255]


def test_an_image_is_turned_upright(tmp_path):
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    image.save(tmp_path / "i.png", exif=exif)
    pixels = read_image(tmp_path / "i.png").pixels
    assert tuple(pixels.shape) == (1, 3, 6, 4)
    assert pixels[0, 0].nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "P", "RGB"])
def test_a_tiff_is_turned_once(tmp_path, mode):
    """Pillow turns those that it maps into memory twice."""
    levels = np.array([[65535, 0, 0], [0, 0, 0]], dtype=np.uint16)
    image = Image.fromarray(levels) if mode == "I;16" else Image.fromarray((levels >> 8).astype(np.uint8)).convert(mode)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "i.tif", exif=exif)
    assert read_image(tmp_path / "i.tif").pixels[0, 0].tolist() == [[0, 255], [0, 0], [0, 0]]


def test_images_have_keys_by_content(tmp_path):
    for name, level in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        Image.new("L", (4, 4), level).save(tmp_path / name)
    a, b, c = (read_image(tmp_path / name).key for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


def test_broken_images_are_refused(tmp_path):
    path = tmp_path / "i.png"
    with pytest.raises(UnusableSample, match="does not exist"):
        read_image(path)
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnusableSample, match="cannot be decoded"):
        read_image(path)
    path.write_text("no image")
    with pytest.raises(UnusableSample, match="cannot be decoded"):
        read_image(path)


# ---- transparent pixels ----


def drawing(mode="RGBA"):
    """A black stroke on nothing."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    for x in range(8):
        image.putpixel((x, 1), (0, 0, 0, 255))
    image.putpixel((3, 2), (200, 0, 0, 128))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("name", "mode"), [("i.png", "RGBA"), ("i.png", "LA"), ("i.webp", "RGBA"), ("i.tif", "RGBA"), ("i.gif", "RGBA")]
)
def test_a_drawing_on_nothing_is_shown_on_white(tmp_path, name, mode):
    options = {"lossless": True} if name.endswith("webp") else {}
    drawing(mode).save(tmp_path / name, **options)
    pixels = read_image(tmp_path / name).pixels[0]
    assert (pixels[:, 0] == 255).all()
    assert (pixels[:, 1] == 0).all()


def test_half_transparent_pixels_are_mixed_as_qwen_vl_utils_does(tmp_path):
    drawing().save(tmp_path / "i.png")
    assert read_image(tmp_path / "i.png").pixels[0, :, 2, 3].tolist() == [227, 127, 127]  # of its own `to_rgb`


def test_one_transparent_colour_of_a_palette_or_of_opaque_pixels_is_white(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 1), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "rgb.png", transparency=(9, 9, 9))
    Image.new("L", (4, 4), 7).save(tmp_path / "l.png", transparency=7)
    pixels = read_image(tmp_path / "p.png").pixels[0]
    assert pixels[:, 0, 0].tolist() == [255] * 3
    assert pixels[:, 1, 1].tolist() == [200, 100, 50]
    for name in ("rgb.png", "l.png"):
        assert read_image(tmp_path / name).pixels.unique().tolist() == [255]


# ---- depths ----


def ramp():
    return (np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369).astype(np.uint16)  # 0 to 65535


@pytest.mark.parametrize("name", ["i.png", "i.tif"])
def test_of_16_bits_the_upper_8_count(tmp_path, name):
    Image.fromarray(ramp()).save(tmp_path / name)
    pixels = read_image(tmp_path / name).pixels[0]
    assert pixels[0].flatten().tolist() == [17 * i for i in range(16)]
    assert torch.equal(pixels[0], pixels[2])


def test_a_transparent_grey_of_16_bits_is_white(tmp_path):
    image = Image.fromarray(ramp())
    image.save(tmp_path / "i.png", transparency=0)
    assert read_image(tmp_path / "i.png").pixels[0, :, 0, :2].tolist() == [[255, 17]] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.linspace(0, 1, 16).reshape(4, 4).astype(dtype)).save(tmp_path / "i.tif")
    with pytest.raises(UnusableSample, match="nothing says what is white; save it with 8 or 16 bits per channel"):
        read_image(tmp_path / "i.tif")


# ---- what is no image ----


@pytest.mark.parametrize("name", ["i.gif", "i.avif", "i.webp", "i.png"])
def test_an_animation_is_no_image(tmp_path, name):
    first, *others = (Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 100, 200))
    first.save(tmp_path / name, save_all=True, append_images=others, duration=100)
    is_video = name in ("i.gif", "i.avif")
    remedy = "name it in `videos`" if is_video else "save its pictures, and name these in `videos` with `fps`"
    with pytest.raises(UnusableSample, match=f"an animation, not an image; {remedy}"):
        read_image(tmp_path / name)
    if is_video:
        assert len(read_video(tmp_path / name, VideoSampling()).pixels) == 3
    first.save(tmp_path / name)
    assert len(read_image(tmp_path / name).pixels) == 1


def test_a_phone_picture_with_a_preview_behind_it_is_an_image(tmp_path):
    first, preview = Image.new("RGB", (8, 8), (90, 90, 90)), Image.new("RGB", (4, 4))
    first.save(tmp_path / "i.jpg", "MPO", save_all=True, append_images=[preview])
    assert tuple(read_image(tmp_path / "i.jpg").pixels.shape) == (1, 3, 8, 8)


# ---- keys and sizes ----


def test_pixels_that_are_read_otherwise_now_have_other_keys(tmp_path):
    """A feature cache of before holds what was read then."""
    import hashlib

    from PIL import __version__

    def key_of_before(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return hashlib.sha256(f"image {digest} Pillow {__version__}".encode()).hexdigest()

    drawing().save(tmp_path / "on_white.png")
    Image.fromarray(ramp()).save(tmp_path / "deep.png")
    drawing("RGB").save(tmp_path / "plain.png")
    changed = {name: read_image(path).key != key_of_before(path) for name, path in paths(tmp_path).items()}
    assert changed == {"on_white.png": True, "deep.png": True, "plain.png": False}


def test_pictures_of_equal_pixel_bytes_and_other_shapes_have_other_keys(tmp_path):
    for width, height in ((8, 2), (4, 4), (2, 8)):
        Image.new("RGB", (width, height)).save(tmp_path / f"{width}.png")
    assert len({read_image(path).key for path in tmp_path.iterdir()}) == 3


def paths(folder):
    return {path.name: path for path in sorted(folder.iterdir(), reverse=True)}


def test_a_picture_too_large_to_be_meant_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    with warnings.catch_warnings(), pytest.raises(UnusableSample, match="DecompressionBomb"):
        read_image(tmp_path / "i.png")
