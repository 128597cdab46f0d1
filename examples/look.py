"""Ask the embedded vision-language model what stands in each tile of a picture, and draw its answers on the picture.

python examples/look.py answers.png
"""

import sys

from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

from nemotron_h_hf import EMBEDDED_VISION_MODEL

processor = AutoProcessor.from_pretrained(EMBEDDED_VISION_MODEL)
model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_VISION_MODEL)
picture = Image.open(f"{EMBEDDED_VISION_MODEL}/digits.png")

tiles, columns = 6, 3  # 192 x 128 pixels are 3 x 2 tiles
texts = [f"<bos><image>digit in tile {tile:02d} ?" for tile in range(1, tiles + 1)]
inputs = processor(images=[[picture]] * tiles, text=texts, return_tensors="pt", add_special_tokens=False)
answers = processor.batch_decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1:])

side = picture.width // columns
pen = ImageDraw.Draw(picture)
for tile, answer in enumerate(answers):
    corner = (tile % columns * side, tile // columns * side)
    pen.rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), outline="red")
    pen.text((corner[0] + 4, corner[1] + 2), answer, fill="red")
    print(f"tile {tile + 1:02d}: {answer}")
if len(sys.argv) > 1:
    picture.save(sys.argv[1])
