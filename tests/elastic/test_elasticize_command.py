"""`nemotron-h elasticize` on a tiny model: an ordinary checkpoint, an untouched source, resuming, bad input."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import AutoTokenizer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_cli import main
from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.data.packed_text import packed_rows
from nemotron_h_hf.elastic.budgets import read_elastic
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.manifest import NAME as MANIFEST
from nemotron_h_hf.model.moe import NemotronHMLP
from nemotron_h_hf.scripts import elasticize as command
from nemotron_h_hf.scripts.elasticize import read_budgets, read_choices

SMALL = ["--rows", "3", "--held_out_rows", "1", "--sequence_length", "48", "--depth_rows", "1", "--removals", "1",
         "--choices", "hidden_size=32", "--dtype", "float32", "--device", "cpu"]  # fmt: skip
BUDGETS = ["--budget", "a:hidden_size=32,mamba_num_heads=4,depth=6", "--budget", "b:intermediate_size=48"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    sentences = [f"for index in range({number}): print(index * {number})" for number in range(60)]
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer) -> str:
    """A model without budgets, in bfloat16."""
    folder = tmp_path_factory.mktemp("plain")
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1).bfloat16().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def parent(tmp_path_factory, text_file, plain) -> Path:
    folder = tmp_path_factory.mktemp("made") / "parent"
    before = digests(Path(plain))
    assert main(["elasticize", plain, str(folder), "--calibration", str(text_file), *SMALL, *BUDGETS]) == 0
    assert digests(Path(plain)) == before
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def ids() -> torch.Tensor:
    return torch.randint(3, 2000, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_parent_is_an_ordinary_checkpoint_of_the_same_function(parent, plain):
    for model_class in (NemotronHForCausalLM, NativeForCausalLM):  # native limits the step size in its own way
        expected, found = (
            model_class.from_pretrained(folder, dtype=torch.float32).eval()(ids()).logits for folder in (plain, parent)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, float(expected.std())))
    stored = NemotronHForCausalLM.from_pretrained(parent)
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(parent)("def f").input_ids
    own, other = (json.loads(Path(folder, "config.json").read_text()) for folder in (parent, plain))
    assert {key: own[key] for key in other if key != "transformers_version"} == {
        key: value for key, value in other.items() if key != "transformers_version"
    }


@torch.no_grad()
def test_its_budgets_can_be_loaded(parent):
    config = NemotronHConfig.from_pretrained(parent)
    elastic = read_elastic(config)
    assert list(elastic.budgets) == ["a", "b"] and elastic.choices == {"hidden_size": (48, 32)}
    assert set(elastic.calibration) == {"loss", "hidden_size", "layers"} and len(elastic.layer_order) == 7
    for name, budget in elastic.budgets.items():
        small = NemotronHForCausalLM.from_pretrained(parent, budget=name)
        assert sum(weight.numel() for weight in small.parameters()) == num_parameters(resolve(config, budget).config)
    assert elastic.budgets["a"].layers == tuple(sorted(elastic.layer_order[1:]))


def test_scores_and_plots_are_written_and_nothing_else_is_left(parent):
    scores = json.loads((parent / "importance" / "scores.json").read_text())
    assert set(scores) == {"hidden", "neurons", "heads", "channels", "query_heads", "depth"}
    assert len(scores["hidden"]) == 48 and len(scores["channels"]["0"][5]) == 8 and list(scores["query_heads"]) == ["3"]
    plots = {path.name for path in (parent / "importance").glob("*.png")}
    assert plots == {f"scores_{name}.png" for name in scores}
    assert [path.name for path in parent.parent.iterdir()] == ["parent"]


def test_streaming_measures_the_same_with_one_layer_in_memory(tmp_path, text_file, plain, parent, monkeypatch):
    models, in_memory, read, forward = [], set(), command.streamed, NemotronHMLP.forward
    monkeypatch.setattr(command, "streamed", lambda *args: models.append(read(*args)) or models[-1])

    def watched(self, *args, **kwargs):
        here = [any(not p.is_meta for p in block.mixer.parameters()) for block in models[-1].model.layers]
        in_memory.add(sum(here))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(NemotronHMLP, "forward", watched)
    output = tmp_path / "parent"
    given = ["elasticize", plain, str(output), "--calibration", str(text_file), *SMALL, *BUDGETS, "--stream"]
    assert main(given) == 0
    assert in_memory == {1} and len(models) == 2
    ours, expected = (json.loads((folder / "config.json").read_text())["elastic"] for folder in (output, parent))
    assert ours == expected
    for name in ("model.safetensors", "importance/scores.json", MANIFEST):
        assert (output / name).read_bytes() == (parent / name).read_bytes(), name


def test_a_killed_run_leaves_no_folder_and_goes_on(tmp_path, text_file, plain, monkeypatch, capsys):
    output = tmp_path / "parent"
    given = ["elasticize", plain, str(output), "--calibration", str(text_file), *SMALL]
    given += ["--budget", "a:hidden_size=32"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_manifest", killed)
    assert main(given) == 130
    assert (output / ".work" / "losses.json").is_file() and os.listdir(output) == [".work"]
    assert not list(tmp_path.rglob("config.json"))
    monkeypatch.undo()
    forwards = []
    forward = NemotronHForCausalLM.forward
    monkeypatch.setattr(
        NemotronHForCausalLM,
        "forward",
        lambda self, *args, **kwargs: forwards.append(1) or forward(self, *args, **kwargs),
    )
    assert main(given) == 0
    assert not forwards and "a         loss" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_few_rows_are_all_scored_for_depth(tmp_path):
    assert command.parse(["model", str(tmp_path / "parent"), "--rows", "4"]).depth_rows == 4
    assert command.parse(["model", str(tmp_path / "parent")]).depth_rows == 8


@pytest.mark.parametrize(
    "more, message",
    [
        (["--budget", "a"], "budget='a': allowed is NAME:FIELD=SIZE"),
        (["--budget", "a:hidden_size=x"], "allowed are whole numbers, not 'x'"),
        (["--budget", "a:hidden_size=32", "--budget", "a:depth=3"], "'a' is given twice"),
        (["--budget", "a:width=3"], "budget 'a' has 'width'"),
        (["--budget", "a:depth=6", "--depth_rows", "0"], "the layers are not scored"),
        (["--rows", "1000"], "rows: 1000 rows of 48 tokens are asked for, the text has"),
        (["--rows", "0"], "rows=0"),
        (["--depth_rows", "9"], "depth_rows=9: allowed is 0 to rows=3"),
        (["--calibration", "nowhere/*.txt"], "'nowhere/*.txt' matches no file"),
    ],
)
def test_bad_input_is_an_error_that_helps(more, message, tmp_path, text_file, plain, capsys):
    given = ["elasticize", plain, str(tmp_path / "parent"), "--calibration", str(text_file), *SMALL, *more]
    assert main(given) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "parent").exists()


def test_a_parent_or_a_folder_in_use_is_refused(parent, plain, tmp_path, text_file, capsys):
    text = ["--calibration", str(text_file), *SMALL]
    assert main(["elasticize", plain, str(parent), *text]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["elasticize", str(parent), str(tmp_path / "again"), *text]) == 1
    assert "this is a parent already" in capsys.readouterr().err


def test_budgets_come_from_files_and_flags(tmp_path):
    path = tmp_path / "budgets.yaml"
    path.write_text("6b: {hidden_size: 3072, intermediate_size: [9216, 12288]}\n")
    found = read_budgets(["9b: hidden_size=4480, depth=56"], str(path))
    assert found == {
        "6b": {"hidden_size": 3072, "intermediate_size": [9216, 12288]},
        "9b": {"hidden_size": 4480, "depth": 56},
    }
    assert read_choices(["hidden_size=4096,3072", "mamba_num_heads=96"]) == {
        "hidden_size": [4096, 3072],
        "mamba_num_heads": [96],
    }
    assert read_choices(None) is None and read_budgets([], None) == {}
    path.write_text("- 6b\n")
    with pytest.raises(ValueError, match=r"budgets: .*budgets\.yaml holds a list: allowed is a mapping"):
        read_budgets([], str(path))


def test_rows_are_full_and_read_no_more_text_than_they_need(tokenizer):
    texts = iter(["x = 1\n" * 40] * 10)
    rows = packed_rows(tokenizer, tokenizer.eos_token_id, texts, "rows", 2, 64)
    assert [len(row["input_ids"]) for row in rows] == [64, 64] and len(list(texts)) > 0
    assert int(rows[0]["input_ids"][0]) == tokenizer.eos_token_id and int(rows[0]["position_ids"].max()) < 64
