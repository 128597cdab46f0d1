"""Memory and speed of converting a large checkpoint, against copying the same bytes on the same disk in the same run.

    python experiments/conversion/measure.py --gigabytes 4 --folder /path/with/room --out docs/results/conversion

It generates a checkpoint, converts it to Megatron and back, and copies it, each in its own process. Before each the
source is dropped from the page cache, and each ends with its files on the disk (fsync). Needs three times the size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from nemotron_h_hf.conversion import convert, names

from nemotron_h_hf import NemotronHConfig
from nemotron_h_hf.checkpoint import save
from nemotron_h_hf.model.weights import TensorSpec
from nemotron_h_hf.whole_files import write_text

COPY_PIECE_BYTES = 16 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=2, help="of copy, convert, convert back")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, help="folder for conversion.json")
    parser.add_argument("--step", choices=("copy", "convert"), help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure_step(arguments.step, *arguments.paths)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.gigabytes, arguments.rounds)
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if arguments.out:
        write_text(arguments.out / "conversion.json", text)


def measure(folder: Path, gigabytes: float, rounds: int) -> dict:
    """All figures of one run; bytes are of tensors, times in seconds."""
    num_bytes, largest = generate(folder / "hf", gigabytes)
    run_step("convert", folder / "hf", folder / "run")
    steps: dict[str, list[dict]] = {"copy": [], "megatron_to_hf": [], "hf_to_megatron": []}
    for _ in range(rounds):
        for name, step, source in (
            ("copy", "copy", folder / "run"),
            ("megatron_to_hf", "convert", folder / "run"),
            ("hf_to_megatron", "convert", folder / "hf"),
        ):
            steps[name].append(run_step(step, source, folder / "out"))
            shutil.rmtree(folder / "out")
    copied = statistics.median(step["seconds"] for step in steps["copy"])
    return {
        "command": "python experiments/conversion/measure.py " + " ".join(sys.argv[1:3]),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "bytes": num_bytes,
        "largest_tensor_bytes": largest,
        "steps": steps,
        "speed_of_copying": {
            name: round(copied / statistics.median(step["seconds"] for step in found), 3)
            for name, found in steps.items()
        },
        "peak_over_largest_tensor": {
            name: round(max(step["peak_bytes"] for step in found) / largest, 3) for name, found in steps.items()
        },
    }


def generate(folder: Path, gigabytes: float) -> tuple[int, int]:
    """A Hugging Face checkpoint of about this size, one tensor at a time; its bytes and those of its largest tensor."""
    sizes = {
        "vocab_size": 65536, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4,
        "intermediate_size": 8192, "mamba_num_heads": 64, "mamba_head_dim": 64, "dtype": "bfloat16",
    }  # fmt: skip
    per_unit = sum(s.num_bytes for s in specs_of(NemotronHConfig(**sizes, hybrid_override_pattern="M-*-"))) - 2 * 2**28
    units = max(1, round((gigabytes * 1e9 - 2 * 2**28) / per_unit))
    config = NemotronHConfig(**sizes, hybrid_override_pattern="M-*-" * units, architectures=["NemotronHForCausalLM"])
    specs = specs_of(config)
    noise = torch.randn(max(spec.num_elements for spec in specs), generator=torch.Generator().manual_seed(0)).bfloat16()
    save(folder, specs, ((spec.name, noise[: spec.num_elements].view(spec.shape)) for spec in specs))
    write_text(folder / "config.json", config.to_json_string(use_diff=False))
    return sum(spec.num_bytes for spec in specs), max(spec.num_bytes for spec in specs)


def specs_of(config: NemotronHConfig) -> list[TensorSpec]:
    """All tensors of a configuration, in bfloat16."""
    return [
        TensorSpec(name, torch.bfloat16, shape)
        for link in names.links(config)
        for name, shape in zip(link.hf, link.hf_shapes, strict=True)
    ]


def run_step(step: str, source: Path, target: Path) -> dict:
    """One step in a fresh process."""
    drop_from_cache(source)
    command = [sys.executable, __file__, "--step", step, str(source), str(target)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_step(step: str, source: Path, target: Path) -> dict:
    """Seconds, and the peak of this process's memory beyond what it had before."""
    before = peak_bytes()
    started = time.perf_counter()
    if step == "copy":
        copy(source, target)
    else:
        convert(source, target)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "peak_bytes": peak_bytes() - before, "process_peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The largest resident memory of this process since it began (getrusage's would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def copy(source: Path, target: Path) -> None:
    """Copy all files of a folder as a converter would: in pieces, to the disk."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb", buffering=0) as file, open(target / path.relative_to(source), "wb", buffering=0) as out:
            shutil.copyfileobj(file, out, COPY_PIECE_BYTES)
            os.fsync(out.fileno())


def drop_from_cache(folder: Path) -> None:
    """Make the next reader of these files read the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
