"""Prints what training costs on 8 to 1024 GPUs: the tables of docs/scaling.md.

python experiments/scaling/table.py                             # the 8B and the 56B
python experiments/scaling/table.py nemotron-h-47b 3-nano-4b
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from formulas import (
    Plan,
    activation_bytes,
    flops_per_gpu,
    fsdp_bytes_sent,
    gathered_bytes,
    state_bytes,
    tensor_parallel_bytes_sent,
    working_bytes,
)

from nemotron_h_hf import NemotronHConfig

GPU_BYTES, USABLE = 80e9, 0.9  # a tenth is left to what is not counted: gradients inside a block, buffers, fragments
FLOPS, NVLINK, NETWORK = 400e12, 450e9, 50e9  # assumed: 40 % of an H100's bfloat16 peak; bytes/s each way, per GPU
GPUS_PER_MACHINE = 8


def table(config: NemotronHConfig, gpus: Sequence[int] = (8, 64, 512, 1024)) -> str:
    """Markdown: every number of GPUs with each tensor-parallel degree that divides the batch; GB are 10^9 bytes."""
    lines = [
        "| GPUs | T | passes | states | gathered | activations: all, checkpointed | peak: all, checkpointed | fits "
        "| FSDP sent | T sent | compute | FSDP | T |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for num_gpus in gpus:
        for degree in (1, 2, 4, 8):
            plan = Plan(num_gpus // degree, degree)
            if plan.tokens_per_step % (plan.data_parallel * plan.tokens_per_pass) == 0:
                lines.append(_row(config, num_gpus, plan))
    return "\n".join(lines)


def _row(config: NemotronHConfig, num_gpus: int, plan: Plan) -> str:
    everything = replace(plan, checkpointing=False)
    fixed = sum(state_bytes(config, plan).values()) + gathered_bytes(config, plan)
    kept = [activation_bytes(config, p) for p in (everything, plan)]
    peaks = [fixed + held + working_bytes(config, p) for held, p in zip(kept, (everything, plan))]
    fits = "yes" if peaks[0] <= USABLE * GPU_BYTES else "checkpointed" if peaks[1] <= USABLE * GPU_BYTES else "no"
    chosen = everything if fits == "yes" else plan
    fsdp, tensor = sum(fsdp_bytes_sent(config, chosen).values()), tensor_parallel_bytes_sent(config, chosen)
    fsdp_rate = NVLINK if num_gpus <= GPUS_PER_MACHINE else NETWORK
    giga = [f"{value / 1e9:,.1f}" for value in (sum(state_bytes(config, plan).values()), gathered_bytes(config, plan))]
    pairs = [", ".join(f"{value / 1e9:,.1f}" for value in values) for values in (kept, peaks)]
    sent = [f"{value / 1e9:,.0f}" for value in (fsdp, tensor)]
    seconds = [f"{s:,.1f} s" for s in (flops_per_gpu(config, chosen) / FLOPS, fsdp / fsdp_rate, tensor / NVLINK)]
    cells = [str(num_gpus), str(plan.tensor_parallel), str(plan.passes), *giga, *pairs, fits, *sent, *seconds]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of each preset named, the paper's 8B and 56B by default."""
    for name in (sys.argv[1:] if argv is None else argv) or ("nemotron-h-8b", "nemotron-h-56b"):
        print(f"{name}\n\n{table(NemotronHConfig.from_preset(name))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
