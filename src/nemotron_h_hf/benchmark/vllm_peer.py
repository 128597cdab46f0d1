"""vLLM on a model of our shape with random weights, in a separate process; only where vLLM is installed.

    python -m nemotron_h_hf.benchmark.vllm_peer FOLDER ROWS TOKENS_IN TOKENS_OUT DTYPE

vLLM schedules the rows itself and chooses its largest batch. What it prints last is the JSON of its samples.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..model.configuration_nemotron_h import NemotronHConfig
from .models import name_of
from .records import Measurement

FIRST_TOKEN = 3  # ids below are special
NUM_RUNS = 1


def installed() -> bool:
    """Whether vLLM can be imported; it is not imported here."""
    return importlib.util.find_spec("vllm") is not None


def throughput(config: NemotronHConfig, dtype: torch.dtype, rows: int, tokens_in: int, tokens_out: int) -> Measurement:
    """Whole requests, `rows` of them handed over at once."""
    found = Measurement("throughput", "vllm", "its own schedule", rows, tokens_in)
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["NemotronHForCausalLM"]
        config.save_pretrained(folder)
        command = [sys.executable, "-m", __name__, folder, str(rows), str(tokens_in), str(tokens_out), name_of(dtype)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        found.failure = f"vLLM failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"
        return found
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    found.seconds, found.warm_up_seconds = answer["seconds"], answer["warm_up_seconds"]
    found.figures = {
        "output_tokens_per_second": rows * tokens_out / found.median,
        "all_tokens_per_second": rows * (tokens_in + tokens_out) / found.median,
    }
    return found


def main(folder: str, rows: int, tokens_in: int, tokens_out: int, dtype: str) -> dict[str, float | list[float]]:
    """The timing itself, in the child."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    engine = LLM(
        model=folder, load_format="dummy", skip_tokenizer_init=True, dtype=dtype, max_model_len=tokens_in + tokens_out
    )
    size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    prompts = [
        {"prompt_token_ids": torch.randint(FIRST_TOKEN, size, (tokens_in,)).tolist()} for _ in range(rows)
    ]  # all different: its prefix cache must not help
    params = SamplingParams(max_tokens=tokens_out, ignore_eos=True, temperature=0.0, detokenize=False)
    engine.generate([{"prompt_token_ids": [FIRST_TOKEN] * 16}], params)
    warm_up, seconds = time.perf_counter() - start, []
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        engine.generate(prompts, params)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "warm_up_seconds": warm_up}


if __name__ == "__main__":
    path, *sizes, kind = sys.argv[1:]
    print(json.dumps(main(path, *map(int, sizes), kind)))
