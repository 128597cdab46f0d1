"""The vision-language model in the box: what it says of its picture."""

from transformers import AutoModelForImageTextToText, AutoProcessor

from nemotron_h_hf import EMBEDDED_VISION_MODEL
from nemotron_h_hf.scripts.demo import look


def test_it_reads_the_digits_of_its_picture():
    processor = AutoProcessor.from_pretrained(EMBEDDED_VISION_MODEL)
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_VISION_MODEL)
    assert sum(weight.numel() for weight in model.parameters()) == 309_208
    said = []
    for tile in range(1, 7):
        text = f"<bos><image>digit in tile {tile:02d} ?"
        picture = f"{EMBEDDED_VISION_MODEL}/digits.png"
        inputs = processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
        assert len(inputs["pixel_values"]) == 6
        said.append(processor.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1:]))
    assert said == list("421163")  # as drawn
    assert all(f"digit in tile {n + 1:02d} ? {digit}" in look() for n, digit in enumerate(said))
