"""kernels.py: who computes an op, and whether the kernel packages compute the same as ssd.py.

The first half runs everywhere: a tensor subclass that says it is on a GPU shows which way a call goes. The second
half, marked `kernels`, runs the packages themselves on CPU tensors (see kernel_stubs.py): `make test-kernels`.
"""

import logging

import kernel_stubs
import pytest
import torch
from tiny import prompt, tiny_config, tiny_model
from torch import Tensor, nn

from nemotron_h_hf import HybridCache, NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.model import kernels, ssd

NAMES = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "rmsnorm_fn",
    "selective_state_update",
    "mamba_chunk_scan_combined",
)
TOLERANCE = 1e-5  # of the largest value
needs_packages = pytest.mark.skipif(kernel_stubs.why_not() is not None, reason=str(kernel_stubs.why_not()))


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU, as all results of its ops do."""

    is_cuda = True


@pytest.fixture
def absent(monkeypatch):
    for name in NAMES:
        monkeypatch.setattr(kernels, name, None)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Stand-ins for the packages that note their names and compute with ssd.py, on CPU tensors as on others."""
    made: list[str] = []

    def conv(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        made.append("causal_conv1d_fn")
        state = None if initial_states is None else nn.functional.pad(initial_states, (1, 0))
        return ssd.causal_conv(x.transpose(1, 2), weight, bias, state, seq_idx).transpose(1, 2)

    def conv_step(x, state, weight, bias=None, activation=None):
        made.append("causal_conv1d_update")
        out, after = ssd.conv_step(x, state, weight, bias)
        state.copy_(after)
        return out

    def norm(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        made.append("rmsnorm_fn")
        return ssd.gated_norm(x, z, weight, group_size, eps)

    def step(state, x, dt, A, B, C, D=None, z=None, dt_bias=None):
        made.append("selective_state_update")
        y, after = ssd.scan_step(x, dt[..., 0], A[:, 0, 0], B, C, D[:, 0], state)
        state.copy_(after)
        return y

    def scan(x, dt, A, B, C, chunk_size, D=None, initial_states=None, seq_idx=None, return_final_states=False):
        made.append("mamba_chunk_scan_combined")
        return ssd.scan(x, dt, A, B, C, D, chunk_size, initial_states, seq_idx)

    for name, function in zip(NAMES, (conv, conv_step, norm, step, scan), strict=True):
        monkeypatch.setattr(kernels, name, function)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return made


@pytest.fixture
def warnings_seen() -> list[str]:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    kernels.logger.addHandler(handler)
    type(kernels.logger).warning_once.cache_clear()
    yield seen
    kernels.logger.removeHandler(handler)


def operands(batch: int = 2, length: int = 5, heads: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of the ops, with 2 groups, head_dim 8, state 16; x, B and C are views of one tensor, as in the model."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    p, g, n = 8, 2, 16
    fed = normal(batch, length, heads * p + 2 * g * n).to(dtype)
    x, B, C = fed.split([heads * p, g * n, g * n], dim=-1)
    dt = torch.rand(batch, length, heads, generator=generator)
    return {
        "x": x.unflatten(-1, (heads, p)), "dt": dt, "A": -4 * torch.rand(heads, generator=generator),
        "B": B.unflatten(-1, (g, n)), "C": C.unflatten(-1, (g, n)), "D": normal(heads),
        "state": normal(batch, heads, p, n),
    }  # fmt: skip


def one_token(values: dict[str, Tensor]) -> list[Tensor]:
    first = {name: t[:, 0] if name in ("x", "dt", "B", "C") else t for name, t in values.items()}
    return [first[name] for name in ("x", "dt", "A", "B", "C", "D", "state")]


def error(ours: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    ours, expected = ours.detach().double(), expected.detach().double()
    return float((ours - expected).abs().max() / expected.abs().max())


# Who computes


def test_auto_on_a_cpu_is_pytorch(calls):
    model = tiny_model("dense")
    assert model.config.mamba_implementation == "auto"
    model(prompt())
    assert calls == []


def test_the_switch_reaches_every_layer_and_back(calls):
    model = tiny_model("dense")
    layers = model.config.layers_block_type.count("linear_attention")
    expected = model(prompt()).logits
    model.set_mamba_implementation("kernels")
    torch.testing.assert_close(model(prompt()).logits, expected)
    assert sorted(set(calls)) == ["causal_conv1d_fn", "mamba_chunk_scan_combined", "rmsnorm_fn"]
    assert calls.count("mamba_chunk_scan_combined") == calls.count("rmsnorm_fn") == layers
    calls.clear()
    model.set_mamba_implementation("torch")
    model(prompt())
    assert calls == []


def test_the_configuration_chooses(calls):
    model = NemotronHForCausalLM(tiny_config("attention_free", mamba_implementation="kernels"))
    model(prompt())
    assert "mamba_chunk_scan_combined" in calls


@pytest.mark.parametrize("implementation,expected", [("torch", []), ("auto", ["selective_state_update"])])
def test_on_a_gpu_torch_never_calls_kernels_and_auto_does(calls, implementation, expected):
    inputs = [t.as_subclass(OnGpu) for t in one_token(operands())]
    y, state = kernels.scan_step(*inputs, implementation)
    assert calls == expected
    want_y, want_state = ssd.scan_step(*one_token(operands()))
    torch.testing.assert_close(y.as_subclass(Tensor), want_y)
    torch.testing.assert_close(state.as_subclass(Tensor), want_state)


def test_auto_decides_op_by_op(calls, monkeypatch, warnings_seen):
    monkeypatch.setattr(kernels, "causal_conv1d_fn", None)
    x = torch.randn(1, 6, 16).as_subclass(OnGpu)
    kernels.causal_conv(x, torch.randn(16, 4), None, None, None, "auto")
    kernels.gated_norm(x, x, torch.ones(16), 8, 1e-5, "auto")
    assert calls == ["rmsnorm_fn"]
    assert len(warnings_seen) == 1 and "causal_conv1d is not installed" in warnings_seen[0]


@pytest.mark.parametrize("implementation", ["torch", "kernels"])
def test_a_scan_step_updates_its_state_in_place(calls, implementation):
    inputs = one_token(operands())
    before = inputs[-1].clone()
    with torch.no_grad():
        _, after = kernels.scan_step(*inputs, implementation)
    assert after is inputs[-1]
    assert not torch.equal(after, before)


def test_a_scan_step_with_gradients_leaves_its_state_alone():
    inputs = one_token(operands())
    before = inputs[-1].clone()
    kernels.scan_step(*inputs, "torch")
    torch.testing.assert_close(inputs[-1], before)


def test_a_conv_step_leaves_its_state_alone(calls):
    state = torch.randn(2, 16, 4)
    before = state.clone()
    _, after = kernels.conv_step(torch.randn(2, 16), state, torch.randn(16, 4), None, "kernels")
    torch.testing.assert_close(state, before)
    assert not torch.equal(after, before)


def test_a_slow_path_on_a_gpu_warns_once(absent, warnings_seen):
    x = torch.randn(1, 6, 16).as_subclass(OnGpu)
    for _ in range(3):
        kernels.gated_norm(x, x, torch.ones(16), 8, 1e-5, "auto")
    assert len(warnings_seen) == 1
    assert "slower" in warnings_seen[0] and kernels.INSTALL in warnings_seen[0]


def test_a_slow_path_that_was_asked_for_does_not_warn(absent, warnings_seen):
    x = torch.randn(1, 6, 16)
    kernels.gated_norm(x.as_subclass(OnGpu), x, torch.ones(16), 8, 1e-5, "torch")
    kernels.gated_norm(x, x, torch.ones(16), 8, 1e-5, "auto")
    assert warnings_seen == []


def test_kernels_that_are_missing_are_named(absent):
    model = tiny_model("attention_free")
    with pytest.raises(ImportError, match="causal_conv1d and mamba_ssm; pip install .*mamba-ssm causal-conv1d"):
        model.set_mamba_implementation("kernels")
    assert model.config.mamba_implementation == "auto"
    model(prompt())
    with pytest.raises(ImportError, match="mamba_implementation='kernels'"):
        NemotronHForCausalLM(tiny_config("attention_free", mamba_implementation="kernels"))


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="mamba_implementation='cuda'.*auto, torch, kernels"):
        tiny_model("attention_free").set_mamba_implementation("cuda")
    with pytest.raises(ValueError, match="mamba_implementation='cuda'.*auto, torch, kernels"):
        NemotronHConfig(mamba_implementation="cuda")


def test_kernels_on_a_cpu_are_refused(calls, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="run on CUDA tensors, this one is on cpu"):
        kernels.scan_step(*one_token(operands()), "kernels")


def beyond_the_kernels() -> dict[str, tuple]:
    """Calls that a kernel cannot do: what the message says, the op, its arguments."""
    x, rows = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.long)
    values = operands()
    values["dt"].requires_grad_()
    taps, odd = nn.Parameter(torch.randn(16, 4)), (x[..., :12], torch.randn(12, 4))
    wide = torch.randn(1, 16400)
    return {
        "float64": ("no kernels for torch.float64", "gated_norm", (x.double(), x.double(), torch.ones(16), 8, 1e-5)),
        "five taps": ("2 to 4 taps, conv_kernel=5", "causal_conv", (x, torch.randn(16, 5), None, None, None)),
        "channels": ("multiples of 8, there are 12", "causal_conv", (*odd, None, None, None)),
        "both": ("a state or documents", "causal_conv", (x, torch.randn(16, 4), None, torch.randn(2, 16, 4), rows)),
        "conv gradient": ("has no backward pass", "conv_step", (x[:, 0], torch.randn(2, 16, 4), taps, None)),
        "step gradient": ("has no backward pass", "scan_step", tuple(one_token(values))),
        "norm width": ("groups up to 65536 bytes", "gated_norm", (wide, wide, torch.ones(16400), 16400, 1e-5)),
    }  # fmt: skip


@pytest.mark.parametrize("case", beyond_the_kernels())
def test_what_a_kernel_cannot_do(calls, warnings_seen, case):
    message, op, args = beyond_the_kernels()[case]
    with pytest.raises(RuntimeError, match=message):
        getattr(kernels, op)(*args, "kernels")
    on_gpu = (args[0].as_subclass(OnGpu), *args[1:])
    result = getattr(kernels, op)(*on_gpu, "auto")
    assert calls == [] and len(warnings_seen) == 1 and message in warnings_seen[0]
    torch.testing.assert_close(result, getattr(kernels, op)(*on_gpu, "torch"))


# What the packages compute


@pytest.fixture(scope="module")
def packages() -> dict[str, object]:
    return kernel_stubs.load()


@pytest.fixture
def real(packages, monkeypatch):
    """The packages' own functions, on CPU tensors; falling back to PyTorch is a failure."""

    def fell_back(*_: object, **__: object) -> None:
        raise AssertionError("fell back to PyTorch")

    for name, function in packages.items():
        monkeypatch.setattr(kernels, name, function)
    for name in ("torch_scan", "torch_scan_step", "torch_causal_conv", "torch_conv_step", "torch_gated_norm"):
        monkeypatch.setattr(kernels, name, fell_back)
    with kernel_stubs.pretend_device():
        yield


def compare(ours, expected, inputs: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """Outputs and gradients of `ours(*inputs)` against `expected` on float64 copies."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, want = ours(*leaves), expected(*wide)
    seeds = [torch.randn(t.shape, generator=torch.Generator().manual_seed(7)) for t in want]
    found = torch.autograd.grad([(o.float() * s).sum() for o, s in zip(out, seeds, strict=True)], leaves)
    wanted = torch.autograd.grad([(o * s).sum() for o, s in zip(want, seeds, strict=True)], wide)
    errors = [error(o, w) for o, w in zip([*out, *found], [*want, *wanted], strict=True)]
    print("errors of outputs and gradients:", " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) <= tolerance


SCANS = {
    "plain": {"length": 37},
    "state": {"length": 19, "state": True},
    "documents": {"length": 37, "documents": [5, 16, 16]},
    "state and documents": {"length": 23, "state": True, "documents": [5, 18]},
    "padding": {"length": 20, "state": True, "padding": 7},
    "odd chunks": {"length": 20, "chunk": 12, "state": True},
    "chunk beyond the length": {"length": 9, "chunk": 100},
    "one token": {"length": 1, "state": True},
}


@pytest.mark.kernels
@needs_packages
@pytest.mark.parametrize("case", SCANS)
def test_scan(real, case):
    chosen = {"chunk": 16, "state": False, "documents": [], "padding": 0, **SCANS[case]}
    values = operands(batch=2, length=chosen["length"])
    if chosen["padding"]:
        values["dt"][1, -chosen["padding"] :] = 0
    documents = None
    if chosen["documents"]:
        starts = torch.zeros(2, chosen["length"], dtype=torch.long)
        for row, place in ((0, 0), (0, 1), (1, -1)):
            starts[row, chosen["documents"][place]] = 1
        documents = starts.cumsum(1) + 3  # the first document has any number

    def run(scan, *extra):
        def called(x, dt, A, B, C, D, state=None):
            return scan(x, dt, A, B, C, D, chosen["chunk"], state, documents, *extra)

        return called

    names = ["x", "dt", "A", "B", "C", "D"] + ["state"] * chosen["state"]
    compare(run(kernels.scan, "kernels"), run(ssd.scan), [values[name] for name in names])


@pytest.mark.kernels
@needs_packages
def test_scan_in_half_precision(real):
    values = operands(length=18, dtype=torch.float16)  # the interpreter cannot multiply bfloat16 matrices
    args = [values[name] for name in ("x", "dt", "A", "B", "C", "D")]
    y, state = kernels.scan(*args, 16, values["state"], None, "kernels")
    want_y, want_state = ssd.scan(*(t.double() for t in args), 16, values["state"].double(), None)
    assert y.dtype == torch.float16 and state.dtype == torch.float32
    assert error(y, want_y) <= 1e-2 and error(state, want_state) <= 1e-2


@pytest.mark.kernels
@needs_packages
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, TOLERANCE), (torch.bfloat16, 1e-2)])
def test_scan_step(real, dtype, tolerance):
    inputs = one_token(operands(batch=3, dtype=dtype))
    want_y, want_state = ssd.scan_step(*(t.double() for t in inputs))
    y, state = kernels.scan_step(*inputs, "kernels")
    assert y.dtype == dtype and state.dtype == torch.float32
    assert error(y, want_y) <= tolerance and error(state, want_state) <= TOLERANCE
    assert state is inputs[-1]  # updated in place, as by `ssd.scan_step`


@pytest.mark.kernels
@needs_packages
@pytest.mark.parametrize("shape", [(2, 9), (3,)])
def test_gated_norm(real, shape):
    both = torch.randn(*shape, 96 + 96 + 5)  # the gate is a view with rows of another width
    x, gate, weight = torch.randn(*shape, 96), both[..., :96], torch.rand(96) + 0.5
    compare(
        lambda *args: (kernels.gated_norm(*args, 24, 1e-5, "kernels"),),
        lambda *args: (ssd.gated_norm(*args, 24, 1e-5),),
        [x, gate, weight],
    )


@pytest.mark.kernels
@needs_packages
@pytest.mark.parametrize("width", [40, 43], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("given", ["nothing", "state", "documents", "one token"])
def test_causal_conv(real, width, given):
    batch, length = (1, 1) if given == "one token" else (2, 11)
    x = torch.randn(batch, length, width)[..., width - 24 :]  # a view, as of in_proj's output
    state = torch.randn(batch, 24, 4) if given == "state" else None
    documents = (torch.arange(length) > 4).long().expand(batch, -1) if given == "documents" else None

    def run(conv, *extra):
        # detaching keeps the view's strides
        return lambda x, weight, bias: (
            conv(x, weight, bias, None if state is None else state.to(x.dtype), documents, *extra),
        )

    compare(run(kernels.causal_conv, "kernels"), run(ssd.causal_conv), [x, torch.randn(24, 4), torch.randn(24)])


@pytest.mark.kernels
@needs_packages
@pytest.mark.parametrize("dtype,state_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_conv_step(real, dtype, state_dtype):
    x, state = torch.randn(3, 24).to(dtype), torch.randn(3, 24, 4).to(dtype).to(state_dtype)
    weight, bias = torch.randn(24, 4), torch.randn(24)
    out, after = kernels.conv_step(x, state, weight, bias, "kernels")
    want, want_after = ssd.conv_step(x.double(), state.double(), weight.double(), bias.double())
    assert out.dtype == dtype and after.dtype == state_dtype
    assert error(out, want) <= (TOLERANCE if dtype == torch.float32 else 2e-2)
    assert torch.equal(after.double(), want_after)


# The whole model on the packages


class Adapted(nn.Module):
    """A Linear with a low-rank addition, the shape of a LoRA layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def small_model(**overrides) -> nn.Module:
    return tiny_model(**{"hybrid_override_pattern": "M*-M", "mamba_num_heads": 4, "chunk_size": 16, **overrides})


@pytest.mark.kernels
@needs_packages
@pytest.mark.parametrize("heads", [4, 8], ids=["in_proj rows unaligned", "aligned"])
def test_training_with_an_adapter_on_out_proj(real, monkeypatch, heads):
    torch.manual_seed(0)
    model = small_model(mamba_num_heads=heads).train()
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.out_proj = Adapted(layer.mixer.out_proj)
    ids = prompt(1, 19)

    def gradients(implementation: str) -> dict[str, Tensor]:
        model.set_mamba_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    ours = gradients("kernels")
    monkeypatch.undo()
    plain = gradients("torch")
    model.double()
    want = gradients("torch")
    worst, worst_plain = (max(error(found[name], want[name]) for name in want) for found in (ours, plain))
    print(f"gradients: kernels {worst:.1e}, torch {worst_plain:.1e}")
    assert worst <= TOLERANCE
    adapters = [name for name in want if ".up." in name or ".down." in name]
    assert len(adapters) == 4 and all(ours[name].abs().max() > 0 for name in adapters)


@pytest.mark.kernels
@needs_packages
@torch.no_grad()
def test_padded_prefill_then_a_part_then_steps(real, monkeypatch):
    model, ids, mask = small_model(), prompt(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0

    def logits(implementation: str) -> Tensor:
        model.set_mamba_implementation(implementation)
        cache, parts = HybridCache(model.config), []
        for start, end in ((0, 11), (11, 21), (21, 22), (22, 23), (23, 24)):
            parts.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        return torch.cat(parts, dim=1)

    ours = logits("kernels")
    monkeypatch.undo()
    real_tokens = mask.bool()
    for expected in (logits("torch"), model(ids, attention_mask=mask).logits):
        print(f"logits {error(ours[real_tokens], expected[real_tokens]):.1e}")
        assert error(ours[real_tokens], expected[real_tokens]) <= TOLERANCE


@pytest.mark.kernels
@needs_packages
@torch.no_grad()
def test_packed_rows(real, monkeypatch):
    model, lengths = small_model(), [7, 3, 13]
    documents = [prompt(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    model.set_mamba_implementation("kernels")
    ours = model(torch.cat(documents, dim=1), position_ids=positions).logits
    monkeypatch.undo()
    model.set_mamba_implementation("torch")
    alone = torch.cat([model(ids).logits for ids in documents], dim=1)
    print(f"logits {error(ours, alone):.1e}")
    assert error(ours, alone) <= TOLERANCE
