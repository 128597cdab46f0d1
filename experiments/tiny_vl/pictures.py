"""Pictures made here, with questions about them: digits on large canvases, shapes to count, bar charts.

    digits   scikit-learn's handwritten digits, and digits drawn with Pillow in matplotlib's fonts, one in each cell of a canvas
    shapes   circles, squares and triangles anywhere
    bars     matplotlib's bar charts

A cell is as large as a tile of the model, twice over: the picture has to be resized. Held-out pictures have
handwritten digits that were not trained on, and charts and layouts that were not drawn for training.

    python pictures.py FOLDER        writes train.pt and held_out.pt
    python pictures.py FOLDER 50     a fiftieth of them, for a look
"""

import io
import random
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

CELL = 64  # pixels
GRIDS = [(2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (3, 2), (2, 3)]  # columns, rows
FONTS = ["DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf"]
FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
COUNTS = {"train": (9000, 3000, 2000), "held_out": (1000, 500, 400)}  # canvases of digits, of shapes, charts


def main() -> None:
    folder, part = Path(sys.argv[1]), int((sys.argv[2:] or ["1"])[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, counts in COUNTS.items():
        digits, shapes, bars = (count // part for count in counts)
        rng = random.Random(name)
        made = [draw_digits(rng, name) for _ in range(digits)]
        made += [draw_shapes(rng) for _ in range(shapes)] + [draw_bars(rng) for _ in range(bars)]
        torch.save([{"png": _png(image), "questions": questions} for image, questions in made], folder / f"{name}.pt")
        print(name, len(made), flush=True)


def draw_digits(rng: random.Random, split: str) -> tuple[Image.Image, list[tuple[str, str]]]:
    """A digit in each cell, and: which stands in a tile, where one stands, all of them."""
    columns, rows = rng.choice(GRIDS)
    canvas = Image.new("RGB", (columns * CELL, rows * CELL), _colour(rng, 200, 255))
    digits = [rng.randrange(10) for _ in range(columns * rows)]
    for place, digit in enumerate(digits):
        corner = (place % columns * CELL, place // columns * CELL)
        (_written if rng.random() < 0.6 else _printed)(canvas, corner, digit, rng, split)
    tile = rng.randrange(len(digits))
    questions = [(f"digit in tile {tile + 1:02d} ?", str(digits[tile])), ("read all ?", " ".join(map(str, digits)))]
    single = [digit for digit in digits if digits.count(digit) == 1]
    if single:
        digit = rng.choice(single)
        questions.append((f"tile of digit {digit} ?", f"{digits.index(digit) + 1:02d}"))
    return canvas, questions


def draw_shapes(rng: random.Random) -> tuple[Image.Image, list[tuple[str, str]]]:
    """Up to six shapes that do not touch, and how many there are."""
    columns, rows = rng.choice(GRIDS)
    canvas = Image.new("RGB", (columns * CELL, rows * CELL), _colour(rng, 200, 255))
    pen, free = ImageDraw.Draw(canvas), [(x, y) for x in range(2 * columns) for y in range(2 * rows)]
    count = rng.randint(1, min(6, len(free)))
    for x, y in rng.sample(free, count):
        r, colour = rng.randint(9, 14), _colour(rng, 0, 140)
        cx, cy = x * CELL // 2 + 16 + rng.randint(-1, 1), y * CELL // 2 + 16 + rng.randint(-1, 1)
        box = (cx - r, cy - r, cx + r, cy + r)
        kind = rng.choice("cst")
        if kind == "t":
            pen.polygon([(cx, cy - r), (cx - r, cy + r), (cx + r, cy + r)], fill=colour)
        else:
            (pen.ellipse if kind == "c" else pen.rectangle)(box, fill=colour)
    return canvas, [("how many shapes ?", str(count))]


def draw_bars(rng: random.Random) -> tuple[Image.Image, list[tuple[str, str]]]:
    """Three bars of 1 to 9 with a grid, and what one of them says."""
    values = [rng.randint(1, 9) for _ in range(3)]
    figure = plt.figure(figsize=(3 * CELL / 100, 2 * CELL / 100), dpi=100)
    axes = figure.add_axes((0.02, 0.05, 0.96, 0.9))
    colour = [channel / 255 for channel in _colour(rng, 0, 160)]
    axes.bar(range(3), values, color=[colour], width=0.7)
    axes.set_ylim(0, 9.5)
    axes.set_xticks([])
    axes.set_yticks(range(0, 10, 3))
    axes.grid(axis="y")
    file = io.BytesIO()
    figure.savefig(file)
    plt.close(figure)
    bar = rng.randrange(3)
    return Image.open(file).convert("RGB"), [(f"bar {bar + 1:02d} ?", str(values[bar]))]


DIGITS = load_digits()
OF_DIGIT = {
    split: [np.flatnonzero((DIGITS.target == d) & ((np.arange(len(DIGITS.target)) % 5 == 0) == (split == "held_out")))
            for d in range(10)]
    for split in ("train", "held_out")
}  # fmt: skip


def _written(canvas: Image.Image, corner: tuple[int, int], digit: int, rng: random.Random, split: str) -> None:
    ink = DIGITS.images[rng.choice(OF_DIGIT[split][digit])] / 16 * 255
    mask = Image.fromarray(ink.astype(np.uint8)).resize((44, 52), Image.Resampling.BICUBIC)
    shift = (corner[0] + 10 + rng.randint(-4, 4), corner[1] + 6 + rng.randint(-3, 3))
    canvas.paste(_colour(rng, 0, 120), (*shift, shift[0] + 44, shift[1] + 52), mask)


def _printed(canvas: Image.Image, corner: tuple[int, int], digit: int, rng: random.Random, split: str) -> None:
    font = ImageFont.truetype(FONT_FOLDER / rng.choice(FONTS), rng.randint(44, 56))
    place = (corner[0] + CELL // 2 + rng.randint(-5, 5), corner[1] + CELL // 2 + rng.randint(-3, 3))
    ImageDraw.Draw(canvas).text(place, str(digit), fill=_colour(rng, 0, 120), font=font, anchor="mm")


def _colour(rng: random.Random, low: int, high: int) -> tuple[int, int, int]:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


if __name__ == "__main__":
    main()
