"""`nemotron-h blend`: the plan from the weights alone, and what reading really gives."""

import json
import re

import pytest

import nemotron_h_cli as cli
from nemotron_h_hf.scripts import blend

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
    assert int(code[-1]) > 1, "five small files do not last for half of it"
    assert "web: " in text and "x malformed JSON" in text


def test_reading_records_for_fine_tuning(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x = ", "completion": "1"}) + "\n")
    (tmp_path / "sft.yaml").write_text(f"data: ['{tmp_path}/a.jsonl']\ntotal_tokens: 100\n")
    assert cli.main(["blend", "--config", str(tmp_path / "sft.yaml"), "--records", "--read", "100%"]) == 0
    assert "data" in capsys.readouterr().out


def test_seed_of_the_file_or_the_flag(config, capsys):
    def order(*flags: str) -> str:
        assert blend.main(["--config", str(config), "--read", "1K", *flags]) == 0
        return capsys.readouterr().out.split("read: ")[1]

    assert order() == order() == order("--seed", "42")
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
    assert "more are needed so that each of 2 phases has one" in capsys.readouterr().err
