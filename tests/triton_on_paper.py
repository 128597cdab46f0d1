"""Compiles what our Triton functions launch, for an H200, on a machine without a GPU; nothing runs.

`python tests/triton_on_paper.py compile SHAPE` calls the forward and backward passes and the steps on CPU tensors of that
shape, with launches replaced by compilations, and prints a line of JSON for each kernel: warps, registers, bytes of stack
(spilled registers) and of shared memory. `... variants` compiles nothing and prints how many variants of each kernel the calls of one
length ask for, then those of many lengths.
"""

import json
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from nemotron_h_hf.model import triton_conv, triton_decode, triton_norm, triton_scan

# heads, head_dim, groups, state: of the 8B and the 56B model, of Nano v2 9B; a group each, and "tiny" for `variants`
SHAPES = {"8b": (16, 64, 1, 128), "56b": (32, 64, 1, 256), "nano": (16, 80, 1, 128), "tiny": (16, 16, 2, 16)}


def main() -> None:
    mode, *rest = sys.argv[1:]
    pretend()
    if mode == "compile":
        dtype = torch.float32 if rest[1:] == ["fp32"] else torch.bfloat16
        JITFunction.run = compile_instead
        call_all(*SHAPES[rest[0]], length=256, dtype=dtype)
    else:
        seen: dict[str, set[str]] = {}
        JITFunction._do_compile = note_variant(seen)
        for number, length in enumerate((100, 1, 2, 16, 31, 64, 65, 256, 1000, 1024)):
            call_all(*SHAPES["tiny"], length=length, dtype=torch.bfloat16)
            if number == 0:
                print(json.dumps({name: len(variants) for name, variants in seen.items()}))
        print(json.dumps({name: len(variants) for name, variants in seen.items()}))


def pretend() -> None:
    """A driver of an H200 that can be asked what it is and nothing else; autotuners take their first configuration."""
    device = types.SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_active_torch_device=lambda: torch.device("cpu"),
    )  # fmt: skip
    driver.set_active(device)
    Autotuner.run = lambda self, *args, **kwargs: self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


def compile_instead(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
    """JITFunction.run without the launch."""
    kwargs |= {"debug": False, "instrumentation_mode": "", "fpsan_homomorphic_casts": False}
    caches = self.device_caches[0]
    bound, specialization, options = caches[-1](*args, **kwargs)
    options, signature, constants, attributes = self._pack_args(caches[-2], kwargs, bound, specialization, options)
    source = self.ASTSource(self, signature, constants, attributes)
    compiled = triton.compile(source, target=caches[-3], options=options.__dict__)
    report(self.__name__, compiled)


def report(name: str, compiled) -> None:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr)}
    line = {"kernel": name, "warps": compiled.metadata.num_warps, "stages": compiled.metadata.num_stages}
    line |= {"registers": used["REG"], "stack_bytes": used["STACK"], "shared_bytes": compiled.metadata.shared}
    print(json.dumps(line | {"tensor_cores": compiled.asm["ptx"].count("wgmma.mma_async")}), flush=True)


def note_variant(seen: dict[str, set[str]]):
    def compile_nothing(self: JITFunction, key, signature, device, constexprs, options, attrs, warmup):
        seen.setdefault(self.__name__ + str(constexprs.get("GRADIENT", "")), set()).add(str(key))
        return None  # as after a compilation that is still running: the launch is left out

    return compile_nothing


def call_all(h: int, p: int, g: int, n: int, length: int, dtype: torch.dtype) -> None:
    """Every launch of a training step, of a prefill and of a decoding step, on tensors laid out as in the model."""
    d, rows = h * p + 2 * g * n, torch.zeros(2, length, dtype=torch.int32)
    projected = torch.zeros(2, length, h * p + d + h, dtype=dtype, requires_grad=True)
    gate, conv_in, _ = projected.split([h * p, d, h], dim=-1)
    weight, bias, norm = torch.zeros(d, 4, dtype=dtype), torch.zeros(d, dtype=dtype), torch.zeros(h * p, dtype=dtype)
    A, D, dt = torch.zeros(h), torch.zeros(h), torch.zeros(2, length, h)
    conv_state, ssm_state = torch.zeros(2, d, 4, dtype=dtype), torch.zeros(2, h, p, n)
    for train in (True, False):
        with torch.set_grad_enabled(train):
            out = triton_conv.causal_conv(conv_in, weight, bias, None if train else conv_state, rows if train else None)
            x, B, C = out.split([h * p, g * n, g * n], dim=-1)
            x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
            y, _ = triton_scan.scan(x, dt, A, B, C, D, 128, None if train else ssm_state, rows if train else None)
            out = triton_norm.gated_norm(y.flatten(-2), gate, norm, h // g * p, 1e-5)
            if train:
                out.sum().backward()
    with torch.no_grad():
        token, conv, heads = projected[:, 0], (weight, bias), (A, D, A)
        triton_decode.step(token, conv_state, ssm_state, conv, heads, (norm, 1e-5), g, (0.0, float("inf")))
        triton_conv.conv_step(conv_in[:, 0], conv_state, weight, bias)
        triton_decode.scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, ssm_state)


if __name__ == "__main__":
    main()
