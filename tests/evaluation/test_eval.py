"""`nemotron-h eval`: bits per byte, the folder, other models, tasks of lm-evaluation-harness, the command line."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import native_twin, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.data.stdlib_text import read_documents, split_documents
from nemotron_h_hf.evaluation import asking, harness, held_out, long_context_plot, results_table, texts
from nemotron_h_hf.evaluation.harness import HarnessOptions, HarnessTask
from nemotron_h_hf.evaluation.sample_records import Records, claim
from nemotron_h_hf.scripts import eval as command

HARNESS_TASKS = Path(find_spec("lm_eval").origin).parent / "tasks"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype="float32").eval()


@torch.no_grad()
def nats(model, ids: list[int], first: int) -> float:
    """Of ids[first:] given what is before them, from one forward over all, in double precision."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    chosen = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    return -float(chosen[first - 1 :].sum())


# Bits per byte


def test_bits_per_byte_is_the_sum_of_log_probabilities(model, tokenizer, tmp_path):
    documents = [("a", "def one():\n    return 1\n"), ("b", "import os\nprint('naïve')\n" * 20)]
    found = held_out.evaluate(model, tokenizer, documents, 1024, 512, Records(tmp_path / "samples.jsonl"))
    bits, end = 0.0, tokenizer.eos_token_id
    for _, text in documents:
        bits += nats(model, [end, *tokenizer(text)["input_ids"], end], first=1) / math.log(2)
    num_bytes = sum(len(text.encode()) for _, text in documents)
    assert found["num_bytes"] == num_bytes > sum(len(text) for _, text in documents)
    assert found["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-5)


def test_bits_per_byte_goes_on_after_an_interruption(model, tokenizer, tmp_path, monkeypatch):
    documents = [(str(i), f"x = {i}\n" * 5) for i in range(4)]
    path = tmp_path / "samples.jsonl"
    before = held_out.evaluate(model, tokenizer, documents[:3], 64, 32, Records(path))
    scored = []
    monkeypatch.setattr(held_out, "document_bits", lambda *arguments: scored.append(arguments) or 0.0)
    found = held_out.evaluate(model, tokenizer, documents, 64, 32, Records(path))
    assert len(scored) == 1 and found["num_documents"] == 4
    assert found["bits_per_byte"] * found["num_bytes"] == pytest.approx(before["bits_per_byte"] * before["num_bytes"])


def test_texts_are_files_or_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('\ufeff{"body": "x\\u2028y"}\n\n{"body": "z"}\n')
    found = list(texts.read_texts([str(tmp_path / "*.txt"), str(tmp_path / "*.jsonl"), str(tmp_path / "a*")], "body"))
    assert [text for _, text in found] == ["one\ntwo\n", "x\u2028y", "z"]
    assert [name.rsplit("/")[-1] for name, _ in found] == ["a.txt", "b.jsonl:1", "b.jsonl:3"]


@pytest.mark.parametrize(
    "content, message",
    (
        (b'{"text": 1}\n', "column: .* line 1 has no text in 'text'; it has text"),
        (b'{"text": "a"}\n{"body": "b"}\n', "column: .* line 2 has no text in 'text'; it has body"),
        (b'{"text": "a"}\n{"te\n', "line 2 is not JSON"),
        (b'{"text": "a", "id": ' + b"7" * 5000 + b"}\n", "line 1 is not JSON"),
        (b'{"text": "a \\udE00"}\n', r"line 1 has half a character, \\ude00 alone"),
        (b'{"text": "\xff"}\n', "is not UTF-8 at byte 10"),
    ),
)
def test_bad_text_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(texts.read_texts([str(path)]))


# The folder


def test_a_folder_belongs_to_one_evaluation(tmp_path):
    claim(tmp_path, "model.json", {"seed": 0, "shape": (1, 2)})
    claim(tmp_path, "model.json", {"seed": 0, "shape": (1, 2)})
    with pytest.raises(ValueError, match="seed=1: allowed is 0, which the evaluation in .* was begun with"):
        claim(tmp_path, "model.json", {"seed": 1, "shape": (1, 2)})


# lm-evaluation-harness


@pytest.fixture
def own_tasks(tmp_path, monkeypatch) -> TaskManager:
    """A task of two choices and one of free answers, on local files."""
    rows = [
        {"q": "def f(x):\n    return", "choices": ["x", "banana split"], "a": 0},
        {"q": "import", "choices": ["os\n", "(((", "sys"], "a": 2},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\ntest_split: test\n"
    )
    common += 'doc_to_text: "{{q}}"\n'
    (tmp_path / "choose.yaml").write_text(
        common + "task: choose\noutput_type: multiple_choice\n"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{a}}"\nmetric_list: [{metric: acc}]\n'
    )
    (tmp_path / "write.yaml").write_text(
        common + 'task: write\noutput_type: generate_until\ndoc_to_target: "{{choices[a]}}"\n'
        "metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: [], max_gen_toks: 4, do_sample: false}\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.parametrize("batch_size", (1, 3))
def test_harness_gets_the_models_own_likelihoods(own_tasks, model, tokenizer, tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 256)
    tasks, options = [HarnessTask("choose"), HarnessTask("write")], HarnessOptions(batch_size=batch_size)
    records, said = Records(tmp_path / "out" / "samples.jsonl"), []
    chosen, written = harness.evaluate(model, tokenizer, tasks, own_tasks, options, records, said.append)
    lines = (tmp_path / "out" / "harness_choose.jsonl").read_text().splitlines()
    right = 0
    for row in sorted(map(json.loads, lines), key=lambda row: row["doc_id"]):
        question, choices = row["doc"]["q"], row["doc"]["choices"]
        before = tokenizer(question)["input_ids"]
        own = []
        for choice in choices:
            ids = tokenizer(f"{question} {choice}")["input_ids"]
            assert ids[: len(before)] == before
            own.append(-nats(model, ids, first=len(before)))
        assert [float(pair[0]) for pair in row["filtered_resps"]] == pytest.approx(own, abs=2e-4)
        right += own.index(max(own)) == row["doc"]["a"]
    assert harness.figures(chosen)[0][:3] == ("choose", "acc", right / len(lines))
    prompt = tokenizer("import", return_tensors="pt", return_token_type_ids=False)
    alone = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answers = [json.loads(line) for line in (tmp_path / "out" / "harness_write.jsonl").read_text().splitlines()]
    (answer,) = [row["filtered_resps"][0] for row in answers if row["doc"]["q"] == "import"]
    assert answer == tokenizer.decode(alone, skip_special_tokens=True)
    assert [name for name, _, _, _ in harness.figures(written)] == ["write"]
    assert len(said) == 2
    assert model.generation_config.max_new_tokens == 256  # put aside for the harness, whose limit it would beat
    again = harness.evaluate(model, tokenizer, tasks, own_tasks, options, Records(records.path), said.append)
    assert again == [chosen, written] and len(said) == 2


@pytest.mark.parametrize("shape", ("dense", "moe"))
@pytest.mark.parametrize("batch_size", (1, 4))
def test_harness_gives_ours_what_it_gives_transformers_own_class(shape, batch_size, tokenizer):
    """Log-likelihoods of continuations of unequal length, and greedy answers from a left-padded batch."""
    ours = tiny_model(shape, vocab_size=2048, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    pairs = [
        ("def f(x):", " return x"),
        ("import", " os, sys, re\nclass A"),
        ("a", " b"),
        ("for i in range(10):\n", "    i"),
    ]
    questions = [
        ("import os\nimport", {"until": [], "max_gen_toks": 6, "do_sample": False}),
        ("a =", {"until": [], "max_gen_toks": 6}),
    ]
    answers = []
    for model in (ours, native_twin(ours)):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=256)
        scores = wrapped.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
        texts = wrapped.generate_until([Instance("generate_until", {}, q, 0) for q in questions], disable_tqdm=True)
        answers.append(([score for score, _ in scores], [greedy for _, greedy in scores], texts))
    (mine, my_greedy, my_texts), (theirs, their_greedy, their_texts) = answers
    assert mine == pytest.approx(theirs, abs=2e-4) and my_greedy == their_greedy and my_texts == their_texts
    assert min(mine) < -10


def test_the_embedded_model_leaves_the_length_to_the_caller(model, tokenizer):
    """A `max_new_tokens` in its generation_config.json would win over the `max_length` that the harness sends."""
    prompt = tokenizer("import", return_tensors="pt", return_token_type_ids=False)
    length = prompt["input_ids"].shape[1] + 4
    written = model.generate(**prompt, max_length=length, do_sample=False, eos_token_id=None)
    assert written.shape[1] == length


def test_every_task_of_our_groups_is_in_the_harness():
    folders = ["mmlu/default", "mmlu_pro", "gsm8k", "minerva_math", "humaneval", "aime", "gpqa/cot_zeroshot", "arc",
               "hellaswag", "openbookqa", "piqa", "winogrande", "benchmarks"]  # fmt: skip
    manager = TaskManager(include_path=[str(HARNESS_TASKS / name) for name in folders], include_defaults=False)
    names = {task.name for tasks, _ in harness.GROUPS.values() for task in tasks}
    assert names <= set(manager.all_tasks)


@pytest.mark.slow
def test_our_names_are_not_the_harnesss():
    manager = harness.task_manager(None)
    assert set(command.OWN_NAMES).isdisjoint(manager.all_tasks)
    tasks = [task for tasks, _ in harness.GROUPS.values() for task in tasks]
    harness.check_tasks(tasks, manager, command.OWN_NAMES, allow_code=True)


def test_unknown_tasks_and_code_are_refused(own_tasks):
    with pytest.raises(ValueError, match="tasks: 'chose' is not known; did you mean choose"):
        harness.check_tasks([HarnessTask("chose")], own_tasks, command.OWN_NAMES, allow_code=False)
    with pytest.raises(ValueError, match="'needel' is not known; did you mean needle"):
        harness.check_tasks([HarnessTask("needel")], own_tasks, command.OWN_NAMES, allow_code=False)
    manager = TaskManager(include_path=str(HARNESS_TASKS / "humaneval"), include_defaults=False)
    with pytest.raises(ValueError, match="humaneval runs code that the model wrote; --allow-code"):
        harness.check_tasks([HarnessTask("humaneval")], manager, command.OWN_NAMES, allow_code=False)
    with pytest.raises(ValueError, match="include_path: nowhere is not a folder"):
        harness.task_manager("nowhere")


def test_a_groups_own_figures_stand_for_its_tasks():
    values = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "x", "sample_len": 3}
    row = {"task": "group", "results": {"group": values, "part": values}}
    assert harness.figures(row) == [("group", "acc", 0.5, 0.1)]
    row = {"task": "tag", "results": {"one": {**values, "acc_stderr,none": "N/A"}, "two": values}}
    assert harness.figures(row) == [("one", "acc", 0.5, None), ("two", "acc", 0.5, 0.1)]


