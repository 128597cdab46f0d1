"""What other programs need to use our classes: few lines each.

vllm.py          vLLM's plugin: our configurations without remote code, and a budget of a parent by `--hf-overrides`
vllm_model.py    its model, which cuts each tensor while it is loaded
"""
