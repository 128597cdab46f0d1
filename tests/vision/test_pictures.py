"""Pictures to tiles and patches: the reference's rules by hand, pixels in float64, every kind of picture, bad ones."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image, features

from nemotron_h_hf import NemotronHVLImageProcessor
from nemotron_h_hf.model.image_processing_nemotron_h_vl import CLIP_MEAN, CLIP_STD, patch_grid
from nemotron_h_hf.model.image_reading_vl import read_image

# width, height -> columns, rows of the closest rule with 12 tiles of 448, with 6; of the area-weighted rule with 12, with 6
SIZES = {
    (448, 448): ((1, 1), (1, 1), (1, 1), (1, 1)),
    (1920, 1080): ((4, 2), (2, 1), (4, 2), (3, 2)),  # 9 tiles; the paper says 3 x 2 and 7 tiles
    (1080, 1920): ((2, 4), (1, 2), (2, 4), (2, 3)),
    (640, 480): ((4, 3), (3, 2), (4, 3), (3, 2)),
    (1344, 896): ((3, 2), (3, 2), (3, 2), (3, 2)),
    (448, 447): ((1, 1), (1, 1), (1, 1), (1, 1)),
    (1000, 1000): ((3, 3), (2, 2), (2, 2), (2, 2)),
    (100, 5000): ((1, 12), (1, 6), (1, 12), (1, 6)),
    (5000, 100): ((12, 1), (6, 1), (12, 1), (6, 1)),
    (1, 1): ((1, 1), (1, 1), (1, 1), (1, 1)),
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def reference_grid(width: int, height: int, most: int, side: int = 448) -> tuple[int, int]:
    """NVIDIA's `dynamic_preprocess`, in its own steps."""
    grids = sorted(
        {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= most},
        key=lambda grid: grid[0] * grid[1],
    )
    best_diff, best = float("inf"), (1, 1)
    for grid in grids:
        diff = abs(width / height - grid[0] / grid[1])
        if diff < best_diff:
            best_diff, best = diff, grid
        elif diff == best_diff and width * height > 0.5 * side * side * grid[0] * grid[1]:
            best = grid
    return best


def reference_weighted_grid(width: int, height: int, most: int, side: int = 448) -> tuple[int, int]:
    """The area-weighted rule, in its own steps."""
    grids = sorted(
        {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most}, key=lambda g: g[0] * g[1]
    )
    best_factor, best = -1.0, (1, 1)
    for columns, rows in grids:
        there, wanted = columns / rows, width / height
        factor = min(columns * rows * side * side / (width * height), 0.6) * min(there / wanted, wanted / there)
        if factor > best_factor:
            best_factor, best = factor, (columns, rows)
    return best


def grid_of(width: int, height: int, **fields) -> tuple[int, int]:
    """Found in the pixels: each cell of the picture has its own colour."""
    processor = NemotronHVLImageProcessor(**{"image_size": 448, **fields})
    whole = np.zeros((height, width, 3), dtype=np.uint8)
    whole[..., 0] = np.linspace(0, 255, width).round().astype(np.uint8)[None]
    whole[..., 1] = np.linspace(0, 255, height).round().astype(np.uint8)[:, None]
    tiles = processor(Image.fromarray(whole), image_mean=[0, 0, 0], image_std=[1, 1, 1]).pixel_values
    tiles = tiles[:-1] if len(tiles) > 1 else tiles
    left = [round(float(tile[0].mean()), 2) for tile in tiles]
    columns = len(set(left))
    return columns, len(tiles) // columns


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grids_of_the_table(size):
    closest_12, closest_6, weighted_12, weighted_6 = SIZES[size]
    assert reference_grid(*size, 12) == closest_12 and reference_grid(*size, 6) == closest_6
    assert reference_weighted_grid(*size, 12) == weighted_12 and reference_weighted_grid(*size, 6) == weighted_6
    weighted = {"tile_rule": "area_weighted"}
    for wanted, fields in ((closest_12, {}), (closest_6, {"max_tiles": 6}), (weighted_12, weighted),
                           (weighted_6, {**weighted, "max_tiles": 6})):  # fmt: skip
        processor = NemotronHVLImageProcessor(**fields)
        count = wanted[0] * wanted[1]
        assert processor.get_number_of_image_patches(size[1], size[0]) == count + (count > 1), fields
        if min(size) > 100:
            assert grid_of(*size, **fields) == wanted, fields


def test_grids_of_random_sizes_are_the_references():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 4000, (400, 2)).tolist():
        for most in (6, 12):
            columns, rows = reference_grid(width, height, most)
            count = NemotronHVLImageProcessor(max_tiles=most).get_number_of_image_patches(height, width)
            assert count == columns * rows + (columns * rows > 1), (width, height, most)


