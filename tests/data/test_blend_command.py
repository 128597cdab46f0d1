"""`nemotron-h blend`: the plan from the weights alone, and what reading really gives."""

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from test_chat import CHATML
from transformers import AutoTokenizer

import nemotron_h_cli as cli
from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.scripts import blend, distill, elastic_train, pretrain, sft

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
READABLE = [path for path in RECIPES if not path.stem.startswith(("align_2_dpo", "minipuzzle"))]  # TRL's; no training's

CONFIG = """
output_dir: anywhere
learning_rate: 8e-4
total_tokens: 1M
sources:
  web: {{path: {folder}/web.jsonl}}
  code: {{path: {folder}/*.py}}
phases:
  - {{until: 60%, weights: {{web: 3, code: 1}}}}
  - {{last: 400K, weights: {{code: 1}}}}
"""


@pytest.fixture
def config(tmp_path):
    lines = [json.dumps({"text": f"Document {n}. " * (n % 7 + 1)}) for n in range(60)]
    (tmp_path / "web.jsonl").write_text("\n".join(["broken", *lines]))
    for n in range(5):
        (tmp_path / f"{n}.py").write_text(f"def f{n}(x):\n    return x + {n}\n" * 4)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
    return re.split(r"  +", line)


def test_plan_opens_no_file(config, capsys):
    for file in config.parent.glob("*.[jp]*"):
        file.unlink()
    assert cli.main(["blend", "--config", str(config)]) == 0
    text = capsys.readouterr().out
    assert "1,000,000 tokens, 2 phases, 2 sources" in text
    assert cells(text, "web") == ["web", "450,000", "75.0%", "-", "450,000", "45.0%"]
    assert cells(text, "code") == ["code", "150,000", "25.0%", "400,000 100.0%", "550,000", "55.0%"]
    assert cells(text, "tokens") == ["tokens", "600,000", "400,000", "1,000,000"]
    assert cli.main(["blend", "--config", str(config), "--total_tokens", "4M"]) == 1  # then 400K leave a gap
    assert "last is '400K'" in capsys.readouterr().err


def test_reading_counts_what_is_there(config, capsys):
    assert cli.main(["blend", "--config", str(config), "--read", "4K"]) == 0
    text = capsys.readouterr().out.split("read: ")[1]
    assert 4000 <= int(text.split()[0].replace(",", "")) < 4300
    web, code = cells(text, "web"), cells(text, "code")
    assert "(plan 75.0%)" in web[2] and web[3] == "-"
    assert abs(float(web[2].split("%")[0]) - 75) < 7
    assert code[3].startswith("1,6") and "100.0% (plan 100.0%)" in code[3]
    assert "all 5, " in code[-2] and " times" in code[-2]
    assert int(code[-1]) > 1, "five small files do not last for half of it"
    assert "web: " in text and "x malformed JSON" in text


def test_how_many_documents_of_a_source_the_run_will_see(tmp_path, capsys):
    """Of 1,000 documents that have 4 words each a run over a tenth of their tokens sees a tenth; a stream's are not counted."""
    lines = "".join(json.dumps({"text": "one two three four"}) + "\n" for _ in range(1000))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    sources = f"{{plain: {{path: {tmp_path}/a.jsonl}}, packed: {{path: {tmp_path}/b.jsonl.gz}}}}"
    (tmp_path / "run.yaml").write_text(f"sources: {sources}\ntotal_tokens: 100K\n")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    each = len(tokenizer("one two three four")["input_ids"]) + 2
    for tokens, said in ((200 * each, "about 100 of 1,000 (10.0%)"), (5000 * each, "all 1,000, 2.5 times")):
        words = ["--config", str(tmp_path / "run.yaml"), "--total_tokens", str(tokens), "--read", str(20 * each)]
        assert cli.main(["blend", *words]) == 0
        text = capsys.readouterr().out.split("read: ")[1]
        assert cells(text, "plain")[-2] == said
        assert cells(text, "packed")[-2] == f"about {tokens // 2 // each:,} of an unknown number"


