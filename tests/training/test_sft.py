"""Fine-tuning: records to labels, the command on every layout, adapters, resume, push, and what is refused."""

import copy
import json
import logging
import sys
import types
import weakref

import pytest
import torch
from peft import PeftModel
from test_chat import CHATML
from tiny import assert_close, prompt, tiny_model
from tiny_run import read_metrics
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.data.blended_rows import one_round
from nemotron_h_hf.data.fine_tuning_records import encode_record
from nemotron_h_hf.data.packing import Rows, WholeRows
from nemotron_h_hf.data.sources import Source
from nemotron_h_hf.scripts import push, sft
from nemotron_h_hf.training import adapters
from nemotron_h_hf.training.adapters import add_adapters, four_bit_loading, target_modules
from nemotron_h_hf.training.arguments import ModelArguments, NemotronHTrainingArguments
from nemotron_h_hf.training.data_arguments import DataArguments
from nemotron_h_hf.training.fp8 import converted_modules
from nemotron_h_hf.training.vision import VisionArguments


def names(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return ["".join(chr(97 + i) for i in torch.randint(26, (6,), generator=generator)) for _ in range(count)]


RECORDS = {
    "completion": lambda name: {"prompt": f"def {name}(x):\n", "completion": f"    return {name!r}\n"},
    "messages": lambda name: {
        "messages": [{"role": "user", "content": f"name {name}"}, {"role": "assistant", "content": f"{name}!"}]
    },
    "text": lambda name: {"text": f"def {name}(x):\n    return {name!r}\n"},
}


def write(path, kind, count=24, seed=0):
    path.write_text("".join(json.dumps(RECORDS[kind](name)) + "\n" for name in names(count, seed)))
    return str(path)


def run(tmp_path, *flags, kind="completion"):
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    data, held_out = write(tmp_path / "data.jsonl", kind), write(tmp_path / "held.jsonl", kind, 6, 1)
    return sft.main([
        "--data", data, "--eval_data", held_out, "--chat_template", str(template), "--sequence_length", "64",
        "--per_device_train_batch_size", "2", "--use_cpu", "--logging_steps", "1", "--learning_rate", "1e-3",
        "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run"), *flags,
    ])  # fmt: skip


# Records


def test_prompt_has_no_loss_and_completion_ends(tokenizer):
    encoded = encode_record({"prompt": "def f(x):\n", "completion": "    return 1\n"}, tokenizer)
    learned = [label for label in encoded["labels"] if label != -100]
    assert tokenizer.decode(learned) == "    return 1\n" + tokenizer.eos_token
    start = len(encoded["labels"]) - len(learned)
    assert encoded["input_ids"][:start] == tokenizer("def f(x):\n")["input_ids"]
    assert encoded["input_ids"][start:] == learned


def test_text_is_learned_whole(tokenizer):
    for record in ({"text": "import os\n"}, "import os\n"):
        encoded = encode_record(record, tokenizer)
        assert encoded["labels"] == encoded["input_ids"] == [0, *tokenizer("import os\n")["input_ids"], 0]


def test_conversations_in_two_layouts_are_one(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}
    one = encode_record({"messages": [user, assistant]}, tokenizer)
    assert one == encode_record({"prompt": [user], "completion": [assistant]}, tokenizer)
    assert any(label != -100 for label in one["labels"]) and -100 in one["labels"]


@pytest.mark.parametrize("record", [{"txt": "a"}, {}, 7, {"text": 7}, {"prompt": "a", "completion": None}])
def test_other_records_are_refused(record, tokenizer):
    with pytest.raises(ValueError, match="allowed"):
        encode_record(record, tokenizer)


