"""Memory, bytes read and time of getting a small model out of a parent, in four ways, each in its own process.

    python experiments/elastic_cut/measure.py --gigabytes 1.1 --folder /path/with/room --out docs/results/elastic_cut

    slice           nemotron-h slice: the small model as a checkpoint
    load_budget     from_pretrained(parent, budget=...): the small model in memory
    load_slice      from_pretrained of what `slice` wrote
    load_parent     from_pretrained(parent), what the others are there to avoid

`peak_bytes` is the largest resident size beyond what the process had when its imports were done; `bytes_read` is what the
program asked for of the parent's weights, `read_by_process` what the kernel counted as read by the process meanwhile
(headers, JSON and manifest checks included). Needs twice the size on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.checkpoint import save
from nemotron_h_hf.cost import weight_bytes
from nemotron_h_hf.elastic.budgets import Budget
from nemotron_h_hf.elastic.cut.cutting import slice_checkpoint
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.environment import status_bytes
from nemotron_h_hf.model.weights import TensorSpec
from nemotron_h_hf.tensors import checkpoint_tensors
from nemotron_h_hf.whole_files import write_text

SIZES = {
    "vocab_size": 32768, "hidden_size": 1536, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "mamba_num_heads": 48, "mamba_head_dim": 64, "dtype": "bfloat16",
}  # fmt: skip
SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "mamba_num_heads": 32}
STEPS = ("slice", "load_budget", "load_slice", "load_parent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, help="folder for elastic_cut.json")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure_step(arguments.step, *arguments.paths)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.gigabytes)
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if arguments.out:
        write_text(arguments.out / "elastic_cut.json", text)


def measure(folder: Path, gigabytes: float) -> dict:
    """All figures of one run."""
    config = generate(folder / "parent", gigabytes)
    small = resolve(config, Budget(name="small", **SMALL)).config
    return {
        "command": f"python experiments/elastic_cut/measure.py --gigabytes {gigabytes:g}",
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "parent_bytes": weight_bytes(config),
        "small_bytes": weight_bytes(small),
        "largest_tensor_bytes": 2 * max(tensor.num_elements for tensor in checkpoint_tensors(config)),
        "budget": SMALL,
        "steps": {step: run_step(step, folder) for step in STEPS},
    }


def generate(folder: Path, gigabytes: float) -> NemotronHConfig:
    """A parent of about this size, in files of 300 MB, written one tensor at a time."""

    def build(units: int) -> NemotronHConfig:
        elastic = {"version": 1, "budgets": {"small": SMALL}}
        pattern, architectures = "M-M-M-*-" * units, ["NemotronHForCausalLM"]
        return NemotronHConfig(**SIZES, hybrid_override_pattern=pattern, elastic=elastic, architectures=architectures)

    one, two = (weight_bytes(build(units)) for units in (1, 2))
    config = build(max(1, round((gigabytes * 1e9 - 2 * one + two) / (two - one))))
    specs = [TensorSpec(tensor.name, torch.bfloat16, tensor.shape) for tensor in checkpoint_tensors(config)]
    noise = torch.randn(max(spec.num_elements for spec in specs), generator=torch.Generator().manual_seed(0)) / 40
    noise = noise.bfloat16()
    save(folder, specs, ((s.name, noise[: s.num_elements].view(s.shape)) for s in specs), max_shard_bytes=300_000_000)
    write_text(folder / "config.json", config.to_json_string(use_diff=False))
    return config


def run_step(step: str, folder: Path) -> dict:
    """One step in a fresh process, what it reads not in the page cache."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--step", step, str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_step(step: str, folder: Path) -> dict:
    """Peak memory beyond that of the imports, bytes read, seconds."""
    parent, small = folder / "parent", folder / "small"
    NemotronHForCausalLM(NemotronHConfig(vocab_size=8, hidden_size=8, hybrid_override_pattern="M", n_groups=1))
    before, read_before, started = status_bytes("VmRSS"), process_bytes_read(), time.perf_counter()
    bytes_read = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if step == "slice":
        bytes_read = slice_checkpoint(parent, "small", small, verify=False).bytes_read
    elif step == "load_budget":
        _, info = NemotronHForCausalLM.from_pretrained(parent, budget="small", output_loading_info=True)
        bytes_read = info["bytes_read"]
    else:
        NemotronHForCausalLM.from_pretrained(small if step == "load_slice" else parent)
    return {
        "peak_bytes": status_bytes("VmHWM") - before,
        "bytes_read": bytes_read,
        "read_by_process": process_bytes_read() - read_before,
        "seconds": round(time.perf_counter() - started, 2),
    }


def process_bytes_read() -> int:
    """Bytes that read calls of this process have returned; pages of a memory map are not among them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


if __name__ == "__main__":
    main()
