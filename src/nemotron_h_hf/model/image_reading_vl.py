"""One picture, in any form, as RGB: a Pillow image, or a uint8 tensor (3, height, width) if it came as one.

Transparency becomes white, 16-bit greys become 8-bit ones, EXIF orientation is applied, and of an animation the first frame
is taken (with a warning). Nothing is fetched from the network unless `fetch_urls` asks for it.
"""

import base64
import io
import os
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

try:
    from PIL import Image, ImageOps
except ImportError:  # text models need no Pillow
    Image = ImageOps = None

logger = logging.get_logger(__name__)

FORMS = "a Pillow image, an array or tensor, bytes, a path, base64 or {'bytes': ..., 'path': ...}"


def read_image(source: Any, name: str = "image", fetch_urls: bool = False) -> "Image.Image | Tensor":
    """The picture in `source` as RGB.

    Args:
        source: a Pillow image, an array or tensor ((h, w), (h, w, c) or (c, h, w), c of 1, 3 or 4; bytes, 16-bit or floats from
            0 to 1), bytes of a file, a path, base64, or the `{"bytes", "path"}` of a hub `Image` feature. Where a shape allows
            both orders, three or four channels go before one, and then arrays have them last and tensors first.
        name: what an error calls it.

    Raises:
        ValueError: if it is no picture, empty, cut short, too large to be one, or on the network without `fetch_urls`.
    """
    if Image is None:
        raise ImportError("pictures need Pillow: pip install 'nemotron-h-hf[vision]'")
    if isinstance(source, Tensor):
        return _rgb_tensor(source, name)
    if isinstance(source, np.ndarray):
        return _rgb_tensor(_native(source, name), name, channels_last=True)
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return _guarded(name, lambda: _rgb_image(source, name))
    return _guarded(name, lambda: _rgb_image(Image.open(_file(source, name, fetch_urls)), name))


def _file(source: Any, name: str, fetch_urls: bool) -> "io.BytesIO | str":
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ValueError(f"{name} is empty: 0 bytes")
        return io.BytesIO(source)
    if isinstance(source, Path):
        source = str(source)
    if not isinstance(source, str):
        raise ValueError(f"{name} is of type {type(source).__name__}: allowed is {FORMS}")
    if source.startswith(("http://", "https://")):
        if not fetch_urls:
            raise ValueError(f"{name}={source!r} is on the network: allowed with fetch_urls=True")
        with urllib.request.urlopen(source, timeout=60) as answer:
            return io.BytesIO(answer.read())
    if source.startswith("data:image/"):
        try:
            return io.BytesIO(base64.b64decode(source.split(",", 1)[-1]))
        except ValueError as error:
            raise ValueError(f"{name}={source[:80]!r} is no base64: {error}") from None
    if os.path.isfile(source):
        if not os.path.getsize(source):
            raise ValueError(f"{name}={source!r} is empty: 0 bytes")
        return source
    try:
        return io.BytesIO(base64.b64decode(source, validate=True))
    except ValueError:
        raise ValueError(f"{name}={source[:200]!r} is no file that is there: allowed is {FORMS}") from None


def _guarded(name: str, read: Callable) -> "Image.Image":
    """Pillow's error about a picture that it cannot read, as a ValueError that names it."""
    try:
        return read()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error}: allowed are {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, EOFError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} is no picture, or one that is broken or cut short: {error}") from None


def _rgb_image(image: "Image.Image", name: str) -> "Image.Image":
    if min(image.size) == 0:
        raise ValueError(f"{name} is empty: {image.width} x {image.height} pixels")
    if getattr(image, "n_frames", 1) > 1:
        logger.warning(f"{name} has {image.n_frames} frames: the first one is taken")
        image.seek(0)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _grey(np.asarray(image), name)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray, name: str) -> "Image.Image":
    """Greys of 16 or 32 bits, or floats from 0 to 1, as bytes: Pillow's own conversion cuts them off at 255."""
    most = values.max()
    if not np.isfinite(most) or values.min() < 0 or most > 65535:
        raise ValueError(f"{name} has greys from {values.min()} to {most}: allowed are 0 to 65535, or 0 to 1")
    floats = np.issubdtype(values.dtype, np.floating)
    is_16_bit = values.dtype.kind == "u" and values.dtype.itemsize == 2  # in any byte order
    scale = 255.0 if floats and most <= 1 else 1.0 if most <= 255 and not is_16_bit else 1 / 257
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))


def _native(array: np.ndarray, name: str) -> Tensor:
    """As a tensor, in this machine's order of bytes."""
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except TypeError:
        raise ValueError(f"{name} is an array of {array.dtype}: allowed are numbers") from None


def _rgb_tensor(values: Tensor, name: str, channels_last: bool = False) -> Tensor:
    """uint8 (3, h, w), on its device; `channels_last` decides where the shape leaves it open."""
    shape = tuple(values.shape)
    if values.dim() == 2:
        values = values[None]
    elif values.dim() == 3 and _is_last(shape[0], shape[2], channels_last):
        values = values.permute(2, 0, 1)
    if values.dim() != 3 or values.shape[0] not in (1, 3, 4):
        raise ValueError(f"{name} has shape {shape}: allowed is (h, w), (h, w, c) or (c, h, w) with c of 1, 3 or 4")
    if not values.numel():
        raise ValueError(f"{name} is empty: shape {shape}")
    values = _bytes(values, name)
    if values.shape[0] == 4:
        alpha = values[3:].float() / 255
        values = (values[:3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return values.expand(3, -1, -1) if values.shape[0] == 1 else values


def _is_last(first: int, last: int, usual: bool) -> bool:
    """Whether the last axis of a picture's array holds the channels, and not the first."""
    if first not in (1, 3, 4) or last not in (1, 3, 4):
        return last in (1, 3, 4)
    return usual if (first == 1) == (last == 1) else first == 1


def _bytes(values: Tensor, name: str) -> Tensor:
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    is_16_bit = values.dtype == torch.uint16
    wide = values.double()
    low, high = float(wide.min()), float(wide.max())
    most = 1 if values.is_floating_point() else 65535
    if not 0 <= low <= high <= (255 if values.is_floating_point() and high > 1 else most):
        raise ValueError(f"{name} has values from {low:g} to {high:g}: allowed are 0 to 1, 0 to 255, or 16 bits")
    scale = 255.0 if values.is_floating_point() and high <= 1 else 1.0 if high <= 255 and not is_16_bit else 1 / 257
    return (wide * scale).round().to(torch.uint8)
