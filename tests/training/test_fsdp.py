"""Training under FSDP2 on two CPU processes (gloo): the losses of one process, sharded checkpoints, other numbers of processes.

With the files of examples/accelerate. The first process alone loads the weights (`ONE_COPY`, as in them), or each one (`FSDP2`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_distill_sharded import write_biased
from test_pretrain import COMMAND, MODEL, environment, write_config
from tiny import tiny_model
from tiny_run import read_metrics, write_texts
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.scripts import distill, export, sft
from nemotron_h_hf.training.checkpoints import last_whole_checkpoint, whole_checkpoints

MOE = {
    "hybrid_override_pattern": "ME*-", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
EXAMPLES = Path(__file__).parents[2] / "examples"


def on_cpu(name: str, **fsdp) -> dict:
    """A file of examples/accelerate, with what a CPU needs instead."""
    settings = yaml.safe_load((EXAMPLES / "accelerate" / f"{name}.yaml").read_text())
    settings.pop("dynamo_config", None)
    if fsdp:
        settings["fsdp_config"] |= fsdp
    return {**settings, "use_cpu": True, "mixed_precision": "no"}


ONE_COPY, FSDP2 = on_cpu("fsdp2"), on_cpu("fsdp2", fsdp_cpu_ram_efficient_loading=False)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of 12 steps of four rows of a model with a layer of each kind."""
    folder = tmp_path_factory.mktemp("fsdp")
    path = write_config(folder, write_texts(folder / "texts"))
    settings = yaml.safe_load(path.read_text())
    settings["config_overrides"] |= MOE
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """The run on one process, not sharded."""
    output_dir = tmp_path_factory.mktemp("one") / "run"
    run([*COMMAND, f"--config={config}", f"--output_dir={output_dir}"])
    return output_dir


def test_same_losses_as_one_process_and_an_ordinary_checkpoint(config, one, tmp_path):
    launch(config, tmp_path / "two", processes=2)
    assert held(tmp_path / "two", "model")[1] > 0
    assert_same_losses(tmp_path / "two", one)
    checkpoint = last_whole_checkpoint(tmp_path / "two")
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    assert_same_models(tmp_path / "two", one)


def test_one_process_draws_the_weights(config, one, tmp_path):
    launch(config, tmp_path / "two", processes=2, accelerate=ONE_COPY)
    assert held(tmp_path / "two", "model")[1] == 0
    assert_same_losses(tmp_path / "two", one)
    assert_same_models(tmp_path / "two", one)


def test_a_copy_in_each_process(config, one, tmp_path):
    launch(config, tmp_path / "two", processes=2, accelerate=on_cpu("multi_gpu"))
    assert_same_losses(tmp_path / "two", one)
    assert_same_models(tmp_path / "two", one)


def test_checkpointing_and_accumulation_leave_the_losses(config, one, tmp_path):
    """As the recipes combine them: gradients reduced in each of two passes of one row."""
    flags = ("--gradient_checkpointing=true", "--gradient_accumulation_steps=2", "--per_device_train_batch_size=1")
    flags += ("--save_strategy=no",)  # the end of a run needs no checkpoint
    reduced = '--accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": true}}'
    launch(config, tmp_path / "two", 2, -1, *flags, reduced, accelerate=ONE_COPY)
    assert_same_losses(tmp_path / "two", one)
    assert_same_models(tmp_path / "two", one)


def test_multi_token_prediction(config, tmp_path):
    flags = ("--mtp_depth=2", "--mtp_loss_weight=0.3")
    run([*COMMAND, f"--config={config}", f"--output_dir={tmp_path / 'one'}", *flags])
    launch(config, tmp_path / "two", 2, -1, *flags, accelerate=ONE_COPY)
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    assert_same_models(tmp_path / "two", tmp_path / "one")


