"""Fine-tune with LoRA on every projection, out_proj of the Mamba layers included, then merge.

python examples/lora.py    (needs peft: pip install 'nemotron-h-hf[peft]')
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
targets = ["in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
model.print_trainable_parameters()

text = "def greet(name):\n    return 'Good morning, ' + name + '!'\n"
batch = tokenizer(text, return_tensors="pt")
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
model.train()
for step in range(20):
    loss = model(**batch, labels=batch.input_ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss.item():.3f}")

merged = model.merge_and_unload().eval()
prompt = tokenizer("def greet(name):\n", return_tensors="pt")
print(tokenizer.decode(merged.generate(**prompt, max_new_tokens=24, do_sample=False)[0]))
