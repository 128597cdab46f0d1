"""What int8 weights cost the embedded model: bits per byte of its held-out files, in fp32 and with int8 weights.

    python experiments/int8/loss.py        # loss.json in docs/results/int8; checkpoints and samples under runs/int8

Weights are quantised by torchao when they are loaded, one scale per row, and multiplied by numba_run.py; `nemotron-h eval` then
reads what was saved, as it would any checkpoint.
"""

import json
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.scripts import eval as eval_command
from nemotron_h_hf.tokenizer_files import save_tokenizer

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "int8"

RUNS = Path("runs/int8")
WAYS = {"fp32": None, "int8": {}, "int8 with lm_head": {"modules_to_not_convert": []}}


def main() -> None:
    found = {}
    for way, more in WAYS.items():
        folder = RUNS / way.replace(" ", "_")
        if not (folder / "model").is_dir():
            quantised = {} if more is None else {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), **more)}
            model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32, **quantised)
            model.save_pretrained(folder / "model")
            save_tokenizer(AutoTokenizer.from_pretrained(EMBEDDED_MODEL), folder / "model")
        eval_command.main(["--model", str(folder / "model"), "--tasks", "bpb", "--output", str(folder / "eval")])
        found[way] = json.loads((folder / "eval" / "results.json").read_text(encoding="utf-8"))["bpb"]
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        found[way] = {"bits_per_byte": found[way]["bits_per_byte"], "checkpoint_bytes": size}
    text = json.dumps(found, indent=1)
    (RESULTS / "loss.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
