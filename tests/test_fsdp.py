"""Training under FSDP2 on two CPU processes (gloo): the losses of one process, sharded checkpoints, other numbers of processes.

Each process loads the weights, or the first one alone (`ONE_COPY`).
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
from tiny_run import read_metrics, write_texts

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.scripts import distill, export, sft
from nemotron_h_hf.training.checkpoints import last_whole_checkpoint

MOE = {
    "hybrid_override_pattern": "ME*-", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
FSDP2 = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_machines": 1, "mixed_precision": "no",
    "use_cpu": True,
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_transformer_layer_cls_to_wrap": "NemotronHBlock", "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
    },
}  # fmt: skip
ONE_COPY = {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], "fsdp_cpu_ram_efficient_loading": True}}

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


def test_one_process_loads_the_weights(config, one, tmp_path):
    """Experts' selection biases too, which are buffers; stopped at step 8 as a crash would, and gone on with."""
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


def test_another_number_of_processes_goes_on(config, one, tmp_path):
    """Stopped at step 8 of 12 as a crash would (nothing of the end is written), in the second phase of the data."""
    launch(config, tmp_path / "run", processes=2, crash_after=8)
    assert last_whole_checkpoint(tmp_path / "run").name == "checkpoint-8"
    launch(config, tmp_path / "run", processes=1)
    assert_same_losses(tmp_path / "run", one)


def test_fp8_goes_on_with_the_losses_of_one_process(config, tmp_path):
    """FP8 scales are those of the rows that one process holds, so the process alone takes the same rows at a time."""
    settings = yaml.safe_load(config.read_text())
    settings["config_overrides"] |= {"hybrid_override_pattern": "M-M*-"}  # ten GEMMs: layer 2 is in FP8
    config = tmp_path / "dense.yaml"
    config.write_text(yaml.safe_dump(settings))
    words = [*COMMAND, f"--config={config}", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"]
    run([*words, f"--output_dir={tmp_path / 'plain'}"])
    run([*words, f"--output_dir={tmp_path / 'one'}", "--fp8"])
    for crash_after in (8, -1):
        said = launch(config, tmp_path / "two", 2, crash_after, "--fp8", accelerate=ONE_COPY)
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


def launch(
    config: Path, output_dir: Path, processes: int, crash_after: int = -1, *flags: str, accelerate: dict = FSDP2
) -> str:
    output_dir.mkdir(exist_ok=True)
    settings = output_dir / "accelerate.yaml"
    settings.write_text(yaml.safe_dump({**accelerate, "num_processes": processes}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    command += ["--main_process_port", "0", str(Path(__file__).with_name("fsdp_on_cpu.py")), f"--config={config}"]
    command += [f"--output_dir={output_dir}", f"--per_device_train_batch_size={4 // processes}", *flags]
    return run(command, crash_after, HELD=str(output_dir))


def run(command: list[str], crash_after: int = -1, **more: str) -> str:
    """What the command printed."""
    variables = {**environment(), "CRASH_AFTER": str(crash_after), **more}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (done.returncode == 0) == (crash_after < 0), done.stderr[-4000:]
    return done.stdout


def held(output_dir: Path, name: str) -> list[int]:
    """Bytes of weights in each of two processes before they were sharded."""
    found = [int((output_dir / f"{name}-{rank}").read_text()) for rank in range(2)]
    assert found[0] > 0
    return found


def assert_same_models(left: Path, right: Path) -> None:
    models = [NemotronHForCausalLM.from_pretrained(run / "model").state_dict() for run in (left, right)]
    for name, value in models[1].items():
        assert torch.allclose(models[0][name], value, atol=2e-3), name


def assert_same_losses(left: Path, right: Path) -> None:
    """Sums run in another order on two processes; the differences grow with the steps."""
    rows = [read_metrics(path) for path in (left, right)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(1, 13))
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], abs=1e-5)
    assert rows[0][0]["grad_norm"] == pytest.approx(rows[1][0]["grad_norm"], rel=1e-4)
    for name, tolerance in (("loss", 2e-3), ("learning_rate", 1e-9), ("tokens", 0)):
        values = [[row[name] for row in run] for run in rows]
        assert values[0] == pytest.approx(values[1], rel=tolerance), name