def test_a_round_is_every_record_once(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "data.jsonl", "text", 30)
    with open(path, "a") as file:
        file.write('{"other": 1}\nno json\n')
    source = Source("data", path=path, column=None)
    with caplog.at_level(logging.WARNING):
        rows = list(one_round(source, lambda record: encode_record(record, tokenizer), 64, 1))
    assert sum((row["input_ids"] == tokenizer.eos_token_id).sum() for row in rows) == 2 * 30
    assert "data.jsonl:31" in caplog.text and "data.jsonl:32" in caplog.text and "starts again" not in caplog.text
    with pytest.raises(ValueError, match="data.jsonl:31"):
        list(one_round(source, lambda record: encode_record(record, tokenizer), 64, 1, on_bad_data="error"))
    (tmp_path / "bad.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="no usable record"):
        list(
            one_round(
                Source("bad", path=str(tmp_path / "bad.jsonl"), column=None),
                lambda r: encode_record(r, tokenizer),
                64,
                1,
            )
        )


# The command


@pytest.mark.parametrize("kind", ["completion", "messages", "text"])
def test_full_fine_tuning_lowers_the_held_out_loss(kind, tmp_path):
    assert run(tmp_path, "--max_steps", "6", kind=kind) == 0
    losses = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert losses["after"] < losses["before"] - 0.3
    model = NemotronHForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template == CHATML
    embedded = NemotronHForCausalLM.from_pretrained(EMBEDDED_MODEL)
    assert not torch.equal(model.lm_head.weight, embedded.lm_head.weight.float())
    assert not list((tmp_path / "run" / "model").glob("*.bin"))


def test_long_context_joins_conversations(tmp_path):
    """One conversation of a long row, where packing would have put many documents next to each other."""
    assert run(tmp_path, "--max_steps", "2", "--sequence_length", "256", "--long_context", kind="messages") == 0
    assert len(read_metrics(tmp_path / "run")) >= 2
    with pytest.raises(ValueError, match="long_context"):
        run(tmp_path, "--long_context", "--output_dir", str(tmp_path / "other"), kind="messages")
    with pytest.raises(ValueError, match="allows only conversations"):
        run(tmp_path, "--long_context", "--max_steps", "1", "--output_dir", str(tmp_path / "other"), kind="text")


def test_long_context_keeps_tools(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for tool in tools or [] %}<{{ tool.name }}>\n{% endfor %}" + CHATML
    records = [
        RECORDS["messages"](name) | {"tools": [{"name": tool}] if tool else None}
        for tool, count in (("clock", 4), (None, 4), ("map", 4)) for name in names(count, len(str(tool)))
    ]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataArguments(sources={"chats": {"path": str(tmp_path / "data.jsonl"), "shuffle_window": 0}})
    training = NemotronHTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, sequence_length=512, max_steps=1, per_device_train_batch_size=1
    )
    rows, _ = sft.rows_of(data, True, training, tokenizer)
    whole = tokenizer.decode(torch.cat([row["input_ids"] for row in rows]))
    assert whole.startswith("<clock>") and names(4, 5)[-1] in whole
    assert whole.count("<clock>") == whole.count("<map>") == 1, "one list of tools for each joined conversation"
    assert whole.index(names(1, 4)[0]) < whole.index("<map>") < whole.index(names(1, 3)[0])


def test_totals_of_what_was_left_out_are_told(tmp_path, caplog):
    data = write(tmp_path / "some.jsonl", "text", 6)
    long = json.dumps({"text": "x = 1\n" * 100})
    with open(data, "a") as file:
        file.write(f'{long}\nno json\n{{"other": 1}}\n')
    run(tmp_path, "--data", data, "--eval_data", data, "--num_train_epochs", "1", "--save_strategy", "no")
    told = [message for message in caplog.messages if "left out in all" in message]
    counts = "1 x too long, 1 x malformed JSON, 1 x cannot be encoded"
    assert told[:2] == [f"left out in all of source {name}: {counts}" for name in ("data", "eval_data")]
    assert len(told) == 3 and told[2].startswith("left out in all of source data: ")
    assert f"{data}:7: too long" in caplog.text