def test_pixels_of_tiles_in_float64():
    """Resized by Pillow, cut row by row, the thumbnail last; normalised in float64."""
    image = picture(300, 200)
    processor = NemotronHVLImageProcessor(image_size=56)
    found = processor(image, return_tensors="pt")
    columns, rows = reference_grid(300, 200, 12, 56)
    whole = image.resize((56 * columns, 56 * rows), Image.Resampling.BICUBIC)
    crops = [whole.crop((c * 56, r * 56, (c + 1) * 56, (r + 1) * 56)) for r in range(rows) for c in range(columns)]
    expected = np.stack([np.asarray(crop, dtype=np.float64) for crop in [*crops, image.resize((56, 56))]]) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert found.num_tiles.tolist() == [columns * rows + 1]
    torch.testing.assert_close(
        found.pixel_values.double(), torch.from_numpy(expected.transpose(0, 3, 1, 2)), atol=1e-5, rtol=0
    )


def test_a_tensor_is_resized_by_torch_and_close_to_pillow():
    y, x = np.mgrid[0:200, 0:300]
    smooth = np.stack([x * 255 / 299, y * 255 / 199, 127 + 100 * np.sin(x / 20)], -1).astype(np.uint8)
    processor = NemotronHVLImageProcessor(image_size=56)
    pillow = processor(Image.fromarray(smooth)).pixel_values
    tensor = processor(torch.from_numpy(smooth).permute(2, 0, 1)).pixel_values
    array = processor(smooth).pixel_values
    assert torch.equal(tensor, array) and (tensor - pillow).abs().max() < 2 / 255 / 0.22


def test_pictures_of_a_batch_and_the_thumbnail_left_out():
    processor = NemotronHVLImageProcessor(image_size=56, use_thumbnail=False)
    found = processor([picture(56, 56), [picture(112, 56), picture(56, 168)]])
    assert found.num_tiles.tolist() == [1, 2, 3] and found.pixel_values.shape == (6, 3, 56, 56)


def reference_patch_grid(height, width, most, least=1024, patch=16):
    """Omni's, as transformers' own image processor has it; skipped where that needs torchvision."""
    module = pytest.importorskip("transformers.models.nemotron_h_omni.image_processing_nemotron_h_omni")
    return module.get_patch_grid_size(height, width, patch, 2, least, most)


def test_patch_grids_are_those_of_transformers_omni():
    rng = np.random.default_rng(1)
    for height, width in [(1, 1), (1, 4000), (5000, 3), *rng.integers(1, 3000, (500, 2)).tolist()]:
        for most in (13312, 2048, 1024):
            found = patch_grid(height, width, 16, 2, 1024, most)
            assert found == reference_patch_grid(height, width, most), (height, width, most)


