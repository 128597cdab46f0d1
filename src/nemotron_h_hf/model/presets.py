"""Released shapes (facts of the family: NVIDIA's provider code and model cards); fields not named are the class defaults."""

from typing import Any

PATTERN_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_MOE = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "n_shared_experts": 1}
_NANO_30B = {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "hidden_size": 2688,
    "intermediate_size": 1856, "num_key_value_heads": 2, "mamba_num_heads": 64, "max_position_embeddings": 262144,
    "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5, **_MOE,
}  # fmt: skip
# The experts of each layer of the released Puzzle model: (width, experts per token).
_PUZZLE = [
    (1280, 4), (1280, 8), (1280, 10), (1280, 8), (1280, 8), (1280, 8), (1280, 12), (1280, 8), (1280, 10), (1280, 8),
    (2688, 12), (1536, 14), (2688, 12), (1536, 12), (1536, 12), (2688, 12), (2688, 12), (2688, 12), (1536, 10), (2688, 12),
    (2688, 12), (1792, 12), (1792, 14), (1280, 10), (1280, 10), (1280, 12), (1280, 8), (1280, 12), (1280, 10), (1280, 8),
    (1280, 8), (1280, 10), (1280, 10), (1280, 10), (1280, 12), (1280, 12), (1280, 14), (1280, 16), (1792, 18), (2048, 18),
    (2688, 22),  # of multi-token prediction
]  # fmt: skip
_SUPER = {
    "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    "hidden_size": 4096, "num_key_value_heads": 2, "mamba_num_heads": 128, "max_position_embeddings": 262144,
    "n_routed_experts": 512, "num_experts_per_tok": 22, "moe_intermediate_size": 2688,
    "moe_shared_expert_intermediate_size": 5376, "moe_latent_size": 1024, "routed_scaling_factor": 5.0,
    "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", **_MOE,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "4b": {"hybrid_override_pattern": PATTERN_8B, "hidden_size": 3072, "intermediate_size": 12288, "mamba_num_heads": 112},
    "8b": {"hybrid_override_pattern": PATTERN_8B},
    "47b": {
        "hybrid_override_pattern": "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M"
        "-M*-M-M-M-M-M-",
        "hidden_size": 8192, "intermediate_size": 30720, "num_attention_heads": 64, "mamba_num_heads": 256,
        "ssm_state_size": 256,
    },
    "56b": {
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*"
        "-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "hidden_size": 8192, "intermediate_size": 32768, "num_attention_heads": 64, "mamba_num_heads": 256,
        "ssm_state_size": 256,
    },
    "nano-9b-v2": {
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", "hidden_size": 4480,
        "intermediate_size": 15680, "num_attention_heads": 40, "mamba_head_dim": 80, "max_position_embeddings": 131072,
    },
    "nano-12b-v2": {
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", "hidden_size": 5120,
        "intermediate_size": 20480, "num_attention_heads": 40, "mamba_head_dim": 80, "max_position_embeddings": 131072,
    },
    "3-nano-4b": {
        "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-", "hidden_size": 3136,
        "intermediate_size": 12544, "num_attention_heads": 40, "mamba_num_heads": 96, "mamba_head_dim": 80,
        "chunk_size": 256, "max_position_embeddings": 262144,
    },
    "3-nano-30b-a3b": _NANO_30B,
    "3-super": _SUPER,
    "3-ultra": {
        "hybrid_override_pattern": "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EM"
        "EMEM*EMEMEMEM*EMEMEMEME",
        "hidden_size": 8192, "intermediate_size": 5120, "num_attention_heads": 64, "num_key_value_heads": 2,
        "mamba_num_heads": 256, "max_position_embeddings": 262144, "n_routed_experts": 512, "num_experts_per_tok": 22,
        "moe_intermediate_size": 5120, "moe_shared_expert_intermediate_size": 10240, "moe_latent_size": 2048,
        "routed_scaling_factor": 5.0, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", **_MOE,
    },
    "3.5-lightning": {**_NANO_30B, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"},
    "3-puzzle-75b-a9b": {
        **_SUPER, "ssm_state_size": 96, "moe_intermediate_size": [width for width, _ in _PUZZLE],
        "num_experts_per_tok": [count for _, count in _PUZZLE],
    },
}  # fmt: skip
