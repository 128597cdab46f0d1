"""Time and memory of a picture against its number of tiles, on this machine: the tower's part, the language model's, the cache.

    python tiles.py OUT.json

Fresh weights: InternViT of 6 layers of 384 on tiles of 448 pixels, a hybrid and a pure attention language model of 8 layers of 512.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from nemotron_h_hf import HybridCache, NemotronHVLConfig, NemotronHVLForConditionalGeneration

TILES, REPEATS = (1, 3, 5, 7, 9, 13), 3
TEXT = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8,
    "head_dim": 64, "mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 2,
    "max_position_embeddings": 8192, "hybrid_override_pattern": "M-M-M*M-",
}  # fmt: skip
TOWER = {
    "model_type": "internvl_vision", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
    "intermediate_size": 1536, "image_size": 448, "patch_size": 14,
}  # fmt: skip


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, pattern in (("hybrid", "M-M-M*M-"), ("attention", "*-*-*-*-")):
        torch.manual_seed(0)
        text = {**TEXT, "hybrid_override_pattern": pattern}
        config = NemotronHVLConfig(
            text_config=text, vision_config=TOWER, image_token_id=1000, projector_hidden_size=2048
        )
        model = NemotronHVLForConditionalGeneration(config).bfloat16().eval()
        found[name] = [measure(model, tiles) for tiles in TILES]
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


def measure(model: NemotronHVLForConditionalGeneration, tiles: int) -> dict:
    """Medians of seconds, and bytes of the cache after the picture with 6 tokens of tag per tile."""
    pixels = torch.randn(tiles, 3, 448, 448, dtype=torch.bfloat16)
    ids = torch.tensor([([5] * 6 + [1000] * 256) * tiles])
    seconds: dict[str, list[float]] = {"tower": [], "language": []}
    for _ in range(REPEATS):
        begin = time.perf_counter()
        positions = model.model.image_positions(ids, None)
        features = model.model.features_by_row(positions, pixels, None)
        middle = time.perf_counter()
        cache = HybridCache(model.config.text_config)
        model(ids, image_features=features, cache=cache, logits_to_keep=1)
        seconds["tower"].append(middle - begin)
        seconds["language"].append(time.perf_counter() - middle)
    medians = {f"{name}_seconds": round(statistics.median(values), 3) for name, values in seconds.items()}
    line = {"tiles": tiles, "tokens": ids.shape[1], **medians, "cache_bytes": cache.memory_bytes()["total"]}
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
