"""Every training experiment at about a hundredth of its size, so that its commands stay alive: `make evidence-quick`.

    python experiments/quick.py                        # all of them, into runs/quick
    python experiments/quick.py --only vision order

The figures mean nothing. An experiment that needs the text of another Python (experiments/tiny_order/text.py) is left out.
"""

import argparse
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from nemotron_h_hf import EMBEDDED_MODEL

HERE = Path(__file__).parent
TEXT_PYTHON = "3.11.7"  # whose library the text is


def commands(runs: Path) -> dict[str, list[str]]:
    """Name -> the commands of an experiment, without `python experiments/`."""
    order, box, claim, fp8, vision, hybrid, deep, context = (
        runs / name for name in ("order", "box", "claim", "fp8", "vision", "hybrid", "deep", "context")
    )
    text, docstrings = runs / "stdlib.jsonl.xz", runs / "docstrings"
    small_claim = f"--tokens 16384 --search-tokens 8192 --runs {claim} --output {claim / 'report'}"
    small_box = (
        f"--text {text} --docstrings {docstrings} --output {box} --device cpu --rows_per_step 4 --shuffle_rows 4 "
        "--pretrain_tokens 16384 --elastic_tokens 8192 --limit 1"
    )
    return {
        "order": [
            f"tiny_order/text.py --output {text}",
            f"tiny_order/run.py --text {text} --output {order} --device cpu --limit 1 --runs loop:0:8192 published:0:8192",
        ],
        "box": [
            f"tiny_order/text.py --output {text}",
            f"sft/make_data.py --output {docstrings}",
            f"tiny_box/run.py train {small_box}",
            f"tiny_box/run.py measure {small_box} --num_samples 2",
        ],
        "claim": [
            f"elastic_claim/run.py {step} {small_claim}"
            for step in (
                f"prepare --pretrained {EMBEDDED_MODEL}",
                "search --arm elastic --variants 'sandwich, live' --optimizers muon",
                "search --arm separate --optimizers adamw",
                "elastic",
                "separate --budget three_quarters",
                "separate",
                "report --seeds 0",
            )
        ],
        "fp8": [
            f"fp8/gap.py train --precision {precision} --seeds 0 --max-tokens 8192 --runs {fp8} --logs {fp8 / 'logs'}"
            for precision in ("bf16", "fp8", "fp8_all", "fp32")
        ],
        "hybrid": [
            f"hybrid_attention/run.py {step} --scale 0.011 --limit 1 --runs {hybrid} --output {hybrid / 'results'}"
            for step in ("rates", "seeds", "seeds --context 4096", "speed --contexts 256", "report")
        ],
        "vision": [
            f"tiny_vl/pictures.py {vision / 'data'} 50",
            f"tiny_vl/train.py {vision / 'data'} {vision / 'runs'} --variant tags --steps 9",
            f"tiny_vl/train.py {vision / 'data'} {vision / 'runs'} --variant attention --steps 9",
        ],
        "deep": [
            f"minipuzzle/deep.py {step} {deep} --tokens 41000 --seeds 0 --contexts 256 --output {deep / 'results'}"
            for step in ("teacher", "search", "long", "speed", "report")
        ],
        "context": [
            f"long_context/run.py {step} --tokens 41000 --questions 1 --samples 1 --lengths 1024 --seeds 0 --runs {context} "
            f"--output {context / 'results'}"
            for step in ("data", "train", "train --control", "ask", "tasks", "report")
        ],
        "speculation": [
            f"elastic_speculation/run.py --drafts 'width 50%' --draft-tokens 2 --new-tokens 8 --rounds 1 "
            f"--output {runs / 'speculation.json'}"
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = tuple(commands(Path()))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="experiments (all)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/quick"), help="where everything is written (runs/quick)"
    )
    arguments = parser.parse_args()
    runs, failed = arguments.runs.resolve(), []
    runs.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        if name in ("order", "box") and platform.python_version() != TEXT_PYTHON:
            print(f"{name}: left out, its text is the library of Python {TEXT_PYTHON}", flush=True)
            continue
        start, log = time.monotonic(), runs / f"{name}.log"
        done = all(run(command, log) for command in commands(runs)[name])
        print(f"{name}: {'ok' if done else f'failed, see {log}'}, {time.monotonic() - start:.0f} s", flush=True)
        failed += [] if done else [name]
    return 1 if failed else 0


def run(command: str, log: Path) -> bool:
    """Whether it ended well; what it says goes to the log."""
    script, *words = shlex.split(command)
    with log.open("a") as out:
        out.write(f"python experiments/{command}\n")
        out.flush()
        return not subprocess.run([sys.executable, str(HERE / script), *words], stdout=out, stderr=out).returncode


if __name__ == "__main__":
    sys.exit(main())
