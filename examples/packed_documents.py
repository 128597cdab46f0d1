"""Train on several documents in one row, without any of them seeing another.

Documents are told apart by positions that restart, as transformers' padding-free collator gives them; the convolution,
the state-space scan and attention all honour them.

python examples/packed_documents.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening

from nemotron_h_hf import EMBEDDED_MODEL

tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
texts = ["import os\n\nprint(os.getcwd())\n", "def add(a, b):\n    return a + b\n", "x = [i * i for i in range(10)]\n"]
documents = [{"input_ids": tokenizer(text).input_ids} for text in texts]
batch = DataCollatorWithFlattening(return_tensors="pt")(documents)

with torch.no_grad():
    packed = model(**batch, use_cache=False).logits[0]
    alone = torch.cat([model(torch.tensor([d["input_ids"]])).logits[0] for d in documents])
print(f"one row of {packed.shape[0]} tokens, {len(documents)} documents")
print(f"largest difference from the documents alone: {(packed - alone).abs().max():.1e}")
assert torch.allclose(packed, alone, atol=1e-4)
