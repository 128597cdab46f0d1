"""Read a long prompt once, keep the state in a file, and continue it many times.

The state of a Mamba layer has one size at any length, so a saved prompt stays small.

python examples/share_a_prompt.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL, HybridCache

tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
document = tokenizer(Path(__file__).read_text() * 4, return_tensors="pt").input_ids

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    cache = HybridCache(model.config)
    model(document, cache=cache, logits_to_keep=1)
    path = Path(folder) / "prompt.safetensors"
    cache.save(path)
    print(f"{document.shape[1]} tokens read; the saved state has {path.stat().st_size / 2**20:.1f} MiB")

    prompt = HybridCache.load(path, model.config)
    for question in ("\n\ndef ", "\n\nclass ", "\n\nimport "):
        ids = torch.cat([document, tokenizer(question, return_tensors="pt").input_ids], dim=1)
        text = model.generate(ids, cache=prompt.fork(), max_new_tokens=12, do_sample=False)
        print(repr(tokenizer.decode(text[0, document.shape[1] :])))