def test_epochs_set_the_steps(tmp_path, capsys):
    run(tmp_path, "--num_train_epochs", "1", "--save_strategy", "no", kind="text")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    source = Source("data", path=str(tmp_path / "data.jsonl"), column=None)
    rows = list(one_round(source, lambda record: encode_record(record, tokenizer), 64, 1))
    assert len(read_metrics(tmp_path / "run")) >= -(-len(rows) // 2)
    assert f"{len(rows):,} rows of 64 tokens in an epoch" in capsys.readouterr().err


def test_epochs_are_counted_without_keeping_rows(tmp_path, tokenizer, monkeypatch):
    alive, most, make = weakref.WeakSet(), [0], Rows._row

    def counted(self, pieces):
        row = make(self, pieces)
        alive.add(row["input_ids"])
        most[0] = max(most[0], len(alive))
        return row

    monkeypatch.setattr(Rows, "_row", counted)
    path = write(tmp_path / "data.jsonl", "text", 60)
    training = NemotronHTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, sequence_length=64, num_train_epochs=2, per_device_train_batch_size=1
    )
    sft.rows_of(DataArguments(data=[path]), False, training, tokenizer)
    source = Source("data", path=path, column=None)
    assert most[0] <= 2
    rows = list(one_round(source, lambda record: encode_record(record, tokenizer), 64, 1))
    assert len(rows) > 10 and training.max_steps == 2 * len(rows)


def test_adapters_on_a_base_in_fp8(tmp_path):
    """The base rounds to FP8, the adapters do not, and they are those of an ordinary base afterwards."""
    pytest.importorskip("torchao")
    flags = ("--lora_rank", "4", "--max_steps", "4")
    assert run(tmp_path, *flags, "--fp8", "--output_dir", str(tmp_path / "fp8")) == 0
    assert run(tmp_path, *flags, "--output_dir", str(tmp_path / "plain")) == 0
    fp8, plain = (json.loads((tmp_path / name / "held_out.json").read_text()) for name in ("fp8", "plain"))
    assert 0 < abs(fp8["before"] - plain["before"]) < 0.1 and abs(fp8["after"] - plain["after"]) < 0.1
    assert fp8["after"] < fp8["before"] - 0.3
    base = NemotronHForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    before = base(prompt()).logits
    assert (PeftModel.from_pretrained(base, tmp_path / "fp8" / "adapter")(prompt()).logits - before).abs().max() > 1e-3


def test_a_base_in_fp8_runs_in_fp8_under_its_adapters(monkeypatch):
    pytest.importorskip("torchao")
    start, flags = ModelArguments(fp8=True), adapters.AdapterArguments(lora_rank=2)
    training = NemotronHTrainingArguments(output_dir="unused", use_cpu=True)
    model = sft.make_model(flags, VisionArguments(), start, training)
    wrapped = [name for name in converted_modules(model) if name.endswith(".base_layer")]
    assert wrapped == converted_modules(model) and len(wrapped) == 8
    ran = []
    for name in wrapped:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model(input_ids=prompt(), labels=prompt()).loss.backward()
    assert sorted(ran) == sorted(wrapped)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name and p.grad is not None and p.dtype == torch.float32 for name, p in trained)


