"""Load the embedded model through transformers and stream a completion.

python examples/generate.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from nemotron_h_hf import EMBEDDED_MODEL

tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)

prompt = tokenizer("class Stack:\n    def __init__(self):\n", return_tensors="pt")
model.generate(**prompt, max_new_tokens=60, do_sample=False, streamer=TextStreamer(tokenizer))
