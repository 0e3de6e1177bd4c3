"""Image files to `Frames`, as 8-bit RGB: what stands behind transparent pixels, and what becomes of 16 bits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from longrl.datamodules.media.opening import DEFAULT_MEDIA_LIMITS, MediaLimits, decoder_errors, picture_formats
from longrl.datamodules.media.video import content_digest
from longrl.types import FULL_SHARD, Frames, FrameShard, UnusableSample

if TYPE_CHECKING:
    from PIL.Image import Image

MOVING = ("GIF", "WEBP", "PNG", "AVIF")
"""Pillow's names of formats that may hold an animation. Further pictures of a JPEG are previews and depths."""
READ_AS_VIDEOS = ("GIF", "AVIF")
"""Those that may be named as videos: FFmpeg reads no animated WebP, and a list of one PNG is a video of one frame."""


def read_image(path: str | Path, shard: FrameShard = FULL_SHARD, limits: MediaLimits = DEFAULT_MEDIA_LIMITS) -> Frames:
    """An image file as one RGB frame [1, 3, H, W], turned upright as its EXIF orientation says.

    A rank whose shard it is not gets [0, 3, H, W]. See `rgb_pixels` for what is not 8-bit RGB.

    Raises:
        UnusableSample: no such file, it cannot be decoded, is too large, or its pixels have no meaning in 8 bits.
    """
    from PIL import Image, ImageOps, __version__

    digest = content_digest(path)
    # Given a path, Pillow maps plain TIFFs into memory, and turns them twice.
    with decoder_errors(path), open(path, "rb") as file, Image.open(file, formats=picture_formats()) as image:
        limits.check_size(path, *image.size)
        # Pictures are not counted: of a GIF that takes reading them all.
        if image.format in MOVING and getattr(image, "is_animated", False):
            is_video = image.format in READ_AS_VIDEOS
            remedy = "name it in `videos`" if is_video else "save its pictures, and name these in `videos` with `fps`"
            raise UnusableSample(path, f"it is an animation, not an image; {remedy}")
        pixels, rule = rgb_pixels(ImageOps.exif_transpose(image), path)
    # Files that need no rule keep the keys that they had before there was one.
    key = hashlib.sha256(f"image {digest} Pillow {__version__}{rule}".encode()).hexdigest()
    held = len(shard.temporal_patches(1))
    frame = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, H, W]
    return Frames("image", frame[:held], timestamps=(0.0,), key=key, indices=(0,))


def rgb_pixels(image: Image, path: str | Path) -> tuple[NDArray[np.uint8], str]:
    """[H, W, 3] pixels of an image, and the rule that made them of something else than 8 opaque bits; "" for none.

    - Transparent pixels are laid on white, as qwen_vl_utils and vLLM do, whatever the mode and format.
    - Of 16 bits the upper 8 count, as Pillow and OpenCV have it for colour images: 65535 is white.
    - CMYK, grey, palettes and 1 bit are converted by Pillow.

    Raises:
        UnusableSample: pixels are 32-bit integers or floats, of which no file says what is white.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.uint16)
        upper = (grey >> 8).astype(np.uint8)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            upper[grey == transparent] = 255
        return np.repeat(upper[..., None], 3, axis=2), " upper 8 of 16 bits"
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise UnusableSample(
            path, f"its pixels are {kind}, of which nothing says what is white; save it with 8 or 16 bits per channel"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, (255, 255, 255))
        background.paste(image, mask=image.getchannel("A"))
        return np.array(background), " on white"
    return np.array(image.convert("RGB")), ""