def test_adapters_train_save_resume_and_push(tmp_path, capsys):
    flags = ("--lora_rank", "4", "--save_steps", "2")
    run(tmp_path, *flags, "--max_steps", "4")
    whole, folder = read_metrics(tmp_path / "run"), tmp_path / "run" / "adapter"
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert {"adapter_config.json", "tokenizer.json", "README.md"} <= {path.name for path in folder.iterdir()}
    base = NemotronHForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    before = base(prompt()).logits
    adapted = PeftModel.from_pretrained(base, folder)
    assert (adapted(prompt()).logits - before).abs().max() > 1e-3
    trained = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert trained == {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}

    for path in [folder, tmp_path / "run" / "checkpoint-4"]:  # as if it had ended after step 2
        path.rename(tmp_path / path.name)
    run(tmp_path, *flags, "--max_steps", "4")
    assert read_metrics(tmp_path / "run") == whole
    assert (folder / "adapter_model.safetensors").read_bytes() == weights

    assert push.main([str(folder), "owner/adapters", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "adapter_model.safetensors" in shown and "training_args" not in shown


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_rank", "-1"], "lora_rank"),
        (["--lora_targets", "all"], "lora_targets='all': allowed is none without --lora_rank"),
        (["--lora_alpha", "32"], "lora_alpha=32.0: allowed is none without --lora_rank"),
        (["--lora_dropout", "0"], "lora_dropout=0.0: allowed is none without --lora_rank"),
        (["--load_in_4bit"], "only with --lora_rank"),
        (["--load_in_4bit", "--lora_rank", "4", "--init", "random"], "--init weights"),
        (["--lora_rank", "4", "--lora_targets", "in_porj"], "did you mean 'in_proj'"),
        (["--push_to_hub", "true"], "hub_model_id"),
        (["--chat_template", "no-such-file"], "chat_template"),
        (["--sources", "{a: {path: b}}"], "data"),
    ],
)
def test_command_refuses(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--max_steps", "1", *flags)


# Adapters


@pytest.mark.parametrize("shape", ["dense", "moe", "latent"])
@pytest.mark.parametrize("targets", ["all", "mamba", "attention", "mlp", "q_proj, v_proj"])
def test_targets(shape, targets):
    model = tiny_model(shape)
    chosen = set(target_modules(model, targets))
    expected = {
        "mamba": {"in_proj", "out_proj"}, "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "mlp": {"up_proj", "down_proj"}, "q_proj, v_proj": {"q_proj", "v_proj"},
    }  # fmt: skip
    if shape == "latent":
        expected["mlp"] |= {"fc1_latent_proj", "fc2_latent_proj"}
    expected["all"] = expected["mamba"] | expected["attention"] | expected["mlp"]
    assert chosen == expected[targets]
    adapted = add_adapters(model, 2, 4.0, 0.0, targets)
    adapted(input_ids=prompt(), labels=prompt()).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".")[-4] for name in trained} == chosen
    assert all(p.grad is not None for p in trained.values())


def test_routed_experts_can_be_adapted():
    adapted = add_adapters(tiny_model("moe"), 2, 4.0, 0.0, "experts")
    assert any("experts" in name and "shared" not in name for name, p in adapted.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="routed experts"):
        add_adapters(tiny_model(), 2, 4.0, 0.0, "experts")


@pytest.mark.parametrize("targets, warns", [("all", False), ("attention", True)])
def test_few_trained_weights_are_told(targets, warns, monkeypatch):
    said = {"warning": [], "info": []}
    for level, lines in said.items():
        monkeypatch.setattr(adapters.logger, level, lines.append)
    add_adapters(tiny_model(), 4, 4.0, 0.0, targets)
    assert bool(said["warning"]) == warns and len(said["warning"] + said["info"]) == 1
    assert ("in 1 of 7 layers" if warns else "in 7 of 7 layers") in (said["warning"] + said["info"])[0]


def test_four_bits_need_bitsandbytes_that_works(monkeypatch):
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="load_in_4bit: needs bitsandbytes"):
        four_bit_loading()

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: object())
    functional = types.ModuleType("bitsandbytes.functional")
    functional.quantize_4bit = broken
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    with pytest.raises(ValueError, match="cannot run on cpu here .no kernel image"):
        four_bit_loading(use_cpu=True)
    functional.quantize_4bit = lambda *args, **kwargs: None
    config = four_bit_loading(use_cpu=True)["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"


def test_packed_records_do_not_see_each_other(tokenizer):
    """The loss of a packed row is that of its records alone."""
    documents = [encode_record(RECORDS["text"](name), tokenizer) for name in names(5, 3)]
    (row,) = WholeRows(documents, 160, pad_token_id=1)
    model = NemotronHForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    packed = model(**{name: tensor[None] for name, tensor in row.items()}, use_cache=False, num_items_in_batch=1).loss
    alone = sum(
        model(torch.tensor([d["input_ids"]]), labels=torch.tensor([d["labels"]]), num_items_in_batch=1).loss
        for d in documents
    )
    assert_close(packed, alone, 1e-4)
