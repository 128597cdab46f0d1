"""`nemotron-h eval` on a vision-language model: lm-evaluation-harness hands it pictures."""

import json

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("PIL")
from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from nemotron_h_cli import main  # noqa: E402
from nemotron_h_hf import EMBEDDED_VISION_MODEL  # noqa: E402
from nemotron_h_hf.evaluation import harness  # noqa: E402

PICTURE = f"{EMBEDDED_VISION_MODEL}/digits.png"
QUESTIONS = [f"digit in tile {number:02d} ?" for number in (1, 2, 5)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A task of free answers about one picture, on local files."""
    rows = [{"question": question, "picture": PICTURE, "answer": "4"} for question in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pictures_of.py").write_text(
        "from PIL import Image\n\ndef pictures(doc):\n    return [Image.open(doc['picture'])]\n"
    )
    (tmp_path / "look.yaml").write_text(
        f"task: look\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        'test_split: test\noutput_type: generate_until\ndoc_to_text: "<bos><image>{{question}}"\n'
        'doc_to_image: !function pictures_of.pictures\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: [], max_gen_toks: 1, do_sample: false}\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        harness, "task_manager", lambda path: TaskManager(include_path=str(tmp_path), include_defaults=False)
    )
    return tmp_path


def test_answers_are_those_of_generate(folder):
    command = ["eval", "--model", EMBEDDED_VISION_MODEL, "--tasks", "look", "--device", "cpu"]
    assert main([*command, "--output", str(folder / "out")]) == 0
    lines = [json.loads(line) for line in (folder / "out" / "harness_look.jsonl").read_text().splitlines()]
    said = {line["doc"]["question"]: line["filtered_resps"][0].strip() for line in lines}
    processor = AutoProcessor.from_pretrained(EMBEDDED_VISION_MODEL)
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_VISION_MODEL, dtype=torch.float32)
    texts = [f"<bos><image>{question}" for question in QUESTIONS]
    inputs = processor(images=[[PICTURE]] * 3, text=texts, return_tensors="pt", add_special_tokens=False)
    answers = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
    assert said == dict(zip(QUESTIONS, processor.batch_decode(answers[:, None]))) and len(set(said.values())) > 1
    (row,) = json.loads((folder / "out" / "results.json").read_text())["harness"]
    right = sum(answer == "4" for answer in said.values()) / 3
    assert harness.figures(row)[0][:3] == ("look", "exact_match", pytest.approx(right))
