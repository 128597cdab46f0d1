"""`nemotron-h bench cpu`: its gate, its figures on a tiny model, its files. How fast anything is, no test can tell."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

import nemotron_h_cli as cli
from nemotron_h_hf.benchmark import cpu_suite, devices, gate, linears, memory, models, records, turns
from nemotron_h_hf.model import mamba2, token
from nemotron_h_hf.model.loading import plain_parts

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    """Rates of memory that is quickly copied; the code is the same."""
    monkeypatch.setitem(devices.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(devices.MATRIX_SIZE, "cpu", 32)


@pytest.fixture
def ours() -> models.Side:
    return models.build_ours(models.read_config("tiny", None), torch.float32, CPU)


def quick(prefix, *options: str) -> int:
    return cli.main(["bench", "cpu", "--quick", "--runs", "1", "--threads", "1", "--output", str(prefix), *options])


def some_bench() -> turns.Bench:
    return turns.Bench(CPU, torch.float32, devices.Rates(1e9, 1e9), 3, None, lambda _: None)


@pytest.mark.slow
def test_quick_run_writes_json_plot_and_table(tmp_path, capsys):
    prefix = tmp_path / "results" / "cpu"
    assert quick(prefix) == 0
    document = json.loads(prefix.with_name("cpu.json").read_text())
    assert document["command"].startswith("nemotron-h bench cpu --quick") and document["finished"]
    assert document["versions"]["torch"] == torch.__version__ and document["machine"]["cores"] > 0
    assert document["settings"]["runs"] == 1 and document["settings"]["model"] == "tiny"
    found = {(m["part"], m["side"], m["variant"], m["context"]): m for m in document["measurements"]}
    parts = [part for part, *_ in found]
    assert list(dict.fromkeys(parts)) == ["decode", "prefill", "train", "memory"]
    assert {side for part, side, *_ in found if part == "train"} == {"linear", "ours", "native"}
    assert {context for part, _, _, context in found if part == "prefill"} == {32, 96}
    variants = {variant for part, side, variant, _ in found if part == "decode" and side == "ours"}
    assert {"float32", "int8: torchao", f"int8: {cpu_suite.INT8_HEAD}", "bf16: bfloat16"} <= variants
    assert sum("threads" in variant for variant in variants) == 6
    rounds = cpu_suite.DECODE_ROUNDS * cpu_suite.QUICK.steps
    assert all(
        len(m["seconds"]) == rounds and min(m["seconds"]) > 0 for (part, *_), m in found.items() if part == "decode"
    )
    # a step's gradients have the size of the weights, and no side can take less
    config = models.read_config("tiny", None)
    weight_bytes = 4 * sum(p.numel() for p in models.build_ours(config, torch.float32, CPU).model.parameters())
    assert all(found["memory", side, "train", 64]["peak_bytes"] > 0.5 * weight_bytes for side in ("ours", "native"))
    assert found["memory", "ours", "prefill", 512]["peak_bytes"] > 0
    assert len(document["targets"]) == 11 and {t["verdict"] for t in document["targets"]} <= {"met", "missed"}
    errors = document["correctness"]
    assert max(error for name, error in errors.items() if "torchao" not in name) < 1e-4 and len(errors) == 5
    assert errors["logits, ours against torchao"] < 4e-4  # one row's inputs are rounded to 16 bits
    assert prefix.with_name("cpu.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["cpu.json", "cpu.png"]
    captured = capsys.readouterr()
    assert "correctness gate passed" in captured.out and "beyond the weights" in captured.out
    assert all(target["name"] in captured.out for target in document["targets"])
    assert "round 3 of 3" in captured.err


def test_parts_can_be_chosen(tmp_path, capsys):
    assert quick(tmp_path / "cpu", "--only", "decode") == 0
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert [m["side"] for m in document["measurements"]] == ["linear", "linear", "ours", "native"]
    assert [t["name"].split(":")[1] for t in document["targets"]] == [
        " time over reading weights and cache once", " time over the Linear layers'",
    ]  # fmt: skip
    assert "prefill" not in capsys.readouterr().out


def test_files_are_not_overwritten_unasked(tmp_path, capsys):
    (tmp_path / "cpu.png").write_text("mine")
    assert quick(tmp_path / "cpu", "--only", "train") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "cpu.png").read_text() == "mine" and not (tmp_path / "cpu.json").exists()
    assert quick(tmp_path / "cpu", "--only", "train", "--overwrite") == 0
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "nemotron_h_hf.benchmark.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert quick(tmp_path / "cpu", "--only", "train") == 0
    assert "pip install 'nemotron-h-hf[plot]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


@pytest.mark.parametrize("option, message", [
    (("--runs", "0"), "--runs=0"), (("--threads", "0"), "--threads=0"),
    (("--gguf", "no.gguf"), "--gguf no.gguf: allowed are GGUF files"),
])  # fmt: skip
def test_bad_options_are_named(option, message, tmp_path, capsys):
    assert cli.main(["bench", "cpu", "--quick", "--output", str(tmp_path / "cpu"), *option]) == 1
    assert message in capsys.readouterr().err


def test_wrong_model_is_not_timed(tmp_path, capsys, monkeypatch):
    build = models.build_native

    def corrupted(ours):
        native = build(ours)
        mixer = native.model.model.layers[0].mixer
        mixer.D = nn.Parameter(mixer.D + 0.5)  # a new tensor: ours keeps the right one
        return native

    monkeypatch.setattr(gate, "build_native", corrupted)
    assert quick(tmp_path / "cpu") == 1
    captured = capsys.readouterr()
    assert "correctness gate: fp32 slice: logits, ours against native" in captured.err
    assert captured.out == "" and "round" not in captured.err


def test_gate_sees_wrong_decoding(ours, monkeypatch):
    read_states = mamba2.read_states

    def forgetful(layer):
        conv_state, ssm_state = read_states(layer)
        return conv_state, None if ssm_state is None else ssm_state * 0.5

    for module in (mamba2, token):  # op by op, and compiled
        monkeypatch.setattr(module, "read_states", forgetful)
    with pytest.raises(ValueError, match="steps of generate\\(\\) against one pass"):
        gate.check_model(ours, models.build_native(ours))


def test_gate_sees_wrong_gradients(monkeypatch):
    build = models.build_ours

    def skewed(*arguments):
        side = build(*arguments)
        side.model.model.layers[1].mixer.up_proj.weight.register_hook(lambda gradient: gradient * 1.01)
        return side

    monkeypatch.setattr(gate, "build_ours", skewed)
    with pytest.raises(ValueError, match="gradients, ours against native"):
        gate.check_slice(models.read_config("tiny", None), CPU)


def test_gate_refuses_nan():
    with pytest.raises(ValueError, match="nan"):
        gate.require("logits", float("nan"), 1.0)


def test_sides_share_their_weights(ours):
    native = dict(models.build_native(ours).model.named_parameters())
    parameters = dict(ours.model.named_parameters())
    assert parameters.keys() == native.keys()
    assert all(p.data_ptr() == native[name].data_ptr() for name, p in parameters.items())
    assert all(p.requires_grad for p in native.values())


def test_floor_runs_every_linear_layer_once(ours):
    calls = []
    for name, module in ours.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, __, name=name: calls.append((name, args[0].shape[1])))
    linears.forward(ours.model, 7)()
    by_floor = sorted(calls)
    calls.clear()
    with torch.no_grad():
        ours.model(gate.random_ids(ours.model, 1, 7), logits_to_keep=1)
    assert by_floor == sorted(calls) and len(calls) == 3 * 2 + 3 * 2 + 4 + 1


def job(side: str, sample) -> turns.Job:
    return turns.Job(records.Measurement("decode", side, "x", 1, 8), sample, figures=lambda found: {"m": found.median})


def test_samples_are_taken_in_turns_and_a_side_may_drop_out():
    order = []

    def steady():
        order.append("a")
        return [1.0]

    def hungry():
        order.append("b")
        if order.count("b") == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return [1.0]

    a, b = turns.take_turns(some_bench(), [job("a", steady), job("b", hungry)])
    assert order == ["a", "b", "a", "b", "a"]
    assert a.seconds == [1.0] * 3 and a.figures == {"m": 1.0}
    assert b.seconds == [] and b.failure.startswith("out of memory") and records.ratio(a, b) is None


def test_other_errors_are_not_taken_for_want_of_memory():
    def broken():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        turns.take_turns(some_bench(), [job("a", broken)])


def test_ratio_is_the_median_of_rounds():
    floor, ours = (
        records.Measurement("d", "a", "", 1, 1, [1.0, 2.0, 4.0]),
        records.Measurement("d", "b", "", 1, 1, [1.5, 4.0, 4.0]),
    )
    assert records.ratio(ours, floor) == 1.5
    assert records.ratio(records.Measurement("d", "c", "", 1, 1, [3.0]), floor) == 1.5


needs_proc = pytest.mark.skipif(not memory.can_measure(), reason="peak memory is read from /proc")


@needs_proc
def test_footprint_sees_what_is_freed_before_the_end():
    def job():
        block = torch.ones(2**24)  # 64 MiB, gone when the job returns
        return float(block.sum())

    found = memory.footprint(job)
    assert 63 * 2**20 < found.extra_bytes < 80 * 2**20  # the kernel counts in batches of pages
    assert memory.footprint(lambda: None).extra_bytes < 8 * 2**20  # the peak was reset


@needs_proc
def test_limit_makes_an_allocation_fail_and_is_lifted():
    found = memory.footprint(lambda: torch.ones(2**26), limit_bytes=2**26)
    assert found.extra_bytes is None and "allocate memory" in found.failure
    assert found.at_least_bytes >= 2**28
    assert memory.footprint(lambda: torch.ones(2**26)).failure is None


def test_targets_pass_and_fail(tmp_path):
    sizes, journal = cpu_suite.QUICK, records.Journal(tmp_path / "j.json", {})

    def add(part, side, variant, context, seconds, **more):
        journal.add(records.Measurement(part, side, variant, 1, context, [seconds], **more))

    for side, variant, seconds in (
        (linears.SIDE, linears.AS_CALLED, 1.0),
        ("ours", "in parts", 1.6),
        ("native", "in parts", 3.4),
    ):
        add("prefill", side, variant, 96, seconds)
    add("prefill", "ours", "in parts", 32, 0.1)
    for side, peak in (("native", 100), ("ours", 50)):
        add("memory", side, "train", 64, 1.0, peak_bytes=peak)
    add("memory", "ours", "prefill", 512, 1.0, peak_bytes=2 * 10**9 + 1)
    assert [(target.value, target.verdict) for target in cpu_suite.targets(journal, sizes)] == [
        (1.6, "missed"), (pytest.approx(2.125), "met"), (0.5, "missed"), (2.000000001, "missed"),
    ]  # fmt: skip
    assert records.Target("x", None, 1.0).verdict == "not measured"


def test_int8_sides_count_the_bytes_they_have(ours):
    pytest.importorskip("torchao")
    sides = cpu_suite.int8_sides(ours)
    for name in ("float32", cpu_suite.INT8, cpu_suite.INT8_HEAD):
        tensors = sides[name].model.state_dict().values()
        held = sum(part.nbytes for tensor in tensors for part in plain_parts(tensor))
        assert sides[name].costs.weight_bytes == held, name
        assert ours.costs.step_bytes - sides[name].costs.step_bytes == ours.costs.weight_bytes - held
    assert sides["torchao"].costs == sides[cpu_suite.INT8].costs
