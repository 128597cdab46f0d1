"""A tiny checkpoint in the layout of the released Puzzle model, made by hand: names and shapes as in NVIDIA's files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import VOCAB, spread

HIDDEN, HEADS, DIM, GROUPS, STATE, LATENT, SHARED = 48, 8, 8, 2, 12, 32, 40
INNER, CONV = HEADS * DIM, HEADS * DIM + 2 * GROUPS * STATE
# Experts, their width, experts per token: as released, the numbers of experts and the shared expert are at the top level.
BLOCKS = [
    {"block_type": "mamba"},
    {"block_type": "moe", "moe_intermediate_size": 24, "num_experts_per_tok": 3},
    {"block_type": "attention"},
    {"block_type": "moe", "moe_intermediate_size": 16, "num_experts_per_tok": 1},
    {"block_type": "mamba"},
    {"block_type": "moe", "moe_intermediate_size": 40, "num_experts_per_tok": 5},
]
MTP_BLOCKS = [{"block_type": "attention"}, {"block_type": "moe", "moe_intermediate_size": 56, "num_experts_per_tok": 6}]
RELEASED = {
    "architectures": ["NemotronHPuzzleForCausalLM"], "model_type": "nemotron_h_puzzle", "dtype": "bfloat16",
    "block_configs": BLOCKS, "mtp_block_configs": MTP_BLOCKS, "layers_block_type": [it["block_type"] for it in BLOCKS],
    "mtp_layers_block_type": ["attention", "moe"], "num_nextn_predict_layers": 1, "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": HEADS,
    "mamba_head_dim": DIM, "n_groups": GROUPS, "ssm_state_size": STATE, "conv_kernel": 4, "chunk_size": 8,
    "n_routed_experts": 8, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": SHARED, "moe_latent_size": LATENT,
    "routed_scaling_factor": 5.0, "norm_topk_prob": True, "max_position_embeddings": 262144, "tie_word_embeddings": False,
    "norm_eps": 1e-5, "time_step_min": 0.001, "blockwise_members": ["block_type", "moe_intermediate_size"],
}  # fmt: skip


def mixer_tensors(block: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer, from the released files."""
    if block["block_type"] == "mamba":
        return {
            "in_proj.weight": (INNER + CONV + HEADS, HIDDEN), "conv1d.weight": (CONV, 1, 4), "conv1d.bias": (CONV,),
            "A_log": (HEADS,), "D": (HEADS,), "dt_bias": (HEADS,), "norm.weight": (INNER,), "out_proj.weight": (HIDDEN, INNER),
        }  # fmt: skip
    if block["block_type"] == "attention":
        wide, narrow = (64, HIDDEN), (32, HIDDEN)
        return {"q_proj.weight": wide, "k_proj.weight": narrow, "v_proj.weight": narrow, "o_proj.weight": (HIDDEN, 64)}
    width = block["moe_intermediate_size"]
    shapes = {
        "gate.weight": (8, HIDDEN), "gate.e_score_correction_bias": (8,), "fc1_latent_proj.weight": (LATENT, HIDDEN),
        "fc2_latent_proj.weight": (HIDDEN, LATENT), "shared_experts.up_proj.weight": (SHARED, HIDDEN),
        "shared_experts.down_proj.weight": (HIDDEN, SHARED),
    }  # fmt: skip
    for expert in range(8):
        shapes[f"experts.{expert}.up_proj.weight"] = (width, LATENT)
        shapes[f"experts.{expert}.down_proj.weight"] = (LATENT, width)
    return shapes


def released_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        "model.embeddings.weight": (VOCAB, HIDDEN),
        "model.norm_f.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for root, blocks in (("model", BLOCKS), ("mtp", MTP_BLOCKS)):
        for index, block in enumerate(blocks):
            place = f"{root}.layers.{index}."
            shapes[f"{place}norm.weight"] = (HIDDEN,)
            shapes |= {f"{place}mixer.{name}": shape for name, shape in mixer_tensors(block).items()}
    first = {"eh_proj.weight": (HIDDEN, 2 * HIDDEN), "enorm.weight": (HIDDEN,), "hnorm.weight": (HIDDEN,)}
    return shapes | {f"mtp.layers.0.{name}": shape for name, shape in first.items()} | {
        "mtp.layers.1.final_layernorm.weight": (HIDDEN,)
    }  # fmt: skip


def write_released(folder: Path) -> Path:
    """A tiny checkpoint as NVIDIA's files are: bf16, fp32 for the routers' biases."""
    holder = torch.nn.Module()
    tensors = {name: torch.empty(shape) for name, shape in released_shapes().items()}
    holder.named_parameters, holder.named_buffers = tensors.items, lambda: ()
    spread(holder)
    tensors = {name: it if name.endswith("correction_bias") else it.bfloat16() for name, it in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(RELEASED))
    return folder


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Released names with the experts of a layer in one tensor, as the reference takes them."""
    found = {
        name: tensors[name] for name in sorted(tensors, key=lambda name: ".mixer." in name) if ".experts." not in name
    }
    for name in tensors:
        if ".experts.0." in name:
            rows = [tensors[name.replace("experts.0.", f"experts.{expert}.")] for expert in range(8)]
            found[name.replace("experts.0.", "experts.").removesuffix(".weight")] = torch.stack(rows)
    return found