def test_reading_records_for_fine_tuning(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x = ", "completion": "1"}) + "\n")
    (tmp_path / "sft.yaml").write_text(f"data: ['{tmp_path}/a.jsonl']\ntotal_tokens: 100\n")
    assert cli.main(["blend", "--config", str(tmp_path / "sft.yaml"), "--records", "--read", "100%"]) == 0
    assert "data" in capsys.readouterr().out


def test_conversations_need_the_template_of_the_file(tmp_path, capsys):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text((json.dumps(chat) + "\n") * 5)
    (tmp_path / "template.jinja").write_text(CHATML)
    config = {"data": [f"{tmp_path}/a.jsonl"], "total_tokens": 20, "chat_template": f"{tmp_path}/template.jinja"}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    assert blend.main(["--config", str(tmp_path / "sft.yaml"), "--records", "--read", "100%"]) == 0
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("path", [*READABLE, ROOT / "docs/results/tiny/pretrain.yaml"], ids=lambda path: path.stem)
def test_configurations_of_the_repository_are_read(path, capsys):
    config = yaml.safe_load(path.read_text())
    flags = [] if path.stem.startswith("pretrain") else ["--records"]
    flags += [] if "total_tokens" in config else ["--total_tokens", "100M"]
    assert blend.main(["--config", str(path), *flags]) == 0
    shown = capsys.readouterr().out
    assert f"{len(config.get('sources', [1]))} sources" in shown


@pytest.mark.parametrize("command", [pretrain, sft, distill, elastic_train])
def test_every_flag_of_the_commands_is_known(command, monkeypatch):
    """What the command itself parses, caught on its way."""
    caught = []

    def parse(kinds, *others, **named):
        caught.extend(kinds)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "parse", parse)
    with pytest.raises(KeyboardInterrupt):
        command.main([])
    known = blend.names_of(blend.TEXT if command is pretrain else blend.RECORDS)
    assert set(blend.names_of(caught)) - set(known) == set()
    assert command is not pretrain or blend.names_of(caught) == known


def test_a_configuration_of_records_wants_the_flag(tmp_path, capsys):
    (tmp_path / "sft.yaml").write_text("lora_rank: 4\ntotal_tokens: 10\n")
    assert cli.main(["blend", "--config", str(tmp_path / "sft.yaml")]) == 1
    assert "(without --records) has a key 'lora_rank'" in capsys.readouterr().err


def test_seed_of_the_file_or_the_flag(config, capsys):
    def order(*flags: str) -> str:
        assert blend.main(["--config", str(config), "--read", "1K", *flags]) == 0
        return capsys.readouterr().out.split("read: ")[1]

    assert order() == order() == order("--seed", "42")
    config.write_text(config.read_text() + "seed: 1\ndata_seed: 5\n")
    assert order() == order("--seed", "5") == order("--data_seed", "5")
    assert len({order("--seed", str(seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize(
    "change, said",
    [
        (("sources:", "sorces:"), "has a key 'sorces'; did you mean 'sources'?"),
        (("total_tokens: 1M", ""), "total_tokens is not in the configuration"),
        (("until: 60%", "until: 50%"), "begins at 600,000 tokens, but the phases before it end at 500,000"),
        (("web: 3", "wb: 3"), "has a key 'wb'; did you mean 'web'?"),
        (("path: ", "file: "), "source web has a key 'file'"),
    ],
)
def test_mistakes_are_named(config, capsys, change, said):
    config.write_text(config.read_text().replace(*change))
    assert cli.main(["blend", "--config", str(config)]) == 1
    assert said in capsys.readouterr().err


def test_too_few_tokens_to_see_all_phases(config, capsys):
    assert cli.main(["blend", "--config", str(config), "--read", "0%"]) == 1
    assert "more are needed for 2 phases to have one each" in capsys.readouterr().err
