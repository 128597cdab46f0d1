"""Text and pictures together: the block of a picture token by token, tags, chat templates, batches, what vLLM asks."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from vl_tiny import SIDE, vl_model, vl_processor, word_tokenizer

from nemotron_h_hf import NemotronHVLImageProcessor, NemotronHVLProcessor
from nemotron_h_hf.model.processing_nemotron_h_vl import CHAT_PREAMBLE

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def picture(columns: int, rows: int, shade: int = 50) -> Image.Image:
    """One that is cut into columns x rows tiles."""
    return Image.fromarray(np.full((rows * SIDE, columns * SIDE, 3), shade, dtype=np.uint8))


def block(tokenizer, num_tiles: int, tags: bool = True) -> list[int]:
    """The tokens of a picture by hand: wrapper, then a tag and four embeddings for each tile."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    names = [f"<tile_{i:02d}>" for i in range(1, num_tiles)] + ["<tile_global_thumbnail>"]
    inside = [
        token
        for name in names
        for token in (ids(name) if tags else []) + [tokenizer.convert_tokens_to_ids("<image>")] * 4
    ]
    start, end = ("<Image>", "</Image>") if tags else ("<img>", "</img>")
    return ids(start) + inside + ids(end)


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize(("shape", "num_tiles"), [((1, 1), 1), ((2, 1), 3), ((3, 2), 7), ((4, 3), 13)])
def test_the_block_of_a_picture(shape, num_tiles, tags):
    tokenizer = word_tokenizer() if tags else word_tokenizer("<img>", "</img>")
    processor = vl_processor(tokenizer=tokenizer)
    found = processor(images=picture(*shape), text="what is <image>?", return_tensors="pt")
    start, end = (tokenizer(text, add_special_tokens=False).input_ids for text in ("what is ", "?"))
    assert found.input_ids[0].tolist() == start + block(tokenizer, num_tiles, tags) + end
    assert found.pixel_values.shape == (num_tiles, 3, SIDE, SIDE) and "num_tiles" not in found


def test_nemotrons_count_of_embeddings():
    """256 embeddings and 6 tokens of a tag: 262 per tile, 3406 for 13 tiles."""
    tokenizer = word_tokenizer()
    processor = NemotronHVLProcessor(NemotronHVLImageProcessor(), tokenizer)
    text = processor.replace_image_token({"num_tiles": [13]}, 0).removeprefix("<Image>").removesuffix("</Image>")
    tokens = tokenizer.tokenize(text)
    assert tokens.count("<image>") == 13 * 256
    assert processor.tags(1) == ["<tile_global_thumbnail>"]
    assert processor.tags(3) == [
        "<tile_01>",
        "<tile_02>",
        "<tile_global_thumbnail>",
    ]


def test_tags_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="tile tags have different lengths in tokens .*<tile_thumbnail> 5"):
        vl_processor(thumbnail_tag="<tile_thumbnail>")
    vl_processor(thumbnail_tag="<tile_thumbnail>", use_tile_tags=False)


def test_more_than_twelve_tiles():
    with pytest.raises(ValueError, match="a picture of 14 tiles: allowed with tile tags are 12 and a thumbnail"):
        vl_processor().tags(14)


def test_several_pictures_per_text_and_none():
    processor = vl_processor()
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    texts = ["<image>a<image>?", "this is a cat", "<image>"]
    images = [[picture(2, 1), picture(1, 1)], [], [picture(1, 3)]]
    found = processor(images=images, text=texts, return_tensors="pt", padding=True)
    rows = [row[mask.bool()].tolist() for row, mask in zip(found.input_ids, found.attention_mask)]
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("a", "?")}
    assert rows[0] == [*block(tokenizer, 3), ids["a"], *block(tokenizer, 1), ids["?"]]
    assert rows[2] == block(tokenizer, 4) and found.pixel_values.shape[0] == 8
    assert processor(text=["a cat"], return_tensors="pt").keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([picture(1, 1)], "what is this?", "the text has 0 <image>, 1 pictures are given"),
        (None, "<image> and <image>", "the text has 2 <image>, 0 pictures are given"),
        (
            [[picture(1, 1)], [picture(1, 1)]],
            ["<image>", "<image><image>"],
            "the text has 3 <image>, 2 pictures are given",
        ),
        (["https://example.com/x.png"], "<image>", "on the network"),
    ],
)
def test_texts_and_pictures_that_do_not_fit(images, text, message):
    with pytest.raises(ValueError, match=message):
        vl_processor()(images=images, text=text)


