"""`nemotron-h bench cpu`: its gate, its figures on a tiny model, its files. How fast anything is, no test can tell."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

import nemotron_h_cli as cli
from nemotron_h_hf.benchmark import cpu_run, gate, memory, report, sides, timing
from nemotron_h_hf.model import mamba2

SHAPE = cpu_run.QUICK.shape


def quick(prefix, *options: str) -> int:
    return cli.main(["bench", "cpu", "--quick", "--runs", "2", "--threads", "1", "--output", str(prefix), *options])


def test_quick_run_writes_json_plot_and_table(tmp_path, capsys):
    prefix = tmp_path / "results" / "cpu"
    assert quick(prefix) == 0
    document = json.loads(prefix.with_name("cpu.json").read_text())
    assert document["command"].startswith("nemotron-h bench cpu --quick")
    assert document["versions"]["torch"] == torch.__version__ and document["machine"]["cores"] > 0
    assert set(document["machine"]) == {"cpu", "cores", "cpu_capability", "memory_bytes", "system"}
    assert document["plan"]["runs"] == 2 and document["plan"]["shape"]["hybrid_override_pattern"] == "M-M*-"
    timed = [row["name"] for row in document["timings"]]
    assert timed == ["decode", "prefill 32", "prefill 96", "train 64", "decode, int8"]
    assert set(document["timings"].pop()["seconds"]) == {"fp32", "torchao", "int8", "int8_head"}
    for row in document["timings"]:
        more = {"linear"} if row["name"] == "decode" else set()
        assert set(row["seconds"]) == {"floor", "native", "ours"} | more and not row["skipped"]
        rounds = 6 if row["name"] == "decode" else 2
        assert all(len(times) == rounds and min(times) > 0 for times in row["seconds"].values())
    # a step's gradients have the size of the weights, and no side can take less
    weight_bytes = sum(p.nbytes for p in sides.build_sides(SHAPE).ours.parameters())
    assert all(side["extra_bytes"] > 0.5 * weight_bytes for side in document["train_memory"].values())
    long = document["long_prefill"]
    assert long["num_tokens"] == 512 and long["memory"]["ours"]["extra_bytes"] > 0
    names = [target["name"] for target in document["targets"]]
    assert len(names) == 7 and names[2] == "prefill 96: time over the floor's"
    assert max(document["correctness"].values()) < 1e-4 and len(document["correctness"]) == 6
    assert prefix.with_name("cpu.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["cpu.json", "cpu.png"]
    captured = capsys.readouterr()
    assert "correctness gate passed" in captured.out and "peak memory beyond the weights" in captured.out
    assert all(name in captured.out for name in names)
    assert "decode: round 6 of 6" in captured.err and "by torch's linear" in captured.out


def test_parts_can_be_chosen(tmp_path, capsys):
    assert quick(tmp_path / "cpu", "--only", "decode") == 0
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["name"] for row in document["timings"]] == ["decode"]
    assert [target["name"] for target in document["targets"]] == ["decode: time over the floor's"]
    assert document["train_memory"] == {}
    assert "prefill 96" not in capsys.readouterr().out


def test_files_are_not_overwritten_unasked(tmp_path, capsys):
    (tmp_path / "cpu.png").write_text("mine")
    assert quick(tmp_path / "cpu", "--only", "decode") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "cpu.png").read_text() == "mine" and not (tmp_path / "cpu.json").exists()
    assert quick(tmp_path / "cpu", "--only", "decode", "--overwrite") == 0
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "nemotron_h_hf.benchmark.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert quick(tmp_path / "cpu", "--only", "decode") == 0
    assert "pip install 'nemotron-h-hf[plot]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


@pytest.mark.parametrize("option", ["--runs", "--threads"])
def test_bad_counts_are_named(option, tmp_path, capsys):
    assert cli.main(["bench", "cpu", "--quick", "--output", str(tmp_path / "cpu"), option, "0"]) == 1
    assert f"{option} is 0" in capsys.readouterr().err


def test_wrong_model_is_not_timed(tmp_path, capsys, monkeypatch):
    build = sides.build_sides

    def corrupted(shape):
        both = build(shape)
        mixer = both.ours.model.layers[0].mixer
        mixer.D = nn.Parameter(mixer.D + 0.5)  # a new tensor: native keeps the right one
        return both

    monkeypatch.setattr(sides, "build_sides", corrupted)
    assert quick(tmp_path / "cpu") == 1
    captured = capsys.readouterr()
    assert "correctness gate: logits, ours against native" in captured.err
    assert captured.out == "" and "round" not in captured.err and not any(tmp_path.iterdir())


def test_gate_sees_wrong_decoding(monkeypatch):
    read_states = mamba2.read_states

    def forgetful(layer):
        conv_state, ssm_state = read_states(layer)
        return conv_state, None if ssm_state is None else ssm_state * 0.5

    monkeypatch.setattr(mamba2, "read_states", forgetful)
    with pytest.raises(ValueError, match="prefill and steps against one pass"):
        gate.check_agreement(sides.build_sides(SHAPE), SHAPE)


def test_gate_sees_wrong_gradients():
    both = sides.build_sides(SHAPE)
    both.ours.model.layers[1].mixer.up_proj.weight.register_hook(lambda gradient: gradient * 1.01)
    with pytest.raises(ValueError, match="gradients, ours against native"):
        gate.check_agreement(both, SHAPE)


def test_gate_refuses_nan():
    with pytest.raises(ValueError, match="nan"):
        gate.require("logits", float("nan"))


def test_sides_share_their_weights():
    both = sides.build_sides(SHAPE)
    native = dict(both.native.named_parameters())
    ours = dict(both.ours.named_parameters())
    assert ours.keys() == native.keys() and all(p.data_ptr() == native[name].data_ptr() for name, p in ours.items())
    assert all(p.requires_grad for p in native.values())


def test_floor_runs_every_linear_layer_once():
    model = sides.build_sides(SHAPE).ours
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, __, name=name: calls.append((name, args[0].shape[1])))
    sides.floor_job(model, 7, num_logits=1)()
    by_floor = sorted(calls)
    calls.clear()
    with torch.no_grad():
        model(sides.random_tokens(SHAPE, 7), logits_to_keep=1)
    assert by_floor == sorted(calls) and len(calls) == 2 * 2 + 2 * 2 + 4 + 1


def test_decoding_continues_the_cache():
    both = sides.build_sides(SHAPE)
    jobs = sides.decode_jobs(both, SHAPE, 10, 4)
    first, second = jobs["ours"](), jobs["ours"]()
    ids = sides.random_tokens(SHAPE, 10)
    text = torch.cat([ids, ids[:, :4], ids[:, :4]], dim=1)
    with torch.no_grad():
        logits = both.native(text).logits[0]
    assert torch.allclose(first, logits[13], atol=1e-5) and torch.allclose(second, logits[17], atol=1e-5)


def test_samples_are_taken_in_turns_and_a_side_may_drop_out():
    order = []

    def hungry():
        order.append("b")
        if order.count("b") == 3:  # the second round: the first call was the warm-up
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    jobs = {"a": lambda: order.append("a"), "b": hungry}
    timed = timing.time_in_turns("t", 1, jobs, 3, jobs, lambda _: None)
    assert order == ["a", "b", "a", "b", "a", "b", "a"]
    assert len(timed.samples["a"]) == 3 and "b" not in timed.samples
    assert timed.skipped["b"].startswith("out of memory") and timed.ratio("a", "b") is None


def test_other_errors_are_not_taken_for_want_of_memory():
    def broken():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        timing.time_in_turns("t", 1, {"a": broken}, 1, {"a": broken}, lambda _: None)


def test_ratio_is_the_median_of_rounds():
    timed = timing.Timing("decode", 16, {"floor": [1.0, 2.0, 4.0], "ours": [1.5, 4.0, 4.0]})
    assert timed.ratio("ours", "floor") == (1.5, 1.0, 2.0)


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


def test_targets_pass_and_fail():
    timed = timing.Timing("prefill 96", 96, {"floor": [1.0], "native": [3.0], "ours": [1.6]})
    short = timing.Timing("prefill 32", 32, {"floor": [1.0], "native": [3.0], "ours": [1.0]})
    train_memory = {"native": memory.Footprint(100, 1.0), "ours": memory.Footprint(50, 1.0)}
    long_memory = {"native": memory.Footprint(None, 1.0, "can't", 10), "ours": memory.Footprint(2 * 10**9 + 1, 1.0)}
    results = report.Results(
        prefill=[short, timed], train_memory=train_memory, long_tokens=512, long_memory=long_memory
    )
    found = report.targets(results, 96)
    assert [(target.value, target.passed) for target in found] == [
        (1.6, False), (1.875, False), (0.5, True), (2.000000001, False),
    ]  # fmt: skip
    missing = report.Target("x", None, 1.0)
    assert missing.passed is None and "not measured" in report.table(results, [missing])[-1]
