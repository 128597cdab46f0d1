"""The embedded model: an elastic parent with three sizes, from nothing, with `pretrain`, `elasticize` and `elastic-train`.

    python experiments/tiny_order/text.py                                         # under Python 3.11.7
    python experiments/sft/make_data.py --output .carry/docstrings
    python experiments/tiny_box/run.py probe --output runs/box --device cuda      # speeds of a few settings
    python experiments/tiny_box/run.py train --output runs/box --device cuda --pretrain_tokens 60M --elastic_tokens 30M
    python experiments/tiny_box/run.py measure --output runs/box                  # card.json: every size

train resumes where it was stopped. The parent is OUTPUT/parent, in bfloat16, with a chat template; every command is printed
first. The text is mixed with a small share of conversations (a function's signature, the first line of its docstring) in the
elastic stage, to make all three sizes answer.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("tiny_order", "tiny")]

import text  # noqa: E402
from bits_per_byte import bits_per_byte  # noqa: E402
from parsing_share import Sampling, choose_prompts, parsing_share  # noqa: E402
from tiny_models import save_checkpoint  # noqa: E402

from nemotron_h_hf.cost import num_parameters  # noqa: E402
from nemotron_h_hf.data.blended_rows import one_round  # noqa: E402
from nemotron_h_hf.data.fine_tuning_records import encode_record  # noqa: E402
from nemotron_h_hf.data.sources import Source  # noqa: E402
from nemotron_h_hf.data.stdlib_text import as_jsonl  # noqa: E402
from nemotron_h_hf.elastic.budgets import read_elastic  # noqa: E402
from nemotron_h_hf.elastic.resolve import resolve  # noqa: E402
from nemotron_h_hf.scripts import elastic_train, elasticize, pretrain  # noqa: E402

TEMPLATE = Path("docs/results/sft/chat_template.jinja")
SHAPE = {
    "hidden_size": 256, "intermediate_size": 768, "mamba_num_heads": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # 3.83 million parameters: 7.7 MB in bfloat16  # fmt: skip
BUDGETS = {"full": 1.0, "three_quarters": 0.75, "half": 0.5}
CHOICES = {
    "hidden_size": [256, 240, 224, 208, 192, 176, 160, 144, 128], "intermediate_size": [768, 672, 576, 480, 384, 288, 192],
    "mamba_num_heads": [8, 6, 4], "mamba_head_dim": [64, 56, 48, 40, 32],
}  # fmt: skip
STAGES = [{"until": "60%"}, {"weights": {"full": 0.4, "three_quarters": 0.3, "half": 0.3}}]
LENGTH = 1024
DOCSTRING_SHARE = 0.03
MICRO_STEPS = 4  # of an elastic step, each on its own size
ALL_ROWS = 9400  # the text has 9,378 rows
PROBES = {"bf16": [], "fp32": ["--bf16", "false"], "triton": ["--mamba", "triton"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("step", choices=("probe", "train", "measure"))
    add("--text", type=Path, default=Path(".carry/stdlib.jsonl.xz"), help="of tiny_order/text.py")
    add("--docstrings", type=Path, default=Path(".carry/docstrings"), help="of experiments/sft/make_data.py")
    add("--output", type=Path, default=Path("runs/box"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--mamba", default="auto", help="who computes the Mamba layers (auto)")
    add("--rows_per_step", type=int, default=32)
    add("--shuffle_rows", type=int, default=ALL_ROWS, help="rows that are shuffled together (all of them)")
    add("--learning_rate", default="4e-3")
    add("--elastic_learning_rate", default="1e-3")
    add("--pretrain_tokens", default="60M")
    add("--elastic_tokens", default="30M")
    add("--seed", type=int, default=0)
    add("--num_samples", type=int, default=200, help="sampled functions of each size")
    add("--limit", type=int, help="held-out files to measure on: for a look")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    prepare(arguments)
    {"probe": probe, "train": train, "measure": measure}[arguments.step](arguments)
    return 0


def prepare(arguments: argparse.Namespace) -> None:
    """The text as the commands read it."""
    folder = arguments.output / "text"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "held_out.jsonl").is_file():
        train_documents, held_out = text.load(arguments.text)
        (folder / "train.jsonl").write_text(as_jsonl(train_documents), encoding="utf-8")
        (folder / "calibration.jsonl").write_text(as_jsonl(train_documents[1::60]), encoding="utf-8")
        (folder / "held_out.jsonl").write_text(as_jsonl(held_out), encoding="utf-8")


def train(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if not (output / "pretrained" / "model" / "config.json").is_file():
        run("pretrain", pretrain.main, pretrain_words(arguments, output / "pretrained", arguments.pretrain_tokens))
    if not (output / "ordered" / "config.json").is_file():
        run("elasticize", elasticize.main, ordering_words(arguments))
    if not (output / "elastic" / "model" / "config.json").is_file():
        run("elastic-train", elastic_train.main, elastic_words(arguments))
    model = AutoModelForCausalLM.from_pretrained(output / "elastic" / "model", dtype=torch.float32)
    save_checkpoint(model, AutoTokenizer.from_pretrained(output / "elastic" / "model"), output / "parent")
    held_out(arguments)


def probe(arguments: argparse.Namespace) -> None:
    """Tokens per second of 30 steps for each of PROBES."""
    for name, words in PROBES.items():
        folder = arguments.output / f"probe-{name}"
        words = [*pretrain_words(arguments, folder, str(30 * arguments.rows_per_step * LENGTH)), *words,
                 "--shuffle_rows", "1000", "--warmup_tokens", "10%", "--save_strategy", "no", "--logging_steps", "10"]  # fmt: skip
        try:
            run(f"pretrain ({name})", pretrain.main, words)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            print(
                f"probe {name}: {rows[-1]['tokens_per_second']:,.0f} tokens/s, loss {rows[-1]['loss']:.3f}", flush=True
            )
        except Exception as error:  # what is not there is no reason to stop
            print(f"probe {name}: {error}", flush=True)


def run(name: str, command, words: Sequence[str]) -> None:
    print(f"nemotron-h {name} {shlex.join(words)}", flush=True)
    started = time.monotonic()
    command(list(words))
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def pretrain_words(arguments: argparse.Namespace, folder: Path, tokens: str) -> list[str]:
    sources = {"python": {"path": str(arguments.output / "text" / "train.jsonl")}}
    return ["--init", "random", "--config_overrides", json.dumps(SHAPE), "--sources", json.dumps(sources),
            "--shuffle_rows", str(arguments.shuffle_rows), "--warmup_tokens", "2%", "--decay_tokens", "40%", "--min_lr_ratio", "0.05",
            "--learning_rate", arguments.learning_rate, "--total_tokens", tokens, "--optimizer", "muon",
            "--per_device_train_batch_size", str(arguments.rows_per_step), *common(arguments, folder)]  # fmt: skip


def ordering_words(arguments: argparse.Namespace) -> list[str]:
    output = arguments.output
    choices = [f"{field}={','.join(map(str, sizes))}" for field, sizes in CHOICES.items()]
    return [str(output / "pretrained" / "model"), str(output / "ordered"),
            "--calibration", str(output / "text" / "calibration.jsonl"), "--rows", "128", "--depth_rows", "0",
            "--held_out_rows", "16", "--device", arguments.device, "--dtype", "float32",
            *(word for choice in choices for word in ("--choices", choice))]  # fmt: skip


def elastic_words(arguments: argparse.Namespace) -> list[str]:
    output = arguments.output
    sources = {"python": {"path": str(output / "text" / "train.jsonl")},
               "docstrings": {"path": str(arguments.docstrings / "train.jsonl")}}  # fmt: skip
    phases = [{"weights": {"python": 1 - DOCSTRING_SHARE, "docstrings": DOCSTRING_SHARE}}]
    return ["--model", str(output / "ordered"), "--budgets", json.dumps(BUDGETS), "--choices", json.dumps(CHOICES),
            "--per_layer", "intermediate_size", "--stages", json.dumps(STAGES), "--calibrate", "false",
            "--cross_entropy_weight", "0.5", "--sources", json.dumps(sources), "--phases", json.dumps(phases),
            "--chat_template", str(TEMPLATE), "--shuffle_rows", str(arguments.shuffle_rows), "--warmup_tokens", "2%",
            "--decay_tokens", "60%", "--min_lr_ratio", "0.02", "--learning_rate", arguments.elastic_learning_rate,
            "--per_device_train_batch_size", str(-(-arguments.rows_per_step // MICRO_STEPS)),
            "--gradient_accumulation_steps", str(MICRO_STEPS),
            "--total_tokens", arguments.elastic_tokens, *common(arguments, output / "elastic")]  # fmt: skip


def common(arguments: argparse.Namespace, folder: Path) -> list[str]:
    return ["--sequence_length", str(LENGTH), "--mamba", arguments.mamba, "--seed", str(arguments.seed), "--logging_steps", "20",
            "--save_steps", "500", "--save_total_limit", "1", "--report_to", "none", "--disable_tqdm", "true",
            "--use_cpu", str(arguments.device == "cpu"), "--output_dir", str(folder)]  # fmt: skip


# Figures


def held_out(arguments: argparse.Namespace) -> None:
    """card.json: size -> parameters, held-out bits per byte, docstring loss, of the weights as they are saved, computed in fp32.

    What card.json says is kept where it is younger than the weights.
    """
    parent, known = arguments.output / "parent", card_of(arguments)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    texts = [
        json.loads(line)["text"] for line in (arguments.output / "text" / "held_out.jsonl").read_text().splitlines()
    ]
    texts = texts[: arguments.limit]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    documents = [(tokens, len(t.encode())) for tokens, t in zip(ids, texts, strict=True)]
    for name, (model, count) in sizes(arguments).items():
        if "docstring_loss" in known.get(name, {}):
            continue
        figures = {"parameters": count, "bytes": 2 * count}
        for window in (1024, 2048):
            bits = bits_per_byte(model, documents, tokenizer.eos_token_id, window, window // 2)
            figures[f"bits_per_byte_{window}"] = round(bits, 4)
        figures["docstring_loss"] = round(docstring_loss(model, tokenizer, arguments.docstrings / "held_out.jsonl"), 4)
        print(name, json.dumps(figures), flush=True)
        write(arguments, name, figures)


def sizes(arguments: argparse.Namespace) -> dict:
    """Name -> (model in fp32, its parameters) for every budget of the parent."""
    parent = arguments.output / "parent"
    config = AutoModelForCausalLM.from_pretrained(parent).config
    found = {}
    for name, budget in read_elastic(config).budgets.items():
        model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, budget=name)
        found[name] = (model.to(arguments.device).eval(), num_parameters(resolve(config, budget).config))
    return found


@torch.no_grad()
def docstring_loss(model: torch.nn.Module, tokenizer, path: Path) -> float:
    """Nats per token of the answers, their end included."""
    source = Source("held_out", path=[str(path)], column=None, shuffle_window=0)
    rows = list(one_round(source, lambda record: encode_record(record, tokenizer), 512, tokenizer.pad_token_id))
    total = count = 0
    for row in rows:
        inputs = {name: value[None].to(model.device) for name, value in row.items()}
        items = int((inputs["labels"][:, 1:] != -100).sum())
        total += float(model(**inputs, skip_logits=True).loss) * items
        count += items
    return total / count


def measure(arguments: argparse.Namespace) -> None:
    """card.json: also the share of samples that parse, and an answer."""
    held_out(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output / "parent")
    texts = [
        json.loads(line)["text"] for line in (arguments.output / "text" / "held_out.jsonl").read_text().splitlines()
    ]
    sampling = Sampling(num_samples=arguments.num_samples)
    for name, (model, _) in sizes(arguments).items():
        share, functions = parsing_share(model, tokenizer, choose_prompts(texts, sampling), sampling)
        write(arguments, name, {"parsing_share": round(share, 4), "examples": functions[:5]})
        print(name, f"{share:.1%} of {len(functions)} samples parse", flush=True)


def card_of(arguments: argparse.Namespace) -> dict:
    """What was measured of these weights; nothing of older ones."""
    path, weights = arguments.output / "card.json", arguments.output / "parent" / "model.safetensors"
    if not path.is_file() or path.stat().st_mtime < weights.stat().st_mtime:
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def write(arguments: argparse.Namespace, name: str, figures: dict) -> None:
    card = card_of(arguments)
    card[name] = card.get(name, {}) | figures
    (arguments.output / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
