"""`nemotron-h bench`: its parts and its GPU suite, at tiny sizes on a CPU. How fast anything is, no test can tell."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from torch import nn

import nemotron_h_cli as cli
from nemotron_h_hf.benchmark import caches, devices, gate, gpu_suite, jobs, models, records, turns, vllm_peer

CPU = torch.device("cpu")
TINY = ("--device", "cpu", "--model", "tiny", "--layers", "4")


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    """Rates of memory that is quickly copied; the code is the same."""
    monkeypatch.setitem(devices.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(devices.MATRIX_SIZE, "cpu", 32)


def bench(prefix, *options: str) -> int:
    return cli.main(["bench", *options, "--output", str(prefix)])


@pytest.fixture(scope="module")
def config():
    return models.read_config("tiny", 4)


@pytest.fixture(scope="module")
def sides(config):
    ours = models.build_ours(config, torch.float32, CPU)
    peers = (models.build_peer(name, config, config, torch.float32, CPU) for name in models.PEERS)
    return {side.name: side for side in (ours, models.build_native(ours), *peers)}


def some_bench(**changes) -> turns.Bench:
    fields = {"device": CPU, "dtype": torch.float32, "rates": devices.Rates(1e9, 1e9), "num_runs": 1}
    return turns.Bench(**{**fields, "budget_bytes": None, "say": lambda _: None, **changes})


@pytest.mark.slow
def test_decode_beside_peers(tmp_path, capsys):
    assert bench(tmp_path / "d", "decode", *TINY, "--sides", "ours", "native", "llama", "--rows", "1", "2",
                 "--context", "24", "--steps", "3", "--runs", "1") == 0  # fmt: skip
    document = json.loads((tmp_path / "d.json").read_text())
    assert [(m["side"], m["rows"]) for m in document["measurements"]] == [
        ("ours", 1), ("native", 1), ("ours", 2), ("native", 2), ("llama", 1), ("llama", 2),
    ]  # fmt: skip
    for found in document["measurements"]:
        assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0 and found["warm_up_seconds"] > 0
        assert found["share_of_floor"] == pytest.approx(found["floor_seconds"] / found["median_seconds"])
    assert document["finished"] and document["device"]["kind"] == "cpu" and document["targets"] == []
    assert document["rates"]["bytes_per_second"] > 0 and max(document["correctness"].values()) < 1e-4
    assert len(document["correctness"]) == 4 and document["pattern"] == "M-M*"
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "correctness gate passed" in table and "decode, llama, eager" in table and "of the floor" in table


@pytest.mark.slow
@pytest.mark.parametrize("options, count", [
    (("prefill", "--context", "40", "--whole", "--sides", "ours"), 2),
    (("train", "--context", "48", "--sides", "ours", "native", "--runs", "1"), 2),
    (("memory", "--context", "600", "--sides", "ours", "qwen2"), 2),
    (("throughput", "--context", "32", "--tokens-out", "4", "--steps", "2", "--most-rows", "3", "--sides", "llama"), 1),
])  # fmt: skip
def test_other_parts(tmp_path, options, count):
    assert bench(tmp_path / "x", *options, *TINY) == 0
    document = json.loads((tmp_path / "x.json").read_text())
    assert len(document["measurements"]) == count
    assert all(found["seconds"] and not found["failure"] for found in document["measurements"])
    if options[0] == "throughput":
        found = document["measurements"][0]
        assert found["rows"] == 3 and found["figures"]["all_tokens_per_second"] > 0


@pytest.mark.slow
def test_suite(tmp_path, capsys):
    assert bench(tmp_path / "s", "--suite", "gpu-10min", *TINY, "--runs", "1") == 0
    document = json.loads((tmp_path / "s.json").read_text())
    done = [(m["part"], m["side"], m["context"], m["rows"]) for m in document["measurements"]]
    small = gpu_suite.SMALL
    assert done == [
        ("train", "ours", small.train_tokens, 1),
        ("decode", "ours", small.small_context, 1),
        ("decode", "native", small.small_context, 1),
        ("decode", "ours", small.large_context, small.large_rows),
        ("prefill", "ours", small.short_prompt, 1),
        ("prefill", "ours", small.prompt, 1),
        ("prefill", "ours", small.prompt, 1),
        ("throughput", "ours", small.prompt, small.most_rows),
        ("memory", "ours", small.memory_context, 1),
        ("decode", "qwen2", small.small_context, 1),
        ("throughput", "qwen2", small.prompt, small.most_rows),
        ("decode", "llama", small.small_context, 1),
        ("throughput", "llama", small.prompt, small.most_rows),
    ]
    verdicts = {target["name"]: target["verdict"] for target in document["targets"]}
    assert len(verdicts) == 12 and set(verdicts.values()) <= {"met", "missed", "not measured"}
    assert [name for name, verdict in verdicts.items() if "FP8" in name] and document["finished"]
    assert verdicts["training step: FP8's speed over that of the run's dtype"] == "not measured"
    assert verdicts[f"{small.memory_context:,} tokens of context: runs"] == "met"
    table = capsys.readouterr().out
    assert all(name in table for name in verdicts) and "one H200" in table


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(tmp_path / "s", "--suite", "gpu-10min") == 1
    assert "PyTorch sees no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_wrong_model_is_not_timed(tmp_path, capsys, monkeypatch):
    build = models.build_native

    def corrupted(ours):
        native = build(ours)
        native.model.model.norm_f.weight = nn.Parameter(native.model.model.norm_f.weight * 1.01)
        return native

    monkeypatch.setattr(gate, "build_native", corrupted)
    for options in (("decode", "--context", "24"), ("--suite", "gpu-10min")):
        assert bench(tmp_path / "d", *options, *TINY) == 1
        assert "correctness gate: fp32 slice: logits" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_gate_sees_wrong_steps(sides, monkeypatch):
    model = sides["ours"].model
    mixer = next(layer.mixer for layer in model.model.layers if layer.block_type == "linear_attention")
    step = mixer._step
    monkeypatch.setattr(mixer, "_step", lambda *args: step(*args) * 1.1)
    model.set_mamba_implementation("torch")  # a compiled token does not come by there
    try:
        with pytest.raises(ValueError, match="steps of generate"):
            gate.check_model(sides["ours"], None)
    finally:
        model.set_mamba_implementation("auto")


def test_what_was_measured_survives_the_end_of_a_run(tmp_path, config):
    journal = records.Journal(tmp_path / "j.json", {"rates": {}})
    journal.add(records.Measurement("decode", "ours", "eager", 1, 8, seconds=[2.0, 1.0, 4.0], floor_seconds=1.0))
    document = json.loads((tmp_path / "j.json").read_text())
    assert document["measurements"][0]["median_seconds"] == 2.0 and document["finished"] is False
    assert document["measurements"][0]["share_of_floor"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["j.json"]


def make_suite(tmp_path, config, seconds: float = 600.0) -> gpu_suite.Suite:
    journal = records.Journal(tmp_path / "j.json", {})
    return gpu_suite.Suite(some_bench(), config, config, gpu_suite.SMALL, journal, compiled=True, seconds=seconds)


def test_suite_begins_nothing_that_would_not_end(tmp_path, config, monkeypatch):
    run = make_suite(tmp_path, config, seconds=100.0)
    begun = []
    steps = [
        gpu_suite.Step("long", 1000, lambda: begun.append("long")),
        gpu_suite.Step("short", 1, lambda: begun.append("short")),
    ]
    monkeypatch.setattr(run, "steps", lambda: steps)
    run.run()
    assert begun == ["short"]
    assert run.journal.head["skipped"] == ["long: 100 s left, about 1000 needed"] and run.journal.finished


def test_suite_goes_on_after_a_peer_that_breaks(tmp_path, config, monkeypatch):
    run, begun = make_suite(tmp_path, config), []

    def broken():
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(
        run, "steps", lambda: [gpu_suite.Step("a", 1, broken), gpu_suite.Step("b", 1, lambda: begun.append("b"))]
    )
    run.run()
    assert begun == ["b"] and run.journal.head["skipped"] == ["a: RuntimeError: no kernel image"]


def test_suite_times_nothing_whose_gate_was_left_out(tmp_path, config, sides):
    run = make_suite(tmp_path, config)
    run.sides = dict(sides)
    for job in (
        lambda: run.decode("ours", 1, 8, "eager"),
        lambda: run.prefill(8, False),
        lambda: run.train(False, False),
    ):
        with pytest.raises(RuntimeError, match="not timed"):
            job()
    run.passed.add("model")
    with pytest.raises(RuntimeError, match="compiled ours"):
        run.decode("ours", 1, 8, "compiled")


def test_suite_of_a_gpu_asks_for_all_that_the_targets_need(tmp_path, config):
    names = [step.name for step in make_suite(tmp_path, config).steps()]
    assert names.index("decode, ours") < names.index("decode a batch, ours") < names.index("decode compiled, ours")
    assert "training step, FP8" in names and "a long context" in names
    seconds = sum(step.seconds for step in make_suite(tmp_path, config).steps() if "native" not in step.name)
    assert seconds < 800  # estimates; what does not fit is left out at the end


@pytest.mark.parametrize("name", ["ours", "native", "llama"])
@pytest.mark.parametrize("static", [False, True])
def test_filled_cache_is_that_of_a_batch(sides, name, static):
    """Copies of one row decode as the batch that they stand for."""
    side = sides[name]
    ids = gate.random_ids(side.model, 1, 21).expand(3, -1)
    row = caches.empty_cache(side, 20, static=False)
    caches.prefill(side.model, ids[:1, :20], row, part=8)
    cache = caches.filled_cache(side, row, 3, 24, static)
    with torch.no_grad():
        step = side.model(ids[:, 20:], past_key_values=cache, use_cache=True).logits[:, -1]
        expected = side.model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(step, expected, rtol=0, atol=2e-5)


def test_room_is_not_exceeded(sides):
    cache = caches.empty_cache(sides["llama"], 4, static=False)
    with pytest.raises(ValueError, match="room=4: 5 tokens are needed"):
        caches.prefill(sides["llama"].model, gate.random_ids(sides["llama"].model, 1, 5), cache)


def test_every_token_is_clocked(sides):
    cache = caches.filled_cache(sides["ours"], jobs.one_row(sides["ours"], 9), 2, 32, static=False)
    assert len(jobs.generate_steps(sides["ours"], cache, 2, 9, steps=3, variant="eager")) == 3 + jobs.WARM_STEPS + 1
    assert int(cache.get_seq_length()) == 9 + 3 + jobs.WARM_STEPS + 1


def test_running_out_of_memory_is_a_finding():
    result, peak, failure = devices.run_within(lambda: torch.ones(2**26), CPU, 2**26)
    assert result is None and failure.startswith("out of memory")
    with pytest.raises(RuntimeError, match="shapes"):
        devices.run_within(lambda: (_ for _ in ()).throw(RuntimeError("shapes")), CPU, None)


@pytest.mark.slow
def test_largest_batch_is_what_fits(sides, monkeypatch):
    """Memory for three rows: one, two fit, four do not, three do."""
    fill, tried = caches.filled_cache, []

    def limited(side, row, rows, room, static):
        tried.append(rows)
        if rows > 3:
            raise MemoryError(f"cannot allocate memory for {rows}")
        return fill(side, row, rows, room, static)

    monkeypatch.setattr(jobs, "filled_cache", limited)
    found = jobs.throughput(some_bench(), sides["ours"], 24, 4, 2, most_rows=64)
    assert found.rows == 3 and tried == [1, 2, 4, 3, 3] and len(found.seconds) == 2
    alone, step = found.figures["prefill_seconds_per_row"], found.figures["step_seconds"]
    assert found.median == pytest.approx(3 * alone + 4 * step)

    def none(*args, **kwargs):
        raise MemoryError("cannot allocate memory")

    monkeypatch.setattr(jobs, "filled_cache", none)
    assert jobs.throughput(some_bench(), sides["ours"], 24, 4, 2, 64).failure.endswith("not one row fits")


@pytest.mark.slow
def test_vllm_where_it_is_installed(tmp_path, config, monkeypatch):
    """A stand-in of its few names: what is asked of it, and what comes back."""
    (tmp_path / "vllm.py").write_text(
        "import json, pathlib\n"
        "SamplingParams = dict\n"
        "class LLM:\n"
        "    def __init__(self, model, load_format, max_model_len, **kwargs):\n"
        "        assert json.loads((pathlib.Path(model) / 'config.json').read_text())['model_type'] == 'nemotron_h'\n"
        "        assert load_format == 'dummy' and max_model_len == 20 and kwargs['dtype'] == 'bfloat16'\n"
        "    def generate(self, prompts, params):\n"
        "        assert len(prompts) in (1, 3) and params['max_tokens'] == 4\n"
    )
    assert not vllm_peer.installed()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{models.__file__.rsplit('/nemotron_h_hf/', 1)[0]}")
    found = vllm_peer.throughput(config, torch.bfloat16, 3, 16, 4)
    assert found.failure is None and len(found.seconds) == 1 and found.figures["output_tokens_per_second"] > 0


def test_vllm_that_fails_says_why(config, monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nValueError: no such architecture\n")
    monkeypatch.setattr(vllm_peer.subprocess, "run", lambda *_, **__: done)
    found = vllm_peer.throughput(config, torch.bfloat16, 3, 16, 4)
    assert found.failure == "vLLM failed: ValueError: no such architecture" and not found.seconds


@pytest.mark.parametrize("options, message", [
    (("decode", "--rows", "0"), "--rows=0: allowed is 1 or more"),
    (("decode", "--variants", "fp8"), "--variants fp8: allowed for train"),
    (("decode", "--model", "nemotron-h-9"), "preset='nemotron-h-9' is unknown"),
    (("decode", "--layers", "9"), "--layers 9: allowed are 1 to the 7 layers"),
    (("decode", "--device", "meta"), "--device meta: allowed are cuda and cpu"),
    (("decode", "--sides", "vllm"), "--sides vllm: allowed for throughput, where vLLM is installed"),
])  # fmt: skip
def test_bad_options_are_named(tmp_path, capsys, options, message):
    assert cli.main(["bench", *TINY[:4], "--output", str(tmp_path / "x"), *options]) == 1
    assert message in capsys.readouterr().err


def test_files_are_not_overwritten_unasked(tmp_path, capsys):
    (tmp_path / "d.json").write_text("mine")
    assert bench(tmp_path / "d", "decode", *TINY) == 1
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "d.json").read_text() == "mine"


@pytest.mark.slow
def test_compiled_steps_beside_eager_ones(tmp_path):
    assert (
        bench(tmp_path / "d", "decode", *TINY, "--variants", "eager", "compiled", "--context", "24", "--steps", "2")
        == 0
    )
    document = json.loads((tmp_path / "d.json").read_text())
    assert [m["variant"] for m in document["measurements"]] == ["eager"] * 2 + ["compiled"] * 2
    assert sum("compiled steps" in name for name in document["correctness"]) == 2
