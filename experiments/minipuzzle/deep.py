"""A deeper teacher than the embedded model, then the whole of run.py on it: hours on a CPU, resumable.

    OMP_NUM_THREADS=1 python experiments/minipuzzle/deep.py runs/deep

The 56B's scheme scaled down: 28 layers, three of them attention, 5.6 M parameters, the embedded model's tokenizer, trained with
`nemotron-h pretrain` on the standard library for 10 M tokens. The command given again goes on. Not run for docs/results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from nemotron_h_cli import run as command
from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.data.stdlib_text import as_jsonl, read_documents, split_documents

PATTERN = "M-M-M*-M-M-M-M*-M-M-M-M*-M-M"
SIZES = {
    "hidden_size": 160, "intermediate_size": 640, "head_dim": 32, "num_attention_heads": 5, "num_key_value_heads": 1,
    "mamba_num_heads": 10, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 32, "hybrid_override_pattern": PATTERN,
}  # fmt: skip
RECIPE = {
    "sequence_length": 256, "width_samples": 256, "layer_samples": 64, "ranking_tokens": "32K", "batch_size": 8,
    "dtype": "float32", "more_scores": ["logits", "cosine"], "sizes": {"intermediate_size": [320, 400, 480, 560, 640]},
    "counts": {"attention": [1, 3], "mamba": [9, 13], "mlp": [8, 12]}, "mixed_widths": True, "finalists": 4,
    "short_tokens": "1M", "long_tokens": "3M",
    "distill": {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "warmup_tokens": "10%", "decay_tokens": "50%",
                "save_steps": 100, "report_to": "none"},
}  # fmt: skip


def main() -> None:
    """Train the teacher, write the recipe, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", default="10M")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.jsonl"
    if not text.is_file():
        text.write_text(as_jsonl(split_documents(read_documents())[0]))
    command(["pretrain", *pretraining(text, arguments.tokens), "--output_dir", str(folder / "teacher")])
    config = NemotronHConfig.from_pretrained(folder / "teacher" / "model")
    recipe = {**RECIPE, "max_parameters": str(int(0.84 * num_parameters(config)))}  # 16 % fewer, as the paper's
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["--teacher", str(folder / "teacher" / "model"), "--recipe", str(folder / "recipe.yaml")]
    words += ["--seeds", *arguments.seeds, "--output", str(folder / "results")]
    subprocess.run([sys.executable, str(Path(__file__).with_name("run.py")), str(folder / "runs"), *words], check=True)


def pretraining(text: Path, tokens: str) -> list[str]:
    """Options of `nemotron-h pretrain`."""
    return ["--model", EMBEDDED_MODEL, "--init", "random", "--config_overrides", json.dumps(SIZES), "--sources",
            json.dumps({"code": {"path": str(text)}}), "--total_tokens", tokens, "--sequence_length", "512",
            "--per_device_train_batch_size", "8", "--learning_rate", "2e-3", "--optimizer", "muon", "--use_cpu",
            "--save_steps", "100", "--report_to", "none"]  # fmt: skip


if __name__ == "__main__":
    main()
