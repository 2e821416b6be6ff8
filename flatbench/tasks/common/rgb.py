"""Pictures of every kind as they are looked at: upright, on white, in red, green and blue of 8 bits."""

from __future__ import annotations

import struct

from PIL import ExifTags, Image, ImageOps


def in_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB: turned as its EXIF data say, transparent places on white.

    Raises ValueError for pixels of more than 8 bits a channel: nothing says which of their values is white,
    and cut at 255 they would be one white picture.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"its pixels are of mode {image.mode}, of more than 8 bits, and nothing tells which value is "
            "white; save it with 8"
        )
    try:
        upright = ImageOps.exif_transpose(image)
    except (struct.error, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"its EXIF data are damaged: {error}") from error
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        ground = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB")
    return upright.convert("RGB")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of what `in_rgb` gives, without decoding the picture."""
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
    return (height, width) if turned else (width, height)