def test_patches_of_dynamic_resolution():
    processor = NemotronHVLImageProcessor(
        patch_size=16, min_num_patches=16, max_num_patches=64, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    image = picture(96, 64)
    found = processor([image, picture(64, 64)])
    assert found.image_grid_hw.tolist() == [[4, 6], [4, 4]] and found.pixel_values.shape == (40, 768)
    pixels = (np.asarray(image, dtype=np.float64) / 255 - CLIP_MEAN) / CLIP_STD
    patch = pixels[16:32, 32:48].transpose(2, 0, 1).reshape(-1)  # second row, third column
    torch.testing.assert_close(found.pixel_values[8].double(), torch.from_numpy(patch), atol=1e-5, rtol=0)


def png(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_every_form_of_a_picture(tmp_path):
    image = picture(20, 10)
    (tmp_path / "x.png").write_bytes(png(image))
    array = np.asarray(image)
    code = base64.b64encode(png(image)).decode()
    forms = [image, png(image), str(tmp_path / "x.png"), tmp_path / "x.png", {"bytes": png(image), "path": None}, code,
             {"bytes": None, "path": str(tmp_path / "x.png")}, f"data:image/png;base64,{code}"]  # fmt: skip
    for form in forms:
        assert np.array_equal(np.asarray(read_image(form)), array), type(form)
    tensors = [
        array,
        array.transpose(2, 0, 1),
        array / 255,
        array.astype(np.uint16) * 257,
        torch.from_numpy(array.copy()),
    ]
    for form in tensors:
        assert np.array_equal(read_image(form).permute(1, 2, 0).numpy(), array), (type(form), form.shape)


def test_modes_of_pillow():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(read_image(Image.fromarray(grey)))[..., 1], grey)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(read_image(png(wide)))[..., 2], grey)
    assert np.array_equal(np.asarray(read_image(Image.fromarray(grey.astype(np.float32) / 255)))[..., 0], grey)
    cmyk = read_image(png(picture(8, 8).convert("CMYK"), "tiff"))
    assert cmyk.mode == "RGB"
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(read_image(png(clear))).min() == 255  # white shows through
    half = np.asarray(read_image(Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert abs(int(half[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    assert read_image(png(palette, transparency=0)).getpixel((0, 0)) == (200, 100, 50)
    assert read_image(torch.zeros(4, 5, 5, dtype=torch.uint8)).min() == 255


def test_exif_says_which_side_is_up():
    image = picture(20, 10)
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    assert read_image(png(image, "jpeg", exif=exif)).size == (10, 20)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    assert read_image(file.getvalue()).getpixel((0, 0))[0] == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"", "image 0 is empty: 0 bytes"),
        (b"no picture at all", "image 0 is no picture"),
        (png(picture(64, 64))[:900], "image 0 is no picture, or one that is broken or cut short"),
        (png(picture(64, 64), "jpeg")[:700], "cut short"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "image 0 is empty"),
        (np.zeros((9, 8, 5), dtype=np.uint8), r"shape \(9, 8, 5\): allowed is"),
        (np.full((4, 4, 3), np.nan), "values from nan"),
        (np.full((4, 4, 3), -1.0), "values from -1"),
        (7, "type int: allowed is a Pillow image"),
        ("missing.png", "'missing.png' is no file that is there"),
        ("https://example.com/x.png", "on the network: allowed with fetch_urls=True"),
        ({"bytes": None, "path": None}, "type NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_pictures(given, message):
    with pytest.raises(ValueError, match=message):
        NemotronHVLImageProcessor()(given)


def test_the_second_of_two_is_named():
    with pytest.raises(ValueError, match="image 1 is no picture"):
        NemotronHVLImageProcessor()([picture(8, 8), b"broken"])


def test_a_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"too large: .*allowed are 2,000 pixels"):
        read_image(png(Image.new("L", (100, 100))))


def test_empty_files_and_no_pictures(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty: 0 bytes"):
        read_image(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"images=\[\]: allowed is at least one picture"):
        NemotronHVLImageProcessor()([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile_rule": "best"}, "tile_rule='best': allowed are closest, area_weighted"),
        ({"max_tiles": 0}, "max_tiles=0: allowed is a positive integer"),
        ({"image_size": 4.5}, "image_size=4.5: allowed is a positive integer"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        NemotronHVLImageProcessor(**fields)
    with pytest.raises(ValueError, match=message):
        NemotronHVLImageProcessor()(picture(8, 8), **fields)


def test_saved_and_loaded(tmp_path):
    first = NemotronHVLImageProcessor(image_size=56, max_tiles=6, tile_rule="area_weighted", fetch_urls=True)
    first.save_pretrained(tmp_path)
    again = NemotronHVLImageProcessor.from_pretrained(tmp_path)
    assert (again.image_size, again.max_tiles, again.tile_rule, again.fetch_urls) == (56, 6, "area_weighted", False)
    released = NemotronHVLImageProcessor(norm_mean=[0.1] * 3, norm_std=[0.2] * 3, max_num_tiles=4)
    assert (released.image_mean, released.image_std, released.max_tiles) == ([0.1] * 3, [0.2] * 3, 4)
    assert NemotronHVLImageProcessor(min_num_patches=64, max_num_patches=128).dynamic_resolution
    assert features.version("pil")


@pytest.mark.parametrize("width, height", [(2000, 1), (2000, 3), (9, 4), (1, 9), (3, 7), (4, 5), (1, 1), (3, 3)])
def test_arrays_of_pictures_that_are_nearly_lines(width, height):
    """Sides of 1, 3 and 4 pixels look like channels. Arrays have channels last, as Pillow's; tensors first."""
    image = picture(width, height)
    array = np.asarray(image)
    for form in (array, torch.from_numpy(array.transpose(2, 0, 1).copy())):
        assert np.array_equal(read_image(form).permute(1, 2, 0).numpy(), array), type(form)
    size = {"image_size": 28, "max_tiles": 4}
    by_pillow, by_torch = (NemotronHVLImageProcessor(**size)(form) for form in (image, array))
    assert torch.equal(by_pillow["num_tiles"], by_torch["num_tiles"])


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_are_16_bits_however_dark(order):
    dark = np.full((5, 6), 200, f"{order}u2")  # of 65535: nearly black
    bright = np.full((5, 6, 3), 25700, f"{order}u2")
    mode = "I;16B" if order == ">" else "I;16"
    forms = [dark, torch.full((5, 6), 200, dtype=torch.uint16), Image.frombytes(mode, (6, 5), dark.tobytes())]
    assert [int(np.asarray(read_image(form)).max()) for form in forms] == [1, 1, 1]
    assert int(read_image(bright).max()) == 100
    assert int(read_image(np.full((5, 6), 0.5, f"{order}f4")).max()) == 128


def test_what_is_no_array_of_numbers_is_named():
    for wrong in (np.array([[None]]), np.array([["a"]])):
        with pytest.raises(ValueError, match="image is an array of .*: allowed are numbers"):
            read_image(wrong)
    with pytest.raises(ValueError, match="image='data:image/png' is no base64"):
        read_image("data:image/png")


@pytest.mark.parametrize("height, width", [(1, 10**6), (10**6, 1), (14, 10**7), (10**7, 14), (30, 10**6), (1, 1)])
@pytest.mark.parametrize("least, most", [(1024, 13312), (4, 64), (1, 16)])
def test_lines_keep_to_the_number_of_patches(height, width, least, most):
    rows, columns = patch_grid(height, width, 14, 2, least, most)
    assert rows % 2 == columns % 2 == 0 and least <= rows * columns <= most
