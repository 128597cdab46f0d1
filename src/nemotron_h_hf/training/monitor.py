"""What a run reports: a progress bar, metrics.jsonl, and the figures in both (tokens/s, MFU, memory).

MFU (model FLOPs utilisation) is the model's operations per second, divided by the rate at which this machine multiplies
large matrices in the same precision. That rate is measured and printed when training begins; it is not the one on the
device's data sheet.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from ..environment import peak_memory_bytes
from ..whole_files import write_text

METRICS_FILE = "metrics.jsonl"
MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}
MATRIX_SECONDS = 0.3
FIRST = ("step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "memory_bytes")


class Monitor(ProgressCallback):
    """Bar (the main process, on a terminal or not) and metrics.jsonl; `figures` goes into what is logged.

    Args:
        flops_per_token: of forward and backward; None leaves MFU out.
        show_bar: whether there is a progress bar.
    """

    def __init__(self, flops_per_token: float | None = None, show_bar: bool = True):
        super().__init__()
        self.flops_per_token, self.show_bar = flops_per_token, show_bar
        self.matrix_rate: float | None = None
        self._last: tuple[int, float] | None = None  # tokens seen and the time, at the last line
        self._log: TextIO | None = None

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state brings those of the earlier run; flags win
        self.current_step = state.global_step
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS_FILE
        forget_after(path, state.global_step or -1)  # a run from the start has nothing, not even of step 0
        self._log = path.open("a", encoding="utf-8")
        if self.flops_per_token is not None and self.matrix_rate is None:
            self._measure(args)
        if self.show_bar:
            super().on_train_begin(args, state, control, **kwargs)
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_step_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._last is None:
            self._last = (state.global_step * args.tokens_per_step, time.perf_counter())

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> TrainerControl:
        if control.should_save:
            control.should_log = True  # a resumed run then logs over the same steps as one that was never stopped
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)
        return control

    def on_save(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._last = None  # the time of writing is no training time

    def on_evaluate(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._last = None  # nor is that of evaluating
        super().on_evaluate(args, state, control, **kwargs)

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs) -> None:
        if self._log is None or not logs or "train_runtime" in logs:  # that is the summary at the end, no step
            return
        row = {"step": state.global_step, "tokens": state.global_step * args.tokens_per_step, **logs}
        if args.max_steps > 0:  # then it counts from where this process began
            row.pop("epoch", None)
        write_row(self._log, row)
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(describe(row))

    def on_train_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Close bar and file; more than once is fine."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def figures(self, args, state: TrainerState) -> dict[str, float]:
        """Tokens per second since the last line, over all processes; MFU; most memory in use so far on this one."""
        tokens, now = state.global_step * args.tokens_per_step, time.perf_counter()
        figures: dict[str, float] = {}
        if self._last is not None and tokens > self._last[0]:
            figures["tokens_per_second"] = (tokens - self._last[0]) / (now - self._last[1])
            if self.matrix_rate is not None:
                flops = figures["tokens_per_second"] * self.flops_per_token
                figures["mfu"] = flops / (self.matrix_rate * args.world_size)
        self._last = (tokens, now)
        return {**figures, "memory_bytes": peak_memory_bytes(args.device)}

    def _measure(self, args: TrainingArguments) -> None:
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.matrix_rate = measure_matrix_rate(args.device, dtype)
        size, name = MATRIX_SIZES.get(args.device.type, 4096), str(dtype).removeprefix("torch.")
        print(
            f"{size} x {size} matrices in {name} multiply at {self.matrix_rate / 1e12:.4g} TFLOP/s here; MFU is a share of "
            f"that. The model needs {self.flops_per_token / 1e9:.4g} GFLOP per token.",
            file=sys.stderr,
        )


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of products of two large square matrices, the best of several."""
    size = MATRIX_SIZES.get(device.type, 4096)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = a @ b  # warms up
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < MATRIX_SECONDS:
        start = time.perf_counter()
        torch.matmul(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def describe(row: dict[str, Any]) -> str:
    """The figures of a row as the progress bar shows them."""
    parts = [f"loss {row['loss']:.4f}"] if "loss" in row else []
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    if "memory_bytes" in row:
        parts.append(f"{row['memory_bytes'] / 2**30:.2f} GiB")
    return ", ".join(parts)


def write_row(log: TextIO, row: dict[str, Any]) -> None:
    """One line of metrics.jsonl, the best-known figures first."""
    ordered = {name: row[name] for name in FIRST if name in row} | row
    log.write(json.dumps(ordered) + "\n")
    log.flush()


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will repeat, and a line that was cut short."""
    if path.is_file():
        write_text(path, "".join(line for line in whole_lines(path) if json.loads(line)["step"] <= step))


def whole_lines(path: Path) -> Iterator[str]:
    """The lines of a log that end in a line break."""
    return (line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n"))
