"""Pictures for the vision tower: cut into square tiles (NVLM's way), or whole as a grid of patches (omni's).

Tiles follow NVIDIA's `dynamic_preprocess`: the grid of at most `max_tiles` tiles whose aspect ratio is closest to the
picture's; on a tie a larger one if the picture has more than half its area. The picture is resized to the grid and cut
row by row. A thumbnail of the whole follows if there is more than one tile. By this rule 1920 x 1080 is 4 x 2 tiles and a
thumbnail; the paper's own example (3 x 2) follows only from the area-weighted rule with 6 tiles.

Pillow resizes Pillow images, as in the reference. Tensors stay where they are and are resized by torch (the kernel that
torchvision calls), on a GPU too.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from .image_reading_vl import read_image

TILE_RULES = ("closest", "area_weighted")
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# What released preprocessor_config.json call a field.
SYNONYMS = {"norm_mean": "image_mean", "norm_std": "image_std", "max_num_tiles": "max_tiles"}


class NemotronHVLImagesKwargs(ImagesKwargs, total=False):
    """What a call may change: see `NemotronHVLImageProcessor`."""

    image_size: int
    max_tiles: int
    use_thumbnail: bool
    tile_rule: str
    dynamic_resolution: bool
    patch_size: int
    downsample_ratio: float
    min_num_patches: int
    max_num_patches: int
    max_model_len: int
    fetch_urls: bool


class NemotronHVLImageProcessor(BaseImageProcessor):
    """Pictures to `pixel_values`.

    Args:
        image_size: side of a tile, in pixels.
        max_tiles, use_thumbnail, tile_rule: at most so many tiles; whether the whole follows; "closest" or "area_weighted".
        dynamic_resolution: one grid of patches per picture, between `min_num_patches` and `max_num_patches` of them (and no more
            than fit `max_model_len` embeddings), in place of tiles.
        patch_size, downsample_ratio: of the tower, and of the pixel shuffle.
        image_mean, image_std: of the normalisation, on values from 0 to 1.
        fetch_urls: whether a picture may be an address on the network.
    """

    model_input_names = ["pixel_values", "image_grid_hw"]
    valid_kwargs = NemotronHVLImagesKwargs
    defaults: dict[str, Any] = {
        "image_size": 448, "max_tiles": 12, "use_thumbnail": True, "tile_rule": "closest", "dynamic_resolution": False,
        "patch_size": 14, "downsample_ratio": 0.5, "min_num_patches": 1024, "max_num_patches": 13312,
        "max_model_len": 16384, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "fetch_urls": False,
    }  # fmt: skip

    def __init__(self, **kwargs: Any) -> None:
        for name, field in SYNONYMS.items():
            if name in kwargs:
                kwargs.setdefault(field, kwargs.pop(name))
        if "max_num_patches" in kwargs or "min_num_patches" in kwargs:  # omni's file has no other sign of it
            kwargs.setdefault("dynamic_resolution", "max_tiles" not in kwargs)
        own = {name: kwargs.pop(name, default) for name, default in self.defaults.items()}
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)
        self._settings({})

    def to_dict(self) -> dict[str, Any]:
        """As the base's; whether to go to the network is for each process to say."""
        return {name: value for name, value in super().to_dict().items() if name != "fetch_urls"}

    def fetch_images(self, images: Any, fetch_urls: bool | None = None) -> Any:
        """The pictures read (image_reading_vl.py), in lists as they were given."""
        allowed = self.fetch_urls if fetch_urls is None else fetch_urls
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image, allowed) for image in images]
        return read_image(images, fetch_urls=allowed)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Pixels of all pictures, in order.

        Returns:
            tiles: `pixel_values` (tiles of all pictures, 3, image_size, image_size) and `num_tiles`, one number per picture.
            dynamic resolution: `pixel_values` (patches of all pictures, 3 * patch_size**2) and `image_grid_hw` (pictures, 2).

        Raises:
            ValueError: for what is no picture, naming its place in the list, and settings that do not fit.
        """
        settings = self._settings(kwargs)
        flat = list(_flatten(images))
        if not flat:
            raise ValueError("images=[]: allowed is at least one picture")
        pictures = [read_image(image, f"image {i}", settings["fetch_urls"]) for i, image in enumerate(flat)]
        if settings["dynamic_resolution"]:
            grids = [self._grid(*_size(picture), len(pictures), settings) for picture in pictures]
            parts = [_patches(picture, grid, settings) for picture, grid in zip(pictures, grids)]
            data = {"pixel_values": torch.cat(parts), "image_grid_hw": torch.tensor(grids)}
        else:
            parts = [_tiles(picture, settings) for picture in pictures]
            data = {"pixel_values": torch.cat(parts), "num_tiles": torch.tensor([len(part) for part in parts])}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Tiles of a picture of this size, the thumbnail included; patches, with dynamic resolution."""
        settings = self._settings(images_kwargs or {})
        if settings["dynamic_resolution"]:
            return math.prod(self._grid(height, width, 1, settings))
        columns, rows = _columns_and_rows(width, height, settings)
        return columns * rows + (settings["use_thumbnail"] and columns * rows > 1)

    def num_tokens(self, num_patches: int) -> int:
        """Embeddings of one tile, or of that many patches with dynamic resolution."""
        merge = round(1 / self.downsample_ratio)
        return (
            num_patches // merge**2 if self.dynamic_resolution else (self.image_size // self.patch_size // merge) ** 2
        )

    def _grid(self, height: int, width: int, num_images: int, settings: dict) -> tuple[int, int]:
        merge = round(1 / settings["downsample_ratio"])
        least, most = settings["min_num_patches"], settings["max_num_patches"] or math.inf
        room = max((settings["max_model_len"] - 4) * merge**2, least * num_images)
        return patch_grid(height, width, settings["patch_size"], merge, least, max(min(room, most), least))

    def _settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """This processor's fields under those of a call, checked."""
        given = {SYNONYMS.get(name, name): value for name, value in kwargs.items() if value is not None}
        settings = {name: given.get(name, getattr(self, name)) for name in self.defaults}
        if settings["tile_rule"] not in TILE_RULES:
            raise ValueError(f"tile_rule={settings['tile_rule']!r}: allowed are {', '.join(TILE_RULES)}")
        for name in ("image_size", "max_tiles", "patch_size", "max_model_len", "min_num_patches"):
            value = settings[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: allowed is a positive integer")
        return settings


class NemotronNanoVLV2ImageProcessor(NemotronHVLImageProcessor):
    """The same under the name that released files have."""


def closest_grid(width: int, height: int, max_tiles: int, image_size: int) -> tuple[int, int]:
    """(columns, rows) of the reference's rule: closest aspect ratio, a larger grid on a tie if the picture fills half of it."""
    ratio, best, distance = width / height, (1, 1), math.inf
    for columns, rows in _grids(max_tiles):
        off = abs(ratio - columns / rows)
        if off < distance:
            best, distance = (columns, rows), off
        elif off == distance and width * height > 0.5 * image_size**2 * columns * rows:
            best = (columns, rows)
    return best


def area_weighted_grid(width: int, height: int, max_tiles: int, image_size: int) -> tuple[int, int]:
    """(columns, rows) that keep most of area and aspect ratio together (Llama-Nemotron-VL's rule)."""
    ratio = width / height

    def kept(grid: tuple[int, int]) -> float:
        target = grid[0] / grid[1]
        area = min(grid[0] * grid[1] * image_size**2 / (width * height), 0.6)
        return area * min(target / ratio, ratio / target)

    return max(_grids(max_tiles), key=kept)


def _grids(max_tiles: int) -> list[tuple[int, int]]:
    """All (columns, rows) of at most `max_tiles`, by area, then as sets of Python give them: the reference's order."""
    grids = {
        (i, j) for n in range(1, max_tiles + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= max_tiles
    }
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def patch_grid(height: int, width: int, patch: int, merge: int, least: int, most: float) -> tuple[int, int]:
    """Rows and columns of patches: the picture's own, scaled into `least` to `most` patches, sides multiples of `merge`."""
    rows, columns = round(height / patch + 0.5), round(width / patch + 0.5)
    factor = min(math.sqrt(most / (rows * columns)), 1.0)
    rows, columns = math.floor(factor * rows), math.floor(factor * columns)
    if rows * columns < least < most:
        factor = math.sqrt(least / (max(rows, 1) * max(columns, 1)))
        rows, columns = math.ceil(factor * max(rows, 1)), math.ceil(factor * max(columns, 1))
    # a picture that is nearly a line: what would be less than `merge` patches across leaves fewer along
    rows, columns = (max(1, math.floor(min(side, most / merge))) for side in (rows, columns))
    rows = _multiple(rows, merge, columns, most)
    columns = max(1, math.floor(min(columns, most / rows)))
    return rows, _multiple(max(columns, 1), merge, rows, most)


def _multiple(side: int, merge: int, other: int, most: float) -> int:
    """`side` up to the next multiple of `merge` if that many patches are allowed, else down to the last."""
    up = -(-side // merge) * merge
    return up if up * other <= most or up == side else max(merge, up - merge)


def _columns_and_rows(width: int, height: int, settings: dict) -> tuple[int, int]:
    rule = closest_grid if settings["tile_rule"] == "closest" else area_weighted_grid
    return rule(width, height, settings["max_tiles"], settings["image_size"])


def _tiles(picture: Any, settings: dict) -> Tensor:
    """(tiles, 3, side, side), normalised: row by row, the thumbnail last."""
    height, width = _size(picture)
    columns, rows = _columns_and_rows(width, height, settings)
    side = settings["image_size"]
    whole = _resize(picture, rows * side, columns * side)
    tiles = whole.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if settings["use_thumbnail"] and len(tiles) > 1:
        tiles = torch.cat([tiles, _resize(picture, side, side)[None]])
    return _normalise(tiles, settings)


def _patches(picture: Any, grid: tuple[int, int], settings: dict) -> Tensor:
    """(rows * columns, 3 * patch**2), normalised; resized as floats, which may overshoot 0 to 255."""
    patch, (rows, columns) = settings["patch_size"], grid
    pixels = _tensor(picture).float()
    if pixels.shape[1:] != (rows * patch, columns * patch):
        pixels = _interpolate(pixels, rows * patch, columns * patch)
    pixels = _normalise(pixels, settings).reshape(3, rows, patch, columns, patch)
    return pixels.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)


def _resize(picture: Any, height: int, width: int) -> Tensor:
    """uint8 (3, height, width), bicubic: by Pillow, or by torch if the picture is a tensor."""
    if isinstance(picture, Tensor):
        return _interpolate(picture.float(), height, width).round().clamp(0, 255).to(torch.uint8)
    return _tensor(picture.resize((width, height), resample=3))  # Pillow's number of bicubic


def _interpolate(pixels: Tensor, height: int, width: int) -> Tensor:
    return torch.nn.functional.interpolate(
        pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False
    )[0]


def _tensor(picture: Any) -> Tensor:
    """uint8 (3, h, w) of a Pillow image or a tensor."""
    return picture if isinstance(picture, Tensor) else torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _normalise(pixels: Tensor, settings: dict) -> Tensor:
    mean, std = (
        torch.tensor(settings[name], device=pixels.device).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    return (pixels.float() / 255 - mean) / std


def _size(picture: Any) -> tuple[int, int]:
    """Height and width."""
    return tuple(picture.shape[1:]) if isinstance(picture, Tensor) else (picture.height, picture.width)


def _flatten(images: Any) -> Iterable[Any]:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flatten(image)
    else:
        yield images


__all__ = ["NemotronHVLImageProcessor", "NemotronNanoVLV2ImageProcessor"]
