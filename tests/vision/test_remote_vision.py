"""A vision-language checkpoint with its code next to the weights, where the package is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import put_code_next_to
from vl_tiny import SIDE, released_model, vl_model, vl_processor, word_tokenizer

from nemotron_h_hf import NemotronHVLImageProcessor, NemotronHVLProcessor, hub

WITHOUT_PACKAGE = """
import json, sys
sys.modules["nemotron_h_hf"] = None
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for thing in (model, model.config, processor, processor.image_processor):
    assert type(thing).__module__.startswith("transformers_modules."), type(thing)
images = [Image.new("RGB", (side, 28), "red") for side in (56, 28)]
inputs = processor(images=images, text="<image>what is <image>this?", return_tensors="pt")
model.save_pretrained(folder + ".again")
print(json.dumps(model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()))
"""


@pytest.mark.parametrize("kind", ["nvlm", "nano"])
def test_the_code_beside_the_weights_runs_alone(kind, tmp_path):
    folder = tmp_path / "model"
    if kind == "nvlm":
        model, processor = vl_model(), vl_processor()
    else:
        model = released_model("nano")
        images = NemotronHVLImageProcessor(image_size=32, patch_size=8)
        processor = NemotronHVLProcessor(images, word_tokenizer("<img>", "</img>"))
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert "modeling_nemotron_h_vl.py" in put_code_next_to(folder)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    images = [Image.new("RGB", (side, SIDE), "red") for side in (2 * SIDE, SIDE)]
    inputs = processor(images=images, text="<image>what is <image>this?", return_tensors="pt")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
    torch.set_num_threads(before)
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    first, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "model.again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_a_text_model_travels_without_the_files_of_vision():
    text, vision = hub.code_files(), hub.code_files(vision=True)
    assert not any("_vl" in name for name in text)
    assert {name for name in vision if name not in text} == {
        "configuration_nemotron_h_vl.py", "image_processing_nemotron_h_vl.py", "image_reading_vl.py",
        "modeling_nemotron_h_vl.py", "names_vl.py", "processing_nemotron_h_vl.py",
    }  # fmt: skip
