"""Peak memory of the training losses in chunks against the same losses on whole logits: `losses.json` in docs/results/losses.

    python experiments/losses/measure.py [--positions 4096] [--vocab 32768] [--hidden 512]

Each case runs in its own process: hidden states and heads are made, then one loss with its gradients. What counts
is how far the kernel's peak of resident memory rises above what was resident just before. Linux.
"""

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_h_hf.benchmark.memory import footprint
from nemotron_h_hf.model.loss import next_token_loss
from nemotron_h_hf.training.losses import LiveTeacher, distillation_loss, top_k

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "losses"

KEPT = 64
CASES = ("next token, whole logits", "next token, in chunks", "distillation, whole logits", "distillation, in chunks",
         f"distillation, in chunks, kept top {KEPT}")  # fmt: skip


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("positions", 4096), ("vocab", 32768), ("hidden", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = vars(parser.parse_args())
    cases = {}
    for case in CASES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            extra_bytes, loss = pool.submit(measure, case, **sizes).result()
        cases[case] = {"peak_extra_bytes": extra_bytes, "loss": round(loss, 6)}
        print(f"{extra_bytes / 2**20:10.1f} MiB  {case}  (loss {loss:.6f})")
    report = {
        "command": f"python experiments/losses/measure.py {' '.join(f'--{name} {value}' for name, value in sizes.items())}",
        "what": "peak resident memory of one loss and its gradients beyond inputs and heads, float32",
        **sizes, "seed": 0, "one_logits_tensor_bytes": 4 * sizes["positions"] * sizes["vocab"],
        "torch": torch.__version__, "python": platform.python_version(), "cases": cases,
    }  # fmt: skip
    (RESULTS / "losses.json").write_text(json.dumps(report, indent=2) + "\n")


def measure(case: str, positions: int, vocab: int, hidden: int) -> tuple[int, float]:
    """Extra bytes at the peak, and the loss, of one case; in the process that is there for it alone."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = torch.randn(1, positions, hidden, requires_grad=True)
    teacher = torch.randn(1, positions, hidden)
    heads = [nn.Linear(hidden, vocab, bias=False) for _ in range(2)]
    labels = torch.randint(0, vocab, (1, positions))
    kept = top_k(teacher, heads[1], vocab, KEPT)
    losses = {
        CASES[0]: lambda: whole_next_token(heads[0](student), labels),
        CASES[1]: lambda: next_token_loss(student, heads[0], vocab, labels),
        CASES[2]: lambda: whole_distillation(heads[0](student), heads[1], teacher, labels),
        CASES[3]: lambda: distillation_loss(student, heads[0], labels, vocab, LiveTeacher(teacher, heads[1])).loss,
        CASES[4]: lambda: distillation_loss(student, heads[0], labels, vocab, kept).loss,
    }
    found = []

    def job() -> None:
        loss = losses[case]()
        loss.backward()
        found.append(loss.item())

    return footprint(job).extra_bytes, found[0]


def whole_next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """The plain loss."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def whole_distillation(logits: Tensor, teacher_head: nn.Module, teacher: Tensor, labels: Tensor) -> Tensor:
    """The plain KL; `labels` only say which positions count, all here."""
    with torch.no_grad():
        log_p = teacher_head(teacher).log_softmax(-1)[:, :-1]
    return (
        F.kl_div(logits.log_softmax(-1)[:, :-1], log_p, reduction="none", log_target=True).sum() / labels[0, 1:].numel()
    )


if __name__ == "__main__":
    main()
