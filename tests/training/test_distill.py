"""Distillation: the trainer's loss and gradients, a teacher that stays outside, its cache on disk, and the command."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import VOCAB, assert_close, prompt, tiny_config, tiny_model
from tiny_run import make_arguments, make_rows, read_metrics
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.scripts import distill
from nemotron_h_hf.training.distillation import DistillationTrainer
from nemotron_h_hf.training.teacher_cache import TeacherCache, fingerprint, row_digests, write_cache


def student(shape="square", **config):
    torch.manual_seed(0)
    return NemotronHForCausalLM(tiny_config(shape, **config))


def trainer_of(texts, output_dir, teacher, model=None, options=None, **fields):
    settings = {"max_steps": 3, "warmup_tokens": "0%", **fields}
    arguments = make_arguments(output_dir, **settings)
    model = student() if model is None else model
    return DistillationTrainer(model, arguments, train_dataset=make_rows(texts), teacher=teacher, **(options or {}))


def naive_kl(student_logits, teacher_logits, labels):
    """Mean over positions with a label of KL(teacher || student), from whole logits."""
    log_p, log_q = teacher_logits[:, :-1].log_softmax(-1), student_logits[:, :-1].log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return each[labels[:, 1:] != -100].mean()


def test_loss_of_the_first_step_is_the_plain_formula(texts, tmp_path):
    teacher, model = tiny_model(), student()
    rows = [row for row, _ in zip(make_rows(texts), range(4), strict=False)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        logits = [m(batch["input_ids"], position_ids=batch["position_ids"]).logits for m in (model, teacher)]
        expected = naive_kl(*logits, batch["labels"])
    trainer = trainer_of(texts, tmp_path, teacher, model)
    trainer.train()
    first = read_metrics(tmp_path)[0]
    assert_close(torch.tensor(first["loss"]), expected, 1e-5)
    assert_close(torch.tensor(first["kl"]), expected, 1e-5)
    cross_entropy = torch.nn.functional.cross_entropy(logits[0][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert_close(torch.tensor(first["cross_entropy"]), cross_entropy, 1e-5)


def test_a_mix_is_logged_as_its_parts(texts, tmp_path):
    trainer = trainer_of(texts, tmp_path, tiny_model(), options={"temperature": 2.0, "cross_entropy_weight": 0.25})
    trainer.train()
    for line in read_metrics(tmp_path):
        assert line["loss"] == pytest.approx(0.75 * line["kl"] + 0.25 * line["cross_entropy"], abs=1e-5)


def test_the_teacher_stays_outside(texts, tmp_path):
    teacher = tiny_model(attention_dropout=0.9).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = trainer_of(texts, tmp_path, teacher, save_steps=2)
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(list(trainer.model.state_dict()))
    again = NemotronHForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert_close(again(prompt()).logits, trainer.model.eval()(prompt()).logits, 0)


def test_accumulation_leaves_loss_and_weights_as_they_are(texts, tmp_path):
    whole = trainer_of(
        texts, tmp_path / "a", tiny_model(), per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    parts = trainer_of(
        texts, tmp_path / "b", tiny_model(), per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    for trainer in (whole, parts):
        trainer.train()
    for one, other in zip(read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-5)


def test_resumed_run_is_the_same_run(texts, tmp_path):
    teacher = tiny_model()
    trainer_of(texts, tmp_path / "whole", teacher, max_steps=4).train()
    trainer_of(texts, tmp_path / "cut", teacher, max_steps=4, save_steps=2).train()
    for step in (3, 4):
        folder = tmp_path / "cut" / f"checkpoint-{step}"
        if folder.exists():
            folder.rename(tmp_path / f"away-{step}")
    trainer = trainer_of(texts, tmp_path / "cut", teacher, max_steps=4, save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


def test_balance_loss_of_experts_is_part_of_it(texts, tmp_path):
    config = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    runs = []
    for name, more in (("with", config), ("without", {})):
        trainer_of(texts, tmp_path / name, tiny_model(), student("moe", **more)).train()
        runs.append(read_metrics(tmp_path / name)[0])
    assert runs[0]["kl"] == pytest.approx(runs[1]["kl"], abs=1e-6)
    assert 0.4 < runs[0]["loss"] - runs[1]["loss"] < 2  # 0.5 times what is 1 when balanced and at most 8 / 3


def test_evaluation_is_the_same_loss(texts, tmp_path):
    teacher, model = tiny_model(), student().eval()
    rows = [row for row, _ in zip(make_rows(texts), range(2), strict=False)]
    arguments = make_arguments(tmp_path)
    trainer = DistillationTrainer(model, arguments, train_dataset=make_rows(texts), eval_dataset=rows, teacher=teacher)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    logits = [m(batch["input_ids"], position_ids=batch["position_ids"]).logits for m in (model, teacher)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(naive_kl(*logits, batch["labels"]).item(), abs=1e-5)


def test_what_does_not_fit_is_refused(texts, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size is 64, the student's 97"):
        trainer_of(texts, tmp_path, tiny_model(vocab_size=64))
    with pytest.raises(ValueError, match="z_loss"):
        trainer_of(texts, tmp_path, tiny_model(), z_loss=1e-4)


# The cache


def rows_in_batches(num_rows=7, size=2):
    ids = prompt(num_rows, 11)
    positions = torch.cat([torch.arange(5), torch.arange(6)]).expand(num_rows, -1)
    return [{"input_ids": i, "position_ids": p} for i, p in zip(ids.split(size), positions.split(size), strict=True)]


def test_cache_gives_back_what_the_teacher_said(tmp_path):
    teacher, batches = tiny_model(), rows_in_batches()
    assert write_cache(tmp_path, teacher, batches, k=4, temperature=2.0, rows_per_shard=3) == 7
    assert len(list(tmp_path.glob("rows-*.safetensors"))) == 3 and not list(tmp_path.glob("*.part"))
    cache = TeacherCache(tmp_path)
    for batch in reversed(batches):
        log_p = (teacher(**batch, use_cache=False).logits / 2.0).log_softmax(-1)
        found = cache.lookup(**batch)
        expected = log_p.topk(4)
        assert torch.equal(found.ids.long(), expected.indices)
        assert_close(found.log_probs, expected.values)
        assert_close(found.log_rest.exp(), 1 - expected.values.exp().sum(-1), 1e-6)


def test_cache_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    teacher, batches = tiny_model(), rows_in_batches()
    write_cache(tmp_path, teacher, batches[:2], k=4, rows_per_shard=2)
    (tmp_path / "rows-000-00002.part").write_bytes(b"cut off")
    asked = []
    teacher.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["input_ids"]), with_kwargs=True
    )
    assert write_cache(tmp_path, teacher, batches, k=4, rows_per_shard=2) == 7
    assert torch.equal(torch.cat(asked), torch.cat([batch["input_ids"] for batch in batches[2:]]))
    assert len(TeacherCache(tmp_path)) == 7 and write_cache(tmp_path, teacher, batches, k=4) == 7


def test_cache_of_something_else_is_refused(tmp_path):
    teacher, batches = tiny_model(), rows_in_batches()
    write_cache(tmp_path, teacher, batches, k=4)
    with pytest.raises(ValueError, match="k=4, this run has 5"):
        write_cache(tmp_path, teacher, batches, k=5)
    with pytest.raises(ValueError, match="temperature=1.0, this run has 2.0"):
        write_cache(tmp_path, teacher, batches, k=4, temperature=2.0)
    with pytest.raises(ValueError, match="made with teacher="):
        write_cache(tmp_path, tiny_model(seed=1), batches, k=4)
    batch = batches[0]
    with pytest.raises(ValueError, match="made from other data"):
        TeacherCache(tmp_path).lookup(batch["input_ids"] + 1, batch["position_ids"])
    with pytest.raises(ValueError, match="made from other data"):
        TeacherCache(tmp_path).lookup(batch["input_ids"])  # the same tokens as one document
    with pytest.raises(ValueError, match="no cache.json"):
        TeacherCache(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="new or empty"):
        write_cache(tmp_path / "other", teacher, batches, k=4)


def test_fingerprint_knows_a_changed_weight_and_not_a_changed_place(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert fingerprint(NemotronHForCausalLM.from_pretrained(tmp_path)) == fingerprint(model)
    with torch.no_grad():
        model.model.layers[0].norm.weight.add_(1e-3)
    assert fingerprint(NemotronHForCausalLM.from_pretrained(tmp_path)) != fingerprint(model)


def test_digests_tell_rows_apart():
    ids = prompt(2, 11)
    assert row_digests(ids) == row_digests(ids, torch.arange(11)[None])
    assert len({*row_digests(ids), *row_digests(ids, torch.zeros(1, 11))}) == 4


def test_training_from_the_cache_is_training_from_the_teacher(texts, tmp_path):
    teacher = tiny_model()
    write_cache(
        tmp_path / "cache", teacher, [{n: t[None] for n, t in row.items()} for row in make_rows(texts)], k=VOCAB - 1
    )
    for name, source in (("live", teacher), ("cached", TeacherCache(tmp_path / "cache"))):
        trainer_of(texts, tmp_path / name, source).train()
    for live, cached in zip(read_metrics(tmp_path / "live"), read_metrics(tmp_path / "cached"), strict=True):
        assert live["kl"] == pytest.approx(cached["kl"], abs=1e-4)
    with pytest.raises(ValueError, match="temperature"):
        trainer_of(texts, tmp_path / "t", TeacherCache(tmp_path / "cache"), options={"temperature": 2.0})


# The command


def command(tmp_path, *flags):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n\n" * 40)
    small = "{hybrid_override_pattern: M-*-, hidden_size: 64, intermediate_size: 64}"
    return distill.main([
        "--data", str(tmp_path / "text.txt"), "--init", "random", "--config_overrides", small, "--sequence_length", "32",
        "--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "--logging_steps", "1", "--disable_tqdm",
        "true", *flags,
    ])  # fmt: skip


def test_totals_of_what_was_left_out_are_told(tmp_path, caplog):
    data = tmp_path / "data.jsonl"
    data.write_text('no json\n{"text": "x = 1"}\n')
    flags = ("--data", str(data), "--output_dir", str(tmp_path / "run"))
    for more in (("--eval_data", str(data)), ("--cache_teacher", str(tmp_path / "cache"))):
        assert command(tmp_path, *flags, *more) == 0
    told = [message for message in caplog.messages if "left out in all" in message]
    assert told[0] == "left out in all of source eval_data: 1 x malformed JSON" and len(told) == 3
    assert all(line.startswith("left out in all of source data: ") for line in told[1:])


def test_command_with_a_live_teacher_and_with_a_cached_one(tmp_path):
    cache = str(tmp_path / "cache")
    assert command(tmp_path, "--output_dir", str(tmp_path / "live")) == 0
    assert command(tmp_path, "--cache_teacher", cache, "--top_k", "2000", "--output_dir", str(tmp_path / "none")) == 0
    assert command(tmp_path, "--teacher_cache", cache, "--output_dir", str(tmp_path / "cached")) == 0
    lines = [read_metrics(tmp_path / name) for name in ("live", "cached")]
    assert [line["kl"] for line in lines[1]] == pytest.approx([line["kl"] for line in lines[0]], abs=1e-2)
    model = NemotronHForCausalLM.from_pretrained(tmp_path / "live" / "model")
    assert model.config.hybrid_override_pattern == "M-*-" and model.config.hidden_size == 64
    assert not list((tmp_path / "live" / "model").glob("*.bin")) and not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="made from other data"):
        command(tmp_path, "--teacher_cache", cache, "--seed", "5", "--sequence_length", "16",
                "--output_dir", str(tmp_path / "x"))  # fmt: skip
    with pytest.raises(ValueError, match="made with teacher="):
        tiny_model(vocab_size=2048).save_pretrained(tmp_path / "other")
        command(tmp_path, "--teacher_cache", cache, "--teacher", str(tmp_path / "other"), "--tokenizer", EMBEDDED_MODEL,
                "--output_dir", str(tmp_path / "y"))  # fmt: skip


def test_a_cache_is_read_with_the_tokenizer_of_the_student(tmp_path):
    """As in the command's help: neither model is the embedded one, nor is their tokenizer."""
    words = {word: number for number, word in enumerate(["<s>", "def", "add(a,", "b):", "return", "a", "+", "b"])}
    core = Tokenizer(WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>")
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n\n" * 40)
    for name, seed in (("big", 0), ("small", 1)):
        tiny_model(seed=seed, hybrid_override_pattern="M-").save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    common = ["--data", str(tmp_path / "text.txt"), "--total_tokens", "128", "--sequence_length", "32", "--use_cpu",
              "--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    cache, small = str(tmp_path / "cache"), str(tmp_path / "small")
    assert distill.main([*common, "--teacher", str(tmp_path / "big"), "--cache_teacher", cache, "--top_k", "4"]) == 0
    assert distill.main([*common, "--teacher_cache", cache, "--model", small]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").get_vocab() == words


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--temperature", "0"], "temperature=0"),
        (["--cross_entropy_weight", "2"], "cross_entropy_weight=2"),
        (["--cache_teacher", "a", "--teacher_cache", "b"], "teacher_cache"),
        (["--max_steps", "-1"], "total_tokens"),
        (["--teacher", "nowhere"], "teacher='nowhere': allowed is a checkpoint folder or a hub id"),
        (["--eval_steps", "2"], "eval_steps=2.0: allowed is none without --eval_data"),
        (["--config_overrides", "{vocab_size: 100}"], "tokenizer: .* tokens: allowed are the model's 100"),
        (["--temprature", "1"], "did you mean 'temperature'"),
    ],
)
def test_command_refuses(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command(tmp_path, *flags, "--output_dir", str(tmp_path / "run"))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    core = Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "endless")
    for flags in ((), ("--cache_teacher", str(tmp_path / "cache"))):
        with pytest.raises(ValueError, match="has no eos_token"):
            command(tmp_path, "--tokenizer", str(tmp_path / "endless"), "--output_dir", str(tmp_path / "run"), *flags)
    tiny_model(vocab_size=100).save_pretrained(tmp_path / "small")
    flags = ("--teacher", str(tmp_path / "small"), "--tokenizer", EMBEDDED_MODEL, "--output_dir", str(tmp_path / "run"))
    with pytest.raises(ValueError, match="allowed are the model's 100"):
        command(tmp_path, *flags, "--cache_teacher", str(tmp_path / "cache"))


def test_held_out_loss_before_and_after(tmp_path, capsys):
    """Every second step in the log; before is told once, of the student as it began: it is untrained."""
    (tmp_path / "held.txt").write_text("def sub(a, b):\n    return a - b\n" * 10)
    flags = ("--eval_data", str(tmp_path / "held.txt"), "--eval_steps", "2", "--cross_entropy_weight", "1",
             "--learning_rate", "1e-2", "--output_dir", str(tmp_path / "run"))  # fmt: skip
    assert command(tmp_path, *flags, "--max_steps", "5", "--warmup_tokens", "0%") == 0
    losses = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert losses["before"] == pytest.approx(torch.tensor(2048.0).log().item(), abs=0.3)
    assert losses["after"] < losses["before"] - 0.3
    evaluated = {row["step"]: row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row}
    assert sorted(evaluated) == [0, 2, 4, 5] and evaluated[0] == losses["before"] and evaluated[5] == losses["after"]
    capsys.readouterr()
    assert command(tmp_path, *flags, "--max_steps", "5", "--warmup_tokens", "0%") == 0  # done already
    assert json.loads((tmp_path / "run" / "held_out.json").read_text()) == losses
    assert "held-out loss before" not in capsys.readouterr().err


def test_identity_is_readable(tmp_path):
    write_cache(tmp_path, tiny_model(), rows_in_batches(2), k=4)
    content = json.loads((tmp_path / "cache.json").read_text())
    assert content == {
        "teacher": fingerprint(tiny_model()),
        "vocab_size": VOCAB,
        "k": 4,
        "temperature": 1.0,
        "format": 1,
    }
