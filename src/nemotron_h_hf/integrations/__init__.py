"""What other programs need to use our classes: few lines each.

axolotl.py       axolotl's plugin: our classes in place of transformers'
vllm.py          vLLM's plugin: our configurations without remote code, and a budget of a parent by `--hf-overrides`
vllm_model.py    its model, which cuts each tensor while it is loaded

verl needs no code: `actor_rollout_ref.model.external_lib=nemotron_h_hf`. Nor does ms-swift: `--external_plugins` takes a file
with the line `import nemotron_h_hf`.
"""