def test_one_process_loads_the_weights(config, one, tmp_path):
    """Experts' selection biases too, which are buffers; stopped at step 8 as a crash would, and resumed."""
    settings = yaml.safe_load(config.read_text())
    del settings["config_overrides"]
    settings |= {"init": "weights", "model": str(write_biased(one / "model", tmp_path / "start"))}
    config = tmp_path / "weights.yaml"
    config.write_text(yaml.safe_dump(settings))
    run([*COMMAND, f"--config={config}", f"--output_dir={tmp_path / 'one'}"])
    launch(config, tmp_path / "two", processes=2, crash_after=8, accelerate=ONE_COPY)
    launch(config, tmp_path / "two", processes=2, accelerate=ONE_COPY)
    assert held(tmp_path / "two", "model")[1] == 0
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    assert_same_models(tmp_path / "two", tmp_path / "one")


def test_one_process_loads_student_and_teacher(one, tuning, tmp_path, monkeypatch):
    monkeypatch.setenv("COMMAND", "distill")
    settings = yaml.safe_load(tuning.read_text())
    settings |= {"teacher": str(write_biased(one / "model", tmp_path / "teacher")), "logging_steps": 1}
    tuning.write_text(yaml.safe_dump(settings))
    alone = ["--config", str(tuning), "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "4"]
    distill.main(alone)
    launch(tuning, tmp_path / "two", processes=2, accelerate=ONE_COPY)
    for name in ("model", "teacher"):
        assert held(tmp_path / "two", name)[1] == 0, name
    rows = [[row for row in read_metrics(tmp_path / name) if "kl" in row] for name in ("two", "one")]
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], abs=1e-5)
    assert_same_models(tmp_path / "two", tmp_path / "one")


