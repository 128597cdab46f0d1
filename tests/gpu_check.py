"""The check of our Triton kernels that takes a GPU: `make test-gpu`, or `python tests/gpu_check.py --output FILE.json`.

Runs tests/model/test_triton.py and tests/model/test_decode_graph.py compiled on the GPU instead of interpreted, then times each op at
the shapes of an 8B layer in bf16: PyTorch, mamba_ssm and causal_conv1d where they are installed, ours. Nothing is timed
whose result differs from PyTorch's in fp32. Exits with 1 where a test fails or an op of ours is wrong, with 2 where there is
no GPU; it then writes nothing.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
HEADS, HEAD_DIM, GROUPS, STATE, TAPS = 128, 64, 8, 128, 4  # of Nemotron-H 8B
INNER, WIDTH = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE
LENGTH, BATCH = 8192, 64  # tokens of a prefill or training row; rows of a decoding step
WORST = 3e-2  # largest difference in bf16 as a share of the largest value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results; replaced if it is there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: this check runs the Triton kernels compiled, which takes one. Without: make test-kernels")
        return 2
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--timeout=900",
        "tests/model/test_triton.py",
        "tests/model/test_decode_graph.py",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    passed = subprocess.run(tests, cwd=ROOT, env=environment).returncode == 0
    result = {"tests_passed": passed, **machine(), "shapes": f"8B layer, bf16, {LENGTH} tokens; steps of {BATCH} rows"}
    result["ops"] = timings() if passed else {}
    unfinished = arguments.output.with_suffix(".partial")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(arguments.output)
    print(f"wrote {arguments.output}")
    return 0 if passed and all(rows["triton"]["right"] for rows in result["ops"].values()) else 1


def machine() -> dict[str, str]:
    versions = {}
    for name in ("torch", "triton", "mamba_ssm", "causal_conv1d"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    today = datetime.date.today().isoformat()
    return {"date": today, "gpu": torch.cuda.get_device_name(), "python": platform.python_version(), **versions}


def timings() -> dict[str, dict[str, dict[str, object]]]:
    """op -> implementation -> median, 20th and 80th percentile in milliseconds, and whether the result is right."""
    from nemotron_h_hf.model import kernels

    names = ["torch", *(["kernels"] if all(kernels.available().values()) else []), "triton"]
    table: dict[str, dict[str, dict[str, object]]] = {}
    for op, (call, inputs) in {**sequence_ops(), **step_ops()}.items():
        wanted = call("torch", *(t.float() for t in inputs))
        for name in names:
            table.setdefault(op, {})[name] = timed(partial(call, name, *inputs), wanted)
            print(op, name, table[op][name], flush=True)
    return table


def timed(call: Callable[[], tuple[Tensor, ...]], wanted: tuple[Tensor, ...]) -> dict[str, object]:
    import triton.testing

    worst = max(float((o.float() - w).abs().max() / w.abs().max()) for o, w in zip(call(), wanted, strict=True))
    if not worst <= WORST:
        return {"right": False, "error": worst}
    median, low, high = triton.testing.do_bench(call, warmup=100, rep=500, quantiles=[0.5, 0.2, 0.8])
    return {"right": True, "error": worst, "median_ms": median, "p20_ms": low, "p80_ms": high}


def sequence_ops() -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]]:
    """Forward, and forward with backward, over LENGTH tokens."""
    from nemotron_h_hf.model import kernels

    def conv(name, x, weight, bias):
        return (kernels.causal_conv(x, weight, bias, None, None, name),)

    def scan(name, x, dt, A, B, C, D):
        return kernels.scan(x, dt.float(), A.float(), B, C, D.float(), 128, None, None, name)

    def norm(name, x, gate, weight):
        return (kernels.gated_norm(x, gate, weight, INNER // GROUPS, 1e-5, name),)

    def backward(op):
        def call(name, *inputs):
            leaves = [t.detach().requires_grad_() for t in inputs]
            out = op(name, *leaves)[0]
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        return call

    x, dt, A, B, C, D = scan_inputs((1, LENGTH))
    inputs = {
        "conv": (conv, [normal(1, LENGTH, WIDTH), normal(WIDTH, TAPS), normal(WIDTH)]),
        "scan": (scan, [x, dt, A, B, C, D]),
        "norm": (norm, [normal(1, LENGTH, INNER), normal(1, LENGTH, INNER), normal(INNER)]),
    }
    return {**inputs, **{f"{op} and backward": (backward(call), given) for op, (call, given) in inputs.items()}}


def step_ops() -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]]:
    """One token for BATCH rows. States are copied by each call, for all implementations alike."""
    from nemotron_h_hf.model import kernels, ssd

    @torch.no_grad()
    def scan_step(name, x, dt, A, B, C, D, state):
        return kernels.scan_step(x, dt.float(), A.float(), B, C, D.float(), state.float().clone(), name)

    @torch.no_grad()
    def whole(name, projected, conv_state, ssm_state, weight, bias, A_log, D, dt_bias, norm):
        conv_state, ssm_state = conv_state.clone(), ssm_state.float().clone()
        if name == "triton":
            states, conv, heads = (conv_state, ssm_state), (weight, bias), (A_log, D, dt_bias)
            limit = 0.0, float("inf")
            return (kernels.whole_step(projected, states, conv, heads, (norm, 1e-5), GROUPS, limit, name),)
        gate, conv_in, dt = projected.split([INNER, WIDTH, HEADS], dim=-1)
        out, _ = kernels.conv_step(conv_in, conv_state, weight, bias, name)
        x, B, C = out.split([INNER, GROUPS * STATE, GROUPS * STATE], dim=-1)
        x, B, C = x.unflatten(-1, (HEADS, -1)), B.unflatten(-1, (GROUPS, -1)), C.unflatten(-1, (GROUPS, -1))
        dt, A = ssd.discretize(dt, dt_bias, (0.0, float("inf"))), -A_log.float().exp()
        y, _ = kernels.scan_step(x, dt, A, B, C, D, ssm_state, name)
        return (kernels.gated_norm(y.flatten(-2), gate, norm, INNER // GROUPS, 1e-5, name),)

    ssm_state = normal(BATCH, HEADS, HEAD_DIM, STATE)
    layer = [normal(BATCH, INNER + WIDTH + HEADS), normal(BATCH, WIDTH, TAPS), ssm_state, normal(WIDTH, TAPS)]
    layer += [normal(WIDTH), normal(HEADS), normal(HEADS), normal(HEADS), normal(INNER)]
    return {"scan step": (scan_step, [*scan_inputs((BATCH,)), ssm_state]), "whole step": (whole, layer)}


def scan_inputs(rows: tuple[int, ...]) -> list[Tensor]:
    B, C = normal(*rows, GROUPS, STATE) / STATE**0.5, normal(*rows, GROUPS, STATE)
    return [
        normal(*rows, HEADS, HEAD_DIM),
        normal(*rows, HEADS).sigmoid() / 10,
        -normal(HEADS).exp(),
        B,
        C,
        normal(HEADS),
    ]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
