"""Speculative decoding on a hybrid model: guess tokens from the prompt, verify them in one pass, roll back the wrong ones.

transformers refuses this for recurrent models; `HybridCache` can undo tokens. The text is the greedy text, in fp32; in bf16 one
pass over several tokens rounds otherwise than several passes, and where two tokens are nearly equal the other may win.

python examples/prompt_lookup.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL

tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
source = (
    "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return width *"
)
prompt = tokenizer(source, return_tensors="pt")

passes = []
model.register_forward_hook(lambda *_: passes.append(1))
greedy = model.generate(**prompt, max_new_tokens=48, do_sample=False)
plain = len(passes)
passes.clear()
looked_up = model.generate(**prompt, max_new_tokens=48, do_sample=False, prompt_lookup_num_tokens=4)
assert torch.equal(greedy, looked_up)
print(tokenizer.decode(greedy[0]))
print(
    f"{greedy.shape[1] - prompt.input_ids.shape[1]} tokens: {plain} passes one by one, {len(passes)} with prompt lookup"
)
