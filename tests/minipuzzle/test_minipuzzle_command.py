"""`nemotron-h minipuzzle` from scores to a student on a tiny model: its files, the student, going on, refusals."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_cli import run as command
from nemotron_h_hf import EMBEDDED_MODEL, EMBEDDED_VISION_MODEL, NemotronHConfig
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.elastic.budgets import read_elastic
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.manifest import NAME as MANIFEST
from nemotron_h_hf.manifest import check_manifest
from nemotron_h_hf.minipuzzle import ranking, report, scoring, stage_files, student, tournament
from nemotron_h_hf.model.loading import weight_files
from nemotron_h_hf.units import human_bytes

SMALL = {
    "sequence_length": 32, "width_samples": 6, "layer_samples": 4, "ranking_tokens": 128, "batch_size": 2,
    "sizes": {"intermediate_size": [40, 80]}, "controls": 1, "finalists": 2, "min_distance": 1, "short_tokens": 128,
    "distill": {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True},
    "device": "cpu", "mixed_widths": True, "more_scores": ["cosine", "logits"],
}  # fmt: skip
TASK = "test_minipuzzle_command:score_by_parameters"


def score_by_parameters(model, tokenizer) -> float:
    return float(sum(weight.numel() for weight in model.parameters()))


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A teacher, a text, and a recipe."""
    box, tokenizer = tmp_path_factory.mktemp("box"), AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = tiny_model("dense", vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1)
    model.save_pretrained(box / "teacher")
    tokenizer.save_pretrained(box / "teacher")
    lines = [{"text": f"def f{n}(x):\n    return x + {n} * {n % 7}\n"} for n in range(80)]
    (box / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    most = int(0.95 * num_parameters(model.config))
    recipe = {**SMALL, "data": [str(box / "text.jsonl")], "teacher": str(box / "teacher"), "max_parameters": str(most)}
    (box / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return box


def run(box: Path, work: Path, *words: str) -> int:
    return command(["minipuzzle", "--config", str(box / "recipe.yaml"), "--work", str(work), *words])


def words_of(box: Path) -> list[str]:
    return ["--output", str(box / "student"), "--family", str(box / "family"), "--long_tokens", "128", "--tasks", TASK]


@pytest.fixture(scope="module")
def made(box) -> Path:
    """All stages, once."""
    assert run(box, box / "work", *words_of(box)) == 0
    return box


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """`made` has drawn them; every other run would take a second for it."""
    monkeypatch.setattr("nemotron_h_hf.minipuzzle.report.pictures_of", lambda found: {})


@pytest.fixture
def ranked(made, tmp_path) -> Path:
    """A work folder with what comes before benchmarks."""
    work = tmp_path / "work"
    shutil.copytree(
        made / "work", work, ignore=shutil.ignore_patterns("tournament*", "student*", "distill", "benchmark*")
    )
    return work


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_the_student_is_an_ordinary_checkpoint(made):
    folder, facts = made / "student", read(made / "work", "student")
    check_manifest(folder / MANIFEST, weight_files(folder), full=True)
    config = NemotronHConfig.from_pretrained(folder)
    expected = resolve(NemotronHConfig.from_pretrained(made / "teacher"), facts["sizes"]).config
    assert config.hybrid_override_pattern == expected.hybrid_override_pattern == facts["student"]["pattern"]
    assert num_parameters(config) == facts["student"]["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def f1(x):", return_tensors="pt")["input_ids"]
    ours = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = ours(ids).logits
        native = NativeForCausalLM.from_pretrained(folder)
        for layer in native.model.layers:
            layer.mixer.time_step_limit = (0.0, float("inf"))  # prefill there has a lower limit, whatever the file says
        torch.testing.assert_close(native(ids).logits, logits, atol=1e-4, rtol=1e-4)
    card = (folder / "README.md").read_text()
    gone = sorted(set(range(7)) - set(facts["sizes"]["layers"]))
    assert f"counted from 0: {', '.join(map(str, gone)) or 'none'}." in card and "distilled on 256 tokens" in card
    assert f"{human_bytes(facts['teacher']['bytes'])} -> {human_bytes(facts['student']['bytes'])} (" in card


def test_the_stages_agree_with_each_other(made):
    work = made / "work"
    candidates, found = read(work, "candidates")["candidates"], read(work, "ranked")
    names = {one["name"] for one in candidates}
    assert {one["name"] for one in found["ranked"]} == names and "mixed" in names
    order = [one["place"] for one in found["ranked"]]
    assert order == sorted(order)
    benchmarked, held = read(work, "benchmarked"), read(work, "tournament")
    assert benchmarked["order"][0] == max(benchmarked["scores"], key=lambda name: benchmarked["scores"][name][TASK])
    assert set(held["rounds"][0]) == set(benchmarked["finalists"]) and len(benchmarked["finalists"]) == 2
    assert held["winner"] == min(held["rounds"][0], key=lambda name: held["rounds"][0][name]["after"])
    assert not list(work.rglob("checkpoint-*")) and not list(work.glob(".*.partial.json"))


def test_controls_keep_as_much_as_the_best(made):
    found = read(made / "work", "ranked")
    best = next(one for one in found["ranked"] if one["name"] != "mixed")
    rules = {one["rule"]: one for one in found["controls"]}
    assert set(rules) == {"reversed", "first and last", "depth alone", "width alone", "random 0"}
    pattern = read(made / "work", "scores")["pattern"]
    for rule in ("reversed", "first and last", "random 0"):
        kept, other = (sorted(pattern[layer] for layer in one["sizes"]["layers"]) for one in (best, rules[rule]))
        assert kept == other and rules[rule]["sizes"]["intermediate_size"] == best["sizes"]["intermediate_size"]
        assert 0 < rules[rule]["loss"] < 20
    assert rules["depth alone"]["sizes"] is None or rules["depth alone"]["sizes"]["intermediate_size"] == 80
    assert len(rules["width alone"]["sizes"]["layers"]) == 7


def test_scores_of_several_measures_are_there(made):
    importance = read(made / "work", "scores")["importance"]
    assert set(importance) == {"hidden", "cosine", "logits"}
    assert all(set(found["mean"]) == set(map(str, range(7))) for found in importance.values())


def test_the_report_is_one_file_each(made):
    page, text = ((made / "work" / f"report.{kind}").read_text() for kind in ("html", "md"))
    titles = ("Layer importance", "Candidates", "Controls", "Tournament", "The student")
    assert all(title in page and f"## {title}" in text for title in titles)
    assert "src=" not in page and "<script" not in page and page.count("<svg") in (0, 4)  # 0 without matplotlib
    assert "mixed" in text


def test_the_report_compares_controls_with_the_candidate_they_follow(made):
    """That is the best of one width in all layers, even where mixed widths rank first."""
    found = read(made / "work", "ranked")
    found["ranked"].sort(key=lambda one: one["name"] != "mixed")
    (section,) = (one for one in report.sections_of({"ranked": found}) if one.title == "Controls")
    assert section.table[1][3] == f"{found['ranked'][1]['loss']:.4f}" != f"{found['ranked'][0]['loss']:.4f}"


def test_the_family_is_a_parent_of_the_finalists(made):
    config = NemotronHConfig.from_pretrained(made / "family")
    named = read_elastic(config).budgets
    finalists = read(made / "work", "benchmarked")["finalists"]
    assert set(named) == {"full", *finalists}
    for name in finalists:
        from_parent = AutoModelForCausalLM.from_pretrained(made / "family", budget=name).state_dict()
        start = AutoModelForCausalLM.from_pretrained(made / "work" / "tournament" / name / "start").state_dict()
        assert all(torch.equal(weight, start[place]) for place, weight in from_parent.items())


def test_what_is_done_is_not_done_again(made, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a stage ran again")

    for module, name in ((scoring, "measure_width"), (ranking, "rank"), (tournament, "distill"), (student, "distill")):
        monkeypatch.setattr(module, name, refuse)
    before = {path: path.stat().st_mtime_ns for path in (made / "student").iterdir()}
    assert run(made, made / "work", *words_of(made)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (made / "student").iterdir()}


def test_an_interrupted_ranking_repeats_nothing(made, ranked, monkeypatch):
    """It is stopped after some candidates, and finds the same when it goes on."""
    (ranked / "ranked.json").unlink()
    monkeypatch.setattr("nemotron_h_hf.minipuzzle.stage_files.SAVE_SECONDS", -1.0)
    real, seen = ranking.rank, []

    def stopping(*args):
        for number, _ in enumerate(real(*args)):
            seen.append(number)
            yield
            if len(seen) == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(ranking, "rank", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(made, ranked, "--controls", "0", "--until", "ranked")
    assert run(made, ranked, "--controls", "0", "--until", "ranked") == 0
    again, whole = (read(folder, "ranked") for folder in (ranked, made / "work"))
    steady = ("name", "accuracy", "agreement")
    assert [[one[name] for name in steady] for one in again["ranked"]] == [
        [one[name] for name in steady] for one in whole["ranked"]
    ]
    assert len(seen) == 2 * len(whole["ranked"])  # two batches, each candidate once


@pytest.mark.slow
def test_tasks_of_the_harness_and_long_context(made, ranked, tmp_path, monkeypatch):
    """By name: a task of one's own for lm-eval, and needles; the teacher is asked too."""
    pytest.importorskip("lm_eval")
    rows = [{"q": f"def f{n}(x):", "choices": ["return", "pass"], "a": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choose.yaml").write_text(
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\ntest_split: test\n"
        'doc_to_text: "{{q}}"\ntask: choose\noutput_type: multiple_choice\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{a}}"\nmetric_list: [{metric: acc}]\n'
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["--tasks", "choose", "needle", "--task_path", str(tmp_path), "--task_limit", "1", "--task_length", "400"]
    assert run(made, ranked, *words, "--top", "1", "--until", "benchmarked") == 0
    found = read(ranked, "benchmarked")
    assert set(found["teacher"]) == {"choose", "needle"} and len(found["order"]) == 1
    scores = found["scores"][found["order"][0]]
    assert scores["mean"] == pytest.approx((scores["choose"] + scores["needle"]) / 2)
    assert all(0 <= value <= 1 for value in found["teacher"].values())


def test_a_full_disk_loses_nothing(made, ranked, monkeypatch):
    """The error names the file; what was there stays, and the same command goes on."""
    (ranked / "ranked.json").unlink()
    real = stage_files.write_json

    def full(path, content):
        if path.name == "ranked.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(stage_files, "write_json", full)
    with pytest.raises(OSError, match="No space left on device.*ranked.json"):
        run(made, ranked, "--controls", "0", "--until", "ranked")
    assert not (ranked / "ranked.json").exists() and (ranked / "scores.json").is_file()
    monkeypatch.undo()
    monkeypatch.setattr("nemotron_h_hf.compression.ranking.predict", lambda *_: pytest.fail("a candidate ran again"))
    assert run(made, ranked, "--controls", "0", "--until", "ranked") == 0


@pytest.mark.slow
def test_two_rounds_read_a_cache_of_the_teacher(made, ranked):
    words = ["--tasks", TASK, "--rounds", "2", "--top_k", "8", "--distill_controls", "--controls", "1"]
    assert run(made, ranked, *words, "--finalists", "2", "--until", "tournament") == 0
    found = read(ranked, "tournament")
    finalists = read(ranked, "benchmarked")["finalists"]
    trained = [name for name in found["rounds"][0] if name.startswith("control ")]
    assert "control reversed" in trained and set(found["rounds"][0]) == {*finalists, *trained}
    assert set(found["rounds"][1]) == {found["winner"]} and found["winner"] in finalists
    assert not list((ranked / "tournament").glob("teacher-*"))


@pytest.mark.slow
def test_distillation_may_be_started_by_a_launcher(made, ranked):
    assert run(made, ranked, "--finalists", "1", "--launch", sys.executable, "--until", "tournament") == 0
    assert len(read(ranked, "tournament")["rounds"][0]) == 1
    (ranked / "tournament.json").unlink()
    with pytest.raises(ValueError, match="launch='false': allowed is a command that trains; it ended with status 1"):
        run(made, ranked, "--finalists", "1", "--launch", "false", "--until", "tournament")


# Refusals


def test_a_work_folder_of_other_arguments_is_refused(made, ranked):
    with pytest.raises(ValueError, match=r"layer_samples=3: allowed is 4, which .*scores.json was made with"):
        run(made, ranked, "--layer_samples", "3")
    with pytest.raises(ValueError, match="controls=2"):
        run(made, ranked, "--controls", "2")
    with pytest.raises(ValueError, match="limits=.*: allowed is"):
        run(made, ranked, "--max_parameters", "100K")


def test_a_work_folder_of_another_teacher_is_refused(made, ranked, tmp_path):
    shutil.copytree(made / "teacher", tmp_path / "other")
    refusal = r"teacher=\['[^']*other/[^]]*\]: allowed is \['[^']*teacher/[^]]*\], which .*scores.json was made with"
    with pytest.raises(ValueError, match=refusal):  # one file of each
        run(made, ranked, "--teacher", str(tmp_path / "other"))


def test_folders_in_use_are_refused(box, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="work=.*mine.*: allowed is a new or empty folder"):
        run(box, tmp_path / "mine")
    with pytest.raises(ValueError, match="the target .* is the source"):
        run(box, box / "teacher")
    with pytest.raises(ValueError, match="is inside the source"):
        run(box, tmp_path / "work", "--output", str(box / "teacher" / "student"))
    with pytest.raises(ValueError, match="is inside the source"):
        run(box, tmp_path / "work", "--output", str(tmp_path / "work" / "student"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_parameters", "1K"], r"parameters='1,000': allowed is [\d,]+ or more, the smallest"),
        (["--max_parameters", "1B"], "the teacher itself fits"),
        (
            ["--budget", "1KiB@1M"],
            r"bytes='1.0 KiB': allowed is .* GiB or more|bytes='1.0 KiB': allowed is .* MiB",
        ),
    ],
)
def test_limits_that_make_no_sense(box, tmp_path, monkeypatch, words, message):
    """They are refused before the scoring, which takes hours of a large teacher."""
    monkeypatch.setattr("nemotron_h_hf.minipuzzle.pipeline.score", lambda run: pytest.fail("it was scored"))
    with pytest.raises(ValueError, match=message):
        run(box, tmp_path / "work", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--width_samples", "5000"], r"width_samples: 5000 rows of 32 tokens are asked for, the text has"),
        (["--ranking_tokens", "1M"], r"ranking_tokens=1,000,000: allowed is at most what the 80 documents have"),
        (["--layer_samples", "7"], "layer_samples=7: allowed is at most width_samples=6"),
        (["--sizes", "{width: [3]}"], "sizes='width'"),
        (["--sizes", "{intermediate_size: [81]}"], "intermediate_size=81"),
        (["--counts", "{experts: [1, 2]}"], "counts='experts'"),
        (["--counts", "{moe: [1, 2]}"], "counts='moe': allowed is attention, mamba, mlp"),
        (["--distill", "{output_dir: here}"], "distill='output_dir'"),
        (["--distill", "{learning_rat: 1}"], "distill.*'learning_rat'.*did you mean 'learning_rate'"),
        (["--weights", "fp3"], "weights"),
        (["--budget", "31"], "budget='31': allowed is bytes at a context"),
        (["--until", "student"], "output=None: allowed is a folder"),
        (["--teacher", EMBEDDED_VISION_MODEL], "teacher=.*nemotron_h_vl.*: allowed is a model of nemotron_h"),
        (["--max_seconds", "1"], "latency=None"),
        (["--tasks", "no_module:score"], "tasks='no_module:score'"),
        (["--budgit", "1GiB"], "unknown option --budgit; did you mean 'budget'"),
    ],
)
def test_wrong_arguments_name_themselves(box, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(box, tmp_path / "work", *words)


def test_a_quantised_teacher_is_refused(box, tmp_path):
    shutil.copytree(box / "teacher", tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config"):
        run(box, tmp_path / "work", "--teacher", str(tmp_path / "teacher"))


TEACHERS = {
    "attention_free": ({}, ["--sizes", "{intermediate_size: [40, 80]}"]),
    "moe": ({}, ["--sizes", "{moe_intermediate_size: [16, 24]}"]),
    "puzzle": ({"moe_intermediate_size": [24, 16], "n_routed_experts": [8, 6]}, ["--sizes", "{}", "--mixed_widths", "false"]),
}  # fmt: skip


@pytest.mark.parametrize("shape", TEACHERS)
def test_other_teachers(shape, box, tmp_path):
    """Without attention, with experts instead of MLPs, with experts that differ by layer."""
    tokenizer, (fields, words) = AutoTokenizer.from_pretrained(EMBEDDED_MODEL), TEACHERS[shape]
    given = {"vocab_size": len(tokenizer), "eos_token_id": 0, "pad_token_id": 1, **fields}
    model = tiny_model("moe" if shape == "puzzle" else shape, **given)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    most = int(0.9 * num_parameters(model.config))
    words = ["--teacher", str(tmp_path / "teacher"), "--max_parameters", str(most), "--controls", "0", *words]
    assert run(box, tmp_path / "work", *words, "--until", "ranked") == 0
    ranked = read(tmp_path / "work", "ranked")["ranked"]
    assert ("mixed" in {one["name"] for one in ranked}) == (shape != "puzzle")
    for one in ranked:
        found = num_parameters(resolve(model.config, one["sizes"]).config)
        assert found == one["costs"]["parameters"] <= most and 0 < one["agreement"] <= 1


def test_layers_may_be_removed_one_by_one(box, tmp_path):
    """The least important one goes, and the rest is scored anew."""
    words = ["--layer_score", "removal", "--mixed_widths", "false", "--more_scores", "hidden", "--dtype", "float32"]
    assert run(box, tmp_path / "work", *words, "--until", "candidates") == 0
    order = read(tmp_path / "work", "scores")["importance"]["removal"]["rank"]
    removals = json.loads((tmp_path / "work" / "depth.json").read_text())["removals"]
    assert [entry["layer"] for entry in removals] == sorted(map(int, order), key=lambda layer: order[str(layer)])[:3]
    assert all(entry["layer"] == int(min(entry["scores"], key=entry["scores"].get)) for entry in removals)
    assert len(removals[1]["scores"]) == 6 and str(removals[0]["layer"]) not in removals[1]["scores"]
    for score in ("removal", "cosine"):
        with pytest.raises(ValueError, match=f"mixed_widths=True: allowed is false with layer_score {score}"):
            run(box, tmp_path / "other", "--layer_score", score)


def test_further_axes(box, tmp_path):
    """Heads and embedding channels as dimensions of the grid; figures are those of the budget cut out."""
    words = [
        "--sizes",
        "{mamba_num_heads: [4, 8], hidden_size: [32, 48]}",
        "--mixed_widths",
        "false",
        "--controls",
        "0",
    ]
    words += ["--counts", "{mamba: [3, 3], mlp: [3, 3]}", "--dtype", "float32", "--max_parameters", "260K"]
    assert run(box, tmp_path / "work", *words, "--keep", "all", "--until", "ranked") == 0
    found = read(tmp_path / "work", "ranked")["ranked"]
    assert {(one["sizes"]["mamba_num_heads"], one["sizes"]["hidden_size"]) for one in found} >= {(4, 32), (8, 32)}
    teacher = NemotronHConfig.from_pretrained(box / "teacher")
    for one in found:
        assert one["costs"]["parameters"] == num_parameters(resolve(teacher, one["sizes"]).config) <= 260_000


def test_streaming_scores_the_same_and_reads_a_layer_once(box, tmp_path, monkeypatch):
    """With one layer in memory; the work folder then goes on with the whole teacher."""
    words = ["--mixed_widths", "false", "--dtype", "float32"]
    for name, more in (("whole", []), ("streamed", ["--stream"])):
        assert run(box, tmp_path / name, *words, *more, "--until", "candidates") == 0
    found, expected = (read(tmp_path / name, "scores") for name in ("streamed", "whole"))
    for branch, errors in expected["errors"]["hidden"].items():
        assert found["errors"]["hidden"][branch] == pytest.approx(errors, rel=1e-4)
    assert read(tmp_path / "streamed", "candidates") == read(tmp_path / "whole", "candidates")
    assert run(box, tmp_path / "streamed", *words, "--until", "ranked") == 0
    with pytest.raises(ValueError, match="stream=True: allowed is false"):
        run(box, tmp_path / "streamed", *words, "--stream")


def test_times_of_a_table_limit_too(made, ranked, tmp_path):
    for path in ("candidates.json", "ranked.json"):
        (ranked / path).unlink()
    table = {"outside": 1.0, "full_attention": 2.0, "linear_attention": 3.0, "mlp": {"40": 0.25, "80": 0.5}}
    (tmp_path / "times.json").write_text(json.dumps(table))
    words = ["--latency", str(tmp_path / "times.json"), "--max_seconds", "8.8", "--mixed_widths", "false"]
    assert run(made, tmp_path / "fresh", *words, "--until", "candidates") == 0
    found = read(tmp_path / "fresh", "candidates")
    assert found["teacher"]["seconds"] == 1 + 2 + 3 * 3 + 3 * 0.5
    for one in found["candidates"]:
        kinds = one["counts"]
        expected = 1 + 2 * kinds["attention"] + 3 * kinds["mamba"]
        expected += {40: 0.25, 80: 0.5}[one["sizes"]["intermediate_size"]] * kinds["mlp"]
        assert one["costs"]["seconds"] == pytest.approx(expected) and expected <= 8.8