def test_a_tokenizer_without_the_image_token():
    tokenizer = word_tokenizer()
    words = {word: i for word, i in tokenizer.get_vocab().items() if word != "<image>"}

    class Without:
        chat_template = None

        def get_vocab(self):
            return words

    with pytest.raises(ValueError, match="the tokenizer has no token <image>"):
        NemotronHVLProcessor(NemotronHVLImageProcessor(), Without())


def test_chat_template_of_a_text_model_takes_pictures():
    processor = vl_processor(chat_template=CHAT_PREAMBLE + TEMPLATE)
    content = [{"type": "image", "image": picture(2, 1)}, {"type": "text", "text": "what is this?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "a?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "user <image>what is this?\nassistant a cat\nuser a?\nassistant "
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert found.pixel_values.shape[0] == 3


def test_saved_and_loaded_by_auto_classes(tmp_path):
    vl_model().save_pretrained(tmp_path)
    first = vl_processor(images={"max_tiles": 6}, chat_template=CHAT_PREAMBLE + TEMPLATE)
    first.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (
        type(again) is NemotronHVLProcessor and again.thumbnail_tag == "<tile_global_thumbnail>" and again.use_tile_tags
    )
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is NemotronHVLImageProcessor
    given = {"images": picture(3, 2), "text": "<image>", "return_tensors": "pt"}
    assert torch.equal(first(**given).input_ids, again(**given).input_ids)
    assert again.image_processor.max_tiles == 6 and again.chat_template == first.chat_template


def test_what_vllm_asks_of_pictures_that_it_does_not_make():
    processor = vl_processor()
    sizes = [(SIDE, 2 * SIDE), (SIDE, SIDE), (3 * SIDE, 4 * SIDE)]  # height, width
    told = processor._get_num_multimodal_tokens(image_sizes=sizes)
    for size, tokens, patches in zip(sizes, told["num_image_tokens"], told["num_image_patches"]):
        given = processor(images=Image.new("RGB", size[::-1]), text="<image>", return_mm_token_type_ids=True)
        assert sum(given["mm_token_type_ids"][0]) == tokens and len(given["pixel_values"]) == patches


def test_patches_of_a_picture_in_its_own_resolution():
    images = {"patch_size": 16, "min_num_patches": 16, "max_num_patches": 64}
    tokenizer = word_tokenizer("<img>", "</img>")
    processor = NemotronHVLProcessor(NemotronHVLImageProcessor(**images), tokenizer)
    found = processor(images=Image.new("RGB", (96, 64)), text="<image>", return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(found.input_ids[0]) == ["<img>", *["<image>"] * 6, "</img>"]
    assert found.image_grid_hw.tolist() == [[4, 6]]
    told = processor._get_num_multimodal_tokens(image_sizes=[(64, 96)])
    assert told["num_image_tokens"] == [6] and told["num_image_patches"] == [1]


def test_a_released_folder_without_our_files(tmp_path):
    """config.json, tokenizer and a preprocessor_config.json that names classes that are not installed."""
    import json

    from vl_tiny import released_model

    released_model("nano").save_pretrained(tmp_path)
    word_tokenizer("<img>", "</img>").save_pretrained(tmp_path)
    fields = {"image_processor_type": "NemotronNanoVLV2ImageProcessor", "processor_class": "NemotronNanoVLV2Processor",
              "image_size": 32, "max_num_tiles": 12, "use_thumbnail": True, "norm_mean": [0.5] * 3, "norm_std": [0.25] * 3,
              "patch_size": 8, "downsample_ratio": 0.5}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    processor = AutoProcessor.from_pretrained(tmp_path)
    found = processor(images=Image.new("RGB", (64, 32)), text="<image>", return_tensors="pt")
    tokens = processor.tokenizer.convert_ids_to_tokens(found.input_ids[0])
    assert tokens == ["<img>", *["<image>"] * 12, "</img>"] and found.pixel_values.shape == (3, 3, 32, 32)
    assert found.pixel_values.min() == found.pixel_values.max() == -2