def test_adapters_on_weights_of_one_process(tuning, tmp_path):
    flags = ("--lora_rank=2", "--lora_targets=mamba")
    for name, accelerate in (("each", FSDP2), ("one", ONE_COPY)):
        launch(tuning, tmp_path / name, 2, -1, *flags, accelerate=accelerate)
    assert held(tmp_path / "one", "model")[1] == 0
    losses = [json.loads((tmp_path / name / "held_out.json").read_text()) for name in ("one", "each")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_adapters_go_on(tuning, tmp_path):
    """Stopped at step 3 as a crash would, resumed from step 2: the losses of a run that was not stopped."""
    flags = ("--lora_rank=2", "--lora_targets=mamba", "--max_steps=4", "--save_steps=2", "--logging_steps=1")
    launch(tuning, tmp_path / "whole", 2, -1, *flags, accelerate=ONE_COPY)
    launch(tuning, tmp_path / "stopped", 2, 3, *flags, accelerate=ONE_COPY)
    kept = first_lines(tmp_path / "stopped", 3)
    launch(tuning, tmp_path / "stopped", 2, -1, *flags, accelerate=ONE_COPY)
    assert first_lines(tmp_path / "stopped", 3) == kept
    whole, stopped = ([row for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("whole", "stopped"))
    assert [row["step"] for row in whole] == [1, 2, 3, 4] and stopped == whole
    held_out = [(tmp_path / name / "held_out.json").read_text() for name in ("whole", "stopped")]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("part", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_killed_in_the_middle_of_a_checkpoint_write(config, one, tmp_path, monkeypatch, part):
    run_folder = tmp_path / "run"
    monkeypatch.setenv("KILLED_WRITING", f"checkpoint-8/{part}")
    launch(config, run_folder, processes=2, crash_after=8)
    assert len(list((run_folder / "checkpoint-8" / part).glob("*.distcp"))) == 2
    assert [folder.name for folder in whole_checkpoints(run_folder)] == ["checkpoint-4"]
    kept = first_lines(run_folder, 4)
    monkeypatch.delenv("KILLED_WRITING")
    launch(config, run_folder, processes=2)
    assert first_lines(run_folder, 4) == kept
    assert_same_losses(run_folder, one)
    assert_same_models(run_folder, one)


def test_another_number_of_processes_goes_on(config, one, tmp_path):
    """Stopped at step 8 of 12 as a crash would (nothing of the end is written), in the second phase of the data."""
    launch(config, tmp_path / "run", processes=2, crash_after=8)
    assert last_whole_checkpoint(tmp_path / "run").name == "checkpoint-8"
    launch(config, tmp_path / "run", processes=1)
    assert_same_losses(tmp_path / "run", one)


def test_fp8_goes_on_with_the_losses_of_one_process(config, tmp_path):
    """FP8 scales are those of the rows that one process holds, so the process alone takes the same rows at a time."""
    settings = yaml.safe_load(config.read_text())
    # Rows for which no value is so near a boundary of FP8 that another order of sums rounds it to the other side: the runs
    # then part, with some orders after eight steps.
    settings["data_seed"] = 2
    settings["config_overrides"] |= {"hybrid_override_pattern": "M-M*-"}  # ten GEMMs: layer 2 is in FP8
    config = tmp_path / "dense.yaml"
    config.write_text(yaml.safe_dump(settings))
    words = [*COMMAND, f"--config={config}", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"]
    run([*words, f"--output_dir={tmp_path / 'plain'}"])
    run([*words, f"--output_dir={tmp_path / 'one'}", "--fp8"])
    for crash_after in (8, -1):
        said = launch(config, tmp_path / "two", 2, crash_after, "--fp8", accelerate=on_cpu("fsdp2_fp8"))
        assert (
            "FP8 (emulated) in 2 of the 12 Linear modules in the decoder:\n  model.layers.2: in_proj, out_proj" in said
        )
    assert held(tmp_path / "two", "model")[1] == 0
    assert_same_models(tmp_path / "two", tmp_path / "one")
    plain, one, two = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("plain", "one", "two"))
    assert two == pytest.approx(one, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(plain, one, strict=True)) > 1e-3


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """A fine-tuning run of two steps, with three held-out rows: two processes repeat one to have as many each."""
    monkeypatch.setenv("COMMAND", "sft")
    for name, count in (("data", 24), ("held_out", 12)):
        lines = [json.dumps({"text": "ab" * (5 + number) + "\n"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "data": [str(tmp_path / "data.jsonl")], "eval_data": [str(tmp_path / "held_out.jsonl")], "init": "random",
        "config_overrides": MODEL, "use_cpu": True, "sequence_length": 64, "max_steps": 2, "learning_rate": 1e-3,
        "save_steps": 1, "per_device_eval_batch_size": 1, "disable_tqdm": True,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def test_fine_tuning_tells_the_held_out_loss_of_one_process(tuning, tmp_path):
    launch(tuning, tmp_path / "two", processes=2)
    one = ["--output_dir", str(tmp_path / "one"), "--per_device_eval_batch_size", "3"]
    sft.main(["--config", str(tuning), "--per_device_train_batch_size", "4", *one])
    two, one = (json.loads((tmp_path / run / "held_out.json").read_text()) for run in ("two", "one"))
    assert two["before"] == pytest.approx(one["before"], abs=1e-5)
    assert two["after"] == pytest.approx(one["after"], abs=1e-3) and two["after"] < two["before"]


def test_a_done_run_of_adapters_names_the_way_on(tuning, tmp_path):
    flags, run_folder = ("--lora_rank=2", "--lora_targets=mamba"), tmp_path / "run"
    launch(tuning, run_folder, 1, -1, *flags)
    assert (run_folder / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"checkpoint-2 holds sharded adapters .*run/adapter, for nemotron-h merge"):
        export.main([str(run_folder), str(tmp_path / "model")])
    with pytest.raises(AssertionError, match=r"run/adapter has the adapters; .*remove .*checkpoint-2 and repeat"):
        launch(tuning, run_folder, 1, -1, *flags)


def test_preferences_write_the_weights_of_one_process(tmp_path, monkeypatch):
    """examples/dpo.py with its recipe; a reference of transformers' class would clamp the step size to 0.5 and more."""
    monkeypatch.setenv("COMMAND", str(EXAMPLES / "dpo.py"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.save_pretrained(tmp_path / "start")
    start = tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=1, time_step_min=0.5)
    start.save_pretrained(tmp_path / "start")
    pairs = [{"prompt": f"def f{n}(x):", "chosen": f"\n    return {n}\n", "rejected": "\n    pass\n"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = yaml.safe_load((EXAMPLES / "recipes" / "align_2_dpo.yaml").read_text()) | {
        "model": str(tmp_path / "start"), "data": str(tmp_path / "pairs.jsonl"), "max_length": 64, "bf16": False,
        "gradient_accumulation_steps": 1, "use_cpu": True, "max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3,
        "logging_steps": 1, "save_steps": 2,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "one")]
    run([sys.executable, str(EXAMPLES / "dpo.py"), *words, "--per_device_train_batch_size", "4"])
    launch(tmp_path / "run.yaml", tmp_path / "two", processes=2, accelerate=ONE_COPY)
    assert list((tmp_path / "two" / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))
    states = [
        json.loads((tmp_path / name / "checkpoint-2" / "trainer_state.json").read_text()) for name in ("one", "two")
    ]
    margins = [[line["rewards/margins"] for line in state["log_history"]] for state in states]
    assert margins[0] == pytest.approx(margins[1], abs=1e-5)
    assert abs(margins[1][0]) < 1e-5 and margins[1][1] > 1e-3
    assert_same_models(tmp_path / "two", tmp_path / "one", atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "two" / "model")("x") == tokenizer("x")


def launch(
    config: Path, output_dir: Path, processes: int, crash_after: int = -1, *flags: str, accelerate: dict = FSDP2
) -> str:
    output_dir.mkdir(exist_ok=True)
    settings = output_dir / "accelerate.yaml"
    settings.write_text(yaml.safe_dump({**accelerate, "num_processes": processes}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    command += ["--main_process_port", "0", str(Path(__file__).parents[1] / "fsdp_on_cpu.py"), "--config", str(config)]
    command += [f"--output_dir={output_dir}", f"--per_device_train_batch_size={4 // processes}", *flags]
    return run(command, crash_after, HELD=str(output_dir))


def run(command: list[str], crash_after: int = -1, **more: str) -> str:
    """What the command printed."""
    variables = {**environment(), "CRASH_AFTER": str(crash_after), **more}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (done.returncode == 0) == (crash_after < 0), done.stderr[-4000:]
    return done.stdout


def first_lines(output_dir: Path, count: int) -> list[str]:
    """Of metrics.jsonl, with figures of the clock: a resumed run still has them, a new one does not."""
    return (output_dir / "metrics.jsonl").read_text().splitlines()[:count]


def held(output_dir: Path, name: str) -> list[int]:
    """Bytes of weights in each of two processes before they were sharded."""
    found = [int((output_dir / f"{name}-{rank}").read_text()) for rank in range(2)]
    assert found[0] > 0
    return found


def assert_same_models(left: Path, right: Path, atol: float = 2e-3) -> None:
    models = [NemotronHForCausalLM.from_pretrained(run / "model").state_dict() for run in (left, right)]
    for name, value in models[1].items():
        assert torch.allclose(models[0][name], value, atol=atol), name


def assert_same_losses(left: Path, right: Path) -> None:
    """Sums run in another order on two processes; the differences grow with the steps."""
    rows = [read_metrics(path) for path in (left, right)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(1, 13))
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], abs=1e-5)
    assert rows[0][0]["grad_norm"] == pytest.approx(rows[1][0]["grad_norm"], rel=1e-4)
    for name, tolerance in (("loss", 2e-3), ("learning_rate", 1e-9), ("tokens", 0)):
        values = [[row[name] for row in run] for run in rows]
        assert values[0] == pytest.approx(values[1], rel=tolerance), name