# The command


SMALL = ["--tasks", "bpb,needle", "--limit", "1", "--lengths", "320,384", "--depths", "0,100", "--device", "cpu"]


@pytest.fixture
def short_text(tmp_path) -> list[str]:
    (tmp_path / "held_out.txt").write_text("def f():\n    return 1\n")
    words = ["".join(letters) for letters in itertools.product("abst", repeat=4)]
    sentences = (" ".join(["All", *words[i : i + 10]]) + ".\n" for i in range(0, 250, 10))
    (tmp_path / "prose.txt").write_text("".join(sentences))
    return ["--text", str(tmp_path / "held_out.txt"), "--haystack", str(tmp_path / "prose.txt")]


def test_command_evaluates_resumes_and_adds(tmp_path, short_text, capsys, monkeypatch):
    folder = tmp_path / "out"
    argv = [*SMALL, *short_text, "--output", str(folder)]
    assert command.main(argv) == 0
    shown = capsys.readouterr().out
    num_weights = num_parameters(NemotronHConfig.from_pretrained(EMBEDDED_MODEL))
    assert f"embedded, {num_weights:,} parameters, float32" in shown and "bits per byte" in shown
    assert "at depth 100%" in shown and "384" in shown
    results = json.loads((folder / "results.json").read_text())
    assert results["command"].startswith("nemotron-h eval --tasks bpb,needle")
    assert results["model"]["pattern"] == "M-M*-M-" and results["settings"]["seed"] == 0
    assert results["settings"]["model"] == "embedded"  # and not where this machine keeps it
    assert {(row["length"], row["depth"]) for row in results["long_context"]} == {
        (length, depth) for length in (320, 384) for depth in (None, 0.0, 1.0)
    }
    assert (folder / "long_context.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 1 + 2 * 2

    asked = []
    monkeypatch.setattr(
        asking, "greedy_answers", lambda model, prompts, *_: asked.extend(prompts) or [[5]] * len(prompts)
    )
    assert command.main(argv) == 0 and not asked
    assert command.main([*argv, "--lengths", "320,384,448"]) == 0 and len(asked) == 2
    with pytest.raises(ValueError, match="seed=1"):
        command.main([*argv, "--seed", "1"])
    (tmp_path / "held_out.txt").write_text("other text\n")
    with pytest.raises(ValueError, match="text=.*: allowed is"):
        command.main(argv)


def test_command_takes_other_models(tmp_path, short_text, tokenizer, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    argv = ["--model", str(tmp_path / "llama"), *SMALL, *short_text[:2], "--output", str(tmp_path / "out")]
    assert command.main(argv) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["class"] == "LlamaForCausalLM" and results["model"]["pattern"] is None
    assert results["bpb"]["bits_per_byte"] > 3  # the weights are random


def test_default_text_is_what_training_left_out(monkeypatch, tmp_path):
    scored = []
    monkeypatch.setattr(command.held_out, "evaluate", lambda *arguments: scored.extend(arguments[2]))
    arguments = command.parse(["--output", str(tmp_path), "--limit", "7"])
    command.run_bits_per_byte(None, None, arguments, None)
    train, held_out_documents = split_documents(read_documents())
    assert [text for _, text in scored] == [document.text for document in held_out_documents[:7]]
    assert {text for _, text in scored}.isdisjoint(document.text for document in train)


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
        command.main([*SMALL, "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="mine.txt is a file: allowed is a folder"):
        command.main([*SMALL, "--output", str(tmp_path / "mine.txt")])


@pytest.mark.parametrize(
    "argv, message",
    (
        (["--lengths", "4k,x"], "--lengths='x': allowed is a number of tokens such as"),
        (["--lengths", "0"], "--lengths='0'"),
        (["--depths", "101"], "--depths has '101': allowed are numbers from 0 to 100"),
        (["--depths", "nan"], "--depths has 'nan'"),
        (["--tasks", ","], "--tasks is ','; give at least one"),
        (["--limit", "0"], "--limit=0: allowed is 1 or more"),
        (["--window", "8", "--stride", "8"], "--stride=8: allowed is below --window, 8"),
        (["--window", "1"], "--stride=1: allowed is below --window, 1"),
    ),
)
def test_wrong_options_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        command.parse(argv)


def test_options_are_read():
    arguments = command.parse(["--lengths", "1Ki, 2KI,1Mi,100,1k", "--depths", "0,12.5", "--tasks", "bpb, needle,bpb"])
    assert arguments.lengths == (1024, 2048, 2**20, 100, 1000)
    assert arguments.depths == (0.0, 0.125) and arguments.tasks == ("bpb", "needle")
    assert arguments.stride == 1024


def test_chat_needs_a_template(tmp_path):
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.jinja"))
    with pytest.raises(ValueError, match="--chat: the tokenizer of .* has no chat template"):
        command.main([*SMALL, "--chat", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")])


def test_help_names_every_task(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in command.OWN_NAMES)


def test_table_and_plot_take_gaps(tmp_path):
    """Lengths that were added for one task only."""
    rows = [
        {"task": task, "length": length, "depth": depth, "score": value, "stderr": None, "num_samples": 1}
        for task, length, depth, value in (
            ("needle", 256, None, 0.5), ("needle", 256, 0.0, 1.0), ("needle", 512, 1.0, 0.0), ("facts", 512, None, 0.25),
        )
    ]  # fmt: skip
    lines = results_table.table({"long_context": rows})
    assert lines[2].split() == ["needle", "50.0", "-", "50.0"] and lines[-1].split() == ["facts", "-", "25.0", "25.0"]
    long_context_plot.draw(rows, "gaps", tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").stat().st_size > 1000
