"""A budget of a parent in vLLM, cut while it is loaded, against our own model of that budget.

    python experiments/serving/vllm_budget.py write FOLDER      with this package's environment
    python experiments/serving/vllm_budget.py check FOLDER      with vLLM's, where this package is on the path too

A tiny parent with three budgets, fp32: log-probabilities of a prompt, and greedy tokens. `check` fails where the first differ
by more than 1e-4 or a token differs; `make test-vllm` runs both with vLLM's CPU build.
"""

import json
import os
import sys
from pathlib import Path

BUDGETS = {
    "narrow": {"hidden_size": 96, "mamba_num_heads": 8, "intermediate_size": 128},
    "shallow": {"layers": [0, 1, 3, 4, 5], "intermediate_size": [96, 160]},
    "heads": {"num_attention_heads": 2},
}
TOKENS = 24
LIMIT = 1e-4  # nats


def main() -> None:
    what, folder = sys.argv[1:]
    {"write": write, "check": check}[what](Path(folder))


def write(folder: Path) -> None:
    """The parent, a prompt, and what each budget says of it."""
    import torch

    from nemotron_h_hf import NemotronHConfig, NemotronHElasticForCausalLM, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=512, hidden_size=128, hybrid_override_pattern="M-M*-M-", intermediate_size=256, mamba_num_heads=16,
        mamba_head_dim=16, n_groups=4, ssm_state_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        elastic={"version": 1, "budgets": BUDGETS}, initializer_range=0.2,
    )  # fmt: skip
    NemotronHForCausalLM(config).save_pretrained(folder)
    parent = NemotronHElasticForCausalLM.from_pretrained(folder).eval()
    prompt = torch.randint(3, 512, (1, 40))
    said = {"prompt": prompt[0].tolist()}
    with torch.no_grad():
        for name in BUDGETS:
            small = parent.submodel(name)
            scores = small(prompt).logits[0, :-1].log_softmax(-1).gather(1, prompt[0, 1:, None])[:, 0]
            new = small.generate(prompt, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
            said[name] = {"logprobs": scores.tolist(), "tokens": new[0, 40:].tolist()}
    (folder / "said.json").write_text(json.dumps(said))


def check(folder: Path) -> None:
    """The same from vLLM."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )  # fmt: skip
    from vllm import LLM, SamplingParams

    from nemotron_h_hf.integrations.vllm import register

    register()
    said, wrong = json.loads((folder / "said.json").read_text()), []
    for name in BUDGETS:
        model = LLM(
            str(folder), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=2, skip_tokenizer_init=True,
            hf_overrides={"budget": name}, mamba_cache_dtype="float32", mamba_ssm_cache_dtype="float32",
            enable_prefix_caching=False,
        )  # fmt: skip
        asked = SamplingParams(temperature=0, max_tokens=TOKENS, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        (answer,) = model.generate([{"prompt_token_ids": said["prompt"]}], asked)
        scores = [place[token].logprob for place, token in zip(answer.prompt_logprobs[1:], said["prompt"][1:])]
        apart = max(abs(a - b) for a, b in zip(scores, said[name]["logprobs"]))
        same = sum(a == b for a, b in zip(answer.outputs[0].token_ids, said[name]["tokens"]))
        print(
            f"{name}: log-probabilities differ by {apart:.2g} at most, {same} of {TOKENS} greedy tokens are equal",
            flush=True,
        )
        if apart > LIMIT or same < TOKENS:
            wrong.append(name)
        del model
    if wrong:
        sys.exit(f"differs from ours: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
