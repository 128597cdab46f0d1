"""What `nemotron-h elasticize --stream` saves: memory and time of measuring widths, the model whole and a layer at a time.

    python experiments/elastic_importance/streaming.py

A model of 1 GB in bfloat16 with random weights, computed in fp32; two batches of 2 x 128 tokens; each way in a process of
its own. `peak_bytes` is the largest resident size beyond what the process had when its imports were done. Writes
streaming.json. Linux.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.checkpoint import save
from nemotron_h_hf.cost import weight_bytes
from nemotron_h_hf.elastic.prepare.measuring import measure_width
from nemotron_h_hf.elastic.prepare.streaming import streamed
from nemotron_h_hf.environment import status_bytes
from nemotron_h_hf.model.weights import TensorSpec
from nemotron_h_hf.tensors import checkpoint_tensors
from nemotron_h_hf.whole_files import write_json, write_text

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "elastic_importance"

SIZES = {
    "vocab_size": 16384, "hidden_size": 1536, "hybrid_override_pattern": "M-M-M-*-M-M-M-*-M-M-M-*-", "intermediate_size": 6144,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "mamba_num_heads": 48, "mamba_head_dim": 64,
}  # fmt: skip


def main() -> None:
    config = NemotronHConfig(**SIZES, dtype="bfloat16", architectures=["NemotronHForCausalLM"])
    with tempfile.TemporaryDirectory() as folder:
        specs = [TensorSpec(tensor.name, torch.bfloat16, tensor.shape) for tensor in checkpoint_tensors(config)]
        noise = torch.randn(max(spec.num_elements for spec in specs), generator=torch.Generator().manual_seed(0)) / 40
        noise = noise.bfloat16()
        save(Path(folder), specs, ((spec.name, noise[: spec.num_elements].view(spec.shape)) for spec in specs))
        write_text(Path(folder, "config.json"), config.to_json_string(use_diff=False))
        found = {way: run_apart(way, folder) for way in ("whole", "streamed")}
    largest = max(sum(t.num_elements for t in checkpoint_tensors(config) if f".layers.{index}." in t.name)
                  for index in range(config.num_hidden_layers))  # fmt: skip
    report = {
        "command": "python experiments/elastic_importance/streaming.py", "torch": torch.__version__,
        "weight_bytes_in_fp32": weight_bytes(config, "float32"), "largest_layer_bytes_in_fp32": 4 * largest, **found,
    }  # fmt: skip
    if report["whole"].pop("checksum") != report["streamed"].pop("checksum"):
        raise ValueError("the two ways measured different scores")
    write_json(RESULTS / "streaming.json", report)
    print(json.dumps(report, indent=1))


def run_apart(way: str, folder: str) -> dict:
    command = [sys.executable, __file__, way, folder]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(way: str, folder: Path) -> None:
    before, started = status_bytes("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if way == "whole":
        model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = streamed(NemotronHConfig.from_pretrained(folder), folder, torch.float32)
    loaded = time.perf_counter()
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(3, 16000, (128,), generator=generator)} for _ in range(4)]
    scores = measure_width(model, rows, 2, None, "")
    checksum = sum(float(place.sum()) for place in scores.sums.values())
    done = time.perf_counter()
    print(json.dumps({"peak_bytes": status_bytes("VmHWM") - before, "seconds_to_load": round(loaded - started, 1),
                      "seconds_of_two_batches": round(done - loaded, 1), "checksum": checksum}))  # fmt: skip


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) > 1 else main()
