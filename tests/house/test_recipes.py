"""The recipes under examples/: read by the commands' own parsers and run at tiny size; Accelerate's files by its own loader."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from tiny import tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, TrlParser

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.data.phases import phases_from, resolve_phases
from nemotron_h_hf.elastic.train.budget_targets import targets_of
from nemotron_h_hf.elastic.train.choices import axes_of, one_hot
from nemotron_h_hf.elastic.train.curriculum import stages_of
from nemotron_h_hf.elastic.train.expected_cost import ExpectedCost
from nemotron_h_hf.scripts import distill, elastic_train, elasticize, make_vl, merge, plot, pretrain, sft
from nemotron_h_hf.scripts import slice as slice_command
from nemotron_h_hf.training.arguments import ModelArguments, NemotronHTrainingArguments, parse
from nemotron_h_hf.training.data_arguments import DataArguments, PretrainDataArguments

ROOT = Path(__file__).parents[2]
RECIPES, ACCELERATE = ROOT / "examples" / "recipes", ROOT / "examples" / "accelerate"
TEMPLATE = RECIPES / "nemotron_h.jinja"
SFT = (DataArguments, sft.LongContextArguments, sft.AdapterArguments, ModelArguments)
SEES = (*SFT, sft.VisionArguments)
ELASTIC = (DataArguments, elastic_train.ElasticArguments, elastic_train.TeacherArguments, ModelArguments)
# recipe -> its command and the dataclasses of that command
COMMANDS = {
    "pretrain_tiny": (pretrain, (ModelArguments, PretrainDataArguments)),
    "pretrain_8b": (pretrain, (ModelArguments, PretrainDataArguments)),
    "pretrain_56b_fp8": (pretrain, (ModelArguments, PretrainDataArguments)),
    "sft_8b": (sft, SFT),
    "lora_8b_one_gpu": (sft, SFT),
    "align_1_sft": (sft, SFT),
    "vl_1_projector": (sft, SEES),
    "vl_2_all": (sft, SEES),
    "distill_56b_to_47b": (distill, (DataArguments, distill.DistillationArguments, ModelArguments)),
    "elastic_12b": (elastic_train, ELASTIC),
    "elastic_tiny": (elastic_train, ELASTIC),
}
MINIPUZZLE = ("minipuzzle_56b_to_47b", "minipuzzle_tiny")  # tests/minipuzzle
BESIDE = {"elasticize": elasticize, "make-vl": make_vl, "merge": merge, "plot": plot, "slice": slice_command}
LINE = re.compile(rf"(?m)^#   nemotron-h ((?:{'|'.join(BESIDE)}) .*)")
GPUS = {"pretrain_8b": 64, "pretrain_56b_fp8": 256, "distill_56b_to_47b": 128}  # as their comments say
TINY = {
    "sequence_length": 64, "gradient_accumulation_steps": 2,
    "warmup_tokens": "10%", "decay_tokens": "50%", "bf16": False, "use_cpu": True, "attention": "sdpa", "mamba": "auto",
    "logging_steps": 1, "save_steps": 100, "disable_tqdm": True,
}  # fmt: skip
CHAT = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "def f(x): return x"}]


def read(recipe: str) -> dict:
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())


def flags(overrides: dict) -> list[str]:
    return [
        f"--{name}={json.dumps(value) if isinstance(value, (dict, list)) else value}"
        for name, value in overrides.items()
    ]


def test_every_recipe_is_listed():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*COMMANDS, *MINIPUZZLE, "align_2_dpo"}


@pytest.mark.parametrize("recipe", COMMANDS)
def test_parsed_by_its_command(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # the template's path is from there
    config = ["--config", str(RECIPES / f"{recipe}.yaml"), "--use_cpu=true", "--bf16=false"]
    kinds = (*COMMANDS[recipe][1], NemotronHTrainingArguments)
    filled = {type(part): part for part in parse(kinds, config, "", "nemotron-h")}
    training, start = filled[NemotronHTrainingArguments], filled[ModelArguments]
    assert training.output_dir == read(recipe)["output_dir"] and start.fp8 is read(recipe).get("fp8", False)
    if recipe in GPUS:
        assert training.tokens_per_step * GPUS[recipe] == 768 * 8192
    if start.init == "random" and start.model:
        assert num_parameters(NemotronHConfig.from_preset(start.model)) > 8e9
    if training.gradient_accumulation_steps > 1 and recipe not in ("lora_8b_one_gpu", "elastic_tiny"):
        assert training.accelerator_config.gradient_accumulation_kwargs["sync_each_batch"]


def test_commands_in_comments_are_parsed():
    """Every command of BESIDE is taught by some recipe, and what is taught is accepted."""
    lines = [line for path in RECIPES.glob("*.yaml") for line in LINE.findall(path.read_text())]
    words = [shlex.split(line, comments=True) for line in lines]
    assert {name for name, *_ in words} == {*BESIDE}
    for name, *arguments in words:
        BESIDE[name].parse(arguments)


def test_phases_of_the_paper():
    """60 %, 80 % and the last 380B of 15T; web, code and academic of the first."""
    recipe = read("pretrain_8b")
    spans = resolve_phases(phases_from(recipe["phases"]), recipe["sources"], 15 * 10**12)
    assert [span.start / 1e12 for span in spans] == [0, 9, 12, 14.62]
    assert all(sum(phase["weights"].values()) == pytest.approx(100) for phase in recipe["phases"])
    first = spans[0].weights
    assert [first[name] for name in ("web", "code", "academic")] == pytest.approx([0.59, 0.2, 0.088])
    assert max(spans[3].weights, key=spans[3].weights.get) == "sft"


def test_budgets_of_the_12b_are_within_reach():
    """Rows of 49,152 tokens, 512 a step; the largest and smallest choices are on both sides of each budget."""
    recipe, config = read("elastic_12b"), NemotronHConfig.from_preset("nano-12b-v2")
    rows = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * 256
    assert rows * recipe["sequence_length"] == 512 * 49152
    axes = axes_of(config, recipe["choices"], recipe["per_layer"])
    cost = ExpectedCost(config, axes)
    smallest = cost(one_hot(axes, {axis.field: [axis.num_choices - 1] * axis.num_rows for axis in axes}))
    targets = targets_of(recipe["budgets"], "parameters", cost.full)
    assert cost.full == num_parameters(config) and float(smallest) < targets["6b"] < 0.55 * cost.full
    stages = stages_of(recipe["stages"], list(targets), 110 * 10**9, recipe["sequence_length"])
    assert [stage.sequence_length for stage in stages] == [8192, 49152] and stages[1].weights == (0.5, 0.3, 0.2)


def test_template_is_that_of_the_released_model():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.chat_template = TEMPLATE.read_text()
    messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\nSay it.\n<SPECIAL_11>Assistant\ndef f(x): return x\n"
    )
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<SPECIAL_10>System\n\n<SPECIAL_11>User\nSay it.\n<SPECIAL_11>Assistant\n"


# Runs


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A tiny checkpoint that knows the turn tokens, and data of every kind that a recipe names."""
    folder = tmp_path_factory.mktemp("box")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<SPECIAL_10>", "<SPECIAL_11>"]})
    tokenizer.save_pretrained(folder / "model")
    tiny_model("dense", vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1).save_pretrained(folder / "model")
    chats = [{"messages": [{**CHAT[0], "content": f"Say {number}."}, CHAT[1]]} for number in range(20)]
    texts = [{"text": f"def f{number}(x):\n    return x + {number}\n" * 3} for number in range(40)]
    pairs = [{"prompt": f"def f{n}(x):", "chosen": f"\n    return {n}\n", "rejected": "\n    pass\n"} for n in range(8)]
    tower = {"model_type": "internvl_vision", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 48, "image_size": 16, "patch_size": 8}  # fmt: skip
    AutoModel.from_config(AutoConfig.for_model(**tower)).save_pretrained(folder / "tower")
    parts = ["--language-model", str(folder / "model"), "--vision-model", str(folder / "tower"), "--tile-tags", "no"]
    make_vl.main([*parts, str(folder / "sees")])
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    seen = [{**chat, "messages": [{**chat["messages"][0], "content": f"<image>{chat['messages'][0]['content']}"}, CHAT[1]],
             "images": ["red.png"]} for chat in chats]  # fmt: skip
    for name, records in (("chats", chats), ("texts", texts), ("pairs", pairs), ("seen", seen)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def overrides_of(recipe: str, box: Path, output_dir: Path) -> dict:
    """What makes a recipe tiny: model, data and lengths; all else stays as it is."""
    content = read(recipe)
    found = {**TINY, "output_dir": str(output_dir)}
    if "lr_scheduler_type" in content:  # others than wsd have no decay_tokens
        del found["decay_tokens"]
    kind = "texts" if COMMANDS[recipe][0] is not sft else "chats"
    if "sources" in content:
        found["sources"] = {name: {"path": str(box / f"{kind}.jsonl")} for name in content["sources"]}
    if "phases" in content:  # 380B of 15T
        found["phases"] = [{**phase, "last": "2.5%"} if "last" in phase else phase for phase in content["phases"]]
    found |= {name: str(box / f"{kind}.jsonl") for name in ("data", "eval_data") if name in content}
    found |= {"chat_template": str(TEMPLATE)} if "chat_template" in content else {}
    found |= {name: str(box / "model") for name in ("tokenizer", "teacher") if name in content} | {
        "model": str(box / "model")
    }
    if COMMANDS[recipe][0] is elastic_train:
        found["choices"] = {"hidden_size": [32], "intermediate_size": [48, 16], "mamba_num_heads": [4]}
        found["stages"] = [
            {**stage, **({"sequence_length": 32} if "until" in stage else {})} for stage in content["stages"]
        ]
        found["stages"][0]["until"] = "60%"
        found["budgets"] = dict(zip(content["budgets"], (1.0, 0.75, 0.6)))
        found["router_loss_weight"] = 1.0  # the loss is then of the size of the others'
        found |= {"interpolate": {"7b": 0.7}} if "interpolate" in content else {}
    if content.get("init") == "random":
        found["config_overrides"] = {"hybrid_override_pattern": "M-M*-M-"}
    found |= {"sequence_length": 128} if content.get("long_context") else {}
    if "train" in content:
        return found | {"model": str(box / "sees"), "data": str(box / "seen.jsonl"), "max_steps": 4}
    found |= {"num_train_epochs": 1} if "num_train_epochs" in content else {"total_tokens": 1024}
    return found


@pytest.mark.parametrize("recipe", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*checkpointing")
def test_runs_at_tiny_size(recipe, box, tmp_path):
    argv = ["--config", str(RECIPES / f"{recipe}.yaml"), *flags(overrides_of(recipe, box, tmp_path))]
    assert COMMANDS[recipe][0].main(argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    chance = math.log(NemotronHConfig.from_pretrained(box / "model").vocab_size)
    assert len(losses) >= 2 and all(map(math.isfinite, losses))
    if recipe.startswith("pretrain"):  # from fresh weights
        assert losses[0] == pytest.approx(chance, abs=0.1) and losses[-1] < chance - 0.2
    elif recipe.startswith("distill"):  # the student is its teacher
        assert max(losses) < 0.01
    elif recipe.startswith("elastic"):  # least for the whole parent, which is its own teacher
        assert min(losses) < 1 and max(losses) < 2 * chance
    elif recipe.startswith("vl"):  # one stage moves the projector alone, the other everything a little
        assert losses[0] < chance + 1
    else:  # weights that were spread out are worse than chance, and learn
        assert chance < losses[0] < chance + 1 and losses[-1] < losses[0]
    if recipe == "lora_8b_one_gpu":
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 16
    else:
        assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "model").lm_head.weight).all()


def run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_stages_of_alignment(box, tmp_path):
    """SFT on conversations made long, then preferences, from what the one before wrote."""
    overrides = overrides_of("align_1_sft", box, tmp_path / "sft")
    assert sft.main(["--config", str(RECIPES / "align_1_sft.yaml"), *flags({**overrides, "sequence_length": 256})]) == 0
    tiny = {
        "model": str(tmp_path / "sft" / "model"), "data": str(box / "pairs.jsonl"), "output_dir": str(tmp_path / "dpo"),
        "max_length": 64, "gradient_accumulation_steps": 2, "bf16": False, "use_cpu": True, "max_steps": 2,
        "save_strategy": "no",
    }  # fmt: skip
    preferences = [
        "--config",
        str(RECIPES / "align_2_dpo.yaml"),
        *(w for n, v in tiny.items() for w in (f"--{n}", str(v))),
    ]
    run([str(ROOT / "examples" / "dpo.py"), *preferences], tmp_path)
    assert NemotronHForCausalLM.from_pretrained(tmp_path / "dpo" / "model").config.vocab_size > 2048


def test_preferences_are_parsed_by_trl():
    settings = {name: value for name, value in read("align_2_dpo").items() if name not in ("model", "data")}
    (training,) = TrlParser(DPOConfig).parse_dict({**settings, "bf16": False, "use_cpu": True})
    assert training.precompute_ref_log_probs and training.beta == 0.1


# Accelerate's files


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    assert config.use_cpu is (path.stem == "cpu")
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    assert args.use_fsdp is path.stem.startswith("fsdp2") and args.multi_gpu is (path.stem == "multi_gpu")
    if args.use_fsdp:
        environment = prepare_multi_gpu_env(args)
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
        assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
        assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
        assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] in NemotronHForCausalLM(tiny_config())._no_split_modules


@pytest.mark.slow
def test_launched_by_accelerate_on_the_cpu(box, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / "cpu.yaml")]
    recipe = ["--config", str(RECIPES / "pretrain_8b.yaml"), *flags(overrides_of("pretrain_8b", box, tmp_path / "run"))]
    run([*launch, "-m", "nemotron_h_hf.scripts.pretrain", *recipe], tmp_path)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
