"""A stage at 4,096 tokens with retrieval-like text for the embedded model, and which layers then do the retrieving.

    python experiments/long_context/run.py data                    # texts with facts in them, questions held out
    python experiments/long_context/run.py train                   # the stage; --control: the same tokens of Python alone
    python experiments/long_context/run.py ask                     # held-out questions, whole and with one layer removed
    python experiments/long_context/run.py tasks                   # `nemotron-h eval`: its needles and word tasks
    python experiments/long_context/run.py report                  # results.json, tables.md, layers.png

Every command takes `--seed`, goes on where it was stopped and does nothing where it is finished. `ask` and `tasks` also
measure the model before the stage.

A text is prose with facts between its sentences ("The locker of brake-hinge opens with 81520."), then questions about some
of them with their answers, 200 to 3,900 tokens in all, so several share a row. Names are made of words, and prose of sentences,
that do not occur in the text that `nemotron-h eval` hides its needles in; its wording is in none of the forms. The questions
of `ask` have the forms of training and one that training does not have, with names of words that training does not have.
"""

import argparse
import json
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.data.stdlib_text import Document, as_jsonl, read_documents, split_documents
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.evaluation.texts import Prose, prose_of
from nemotron_h_hf.scripts import eval as eval_command
from nemotron_h_hf.scripts import pretrain
from nemotron_h_hf.whole_files import whole_file, write_json, write_text

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "long_context"
LENGTH, ROWS_PER_STEP = 4096, 1
LENGTHS = (1024, 2048, 4096, 8192)  # of questions, in tokens
TEXT_TOKENS = (200, 3900)
TOPICS = "pydoc_data/"  # the evaluation's haystack
SHARE = 0.7  # of the stage's tokens that are texts with facts
HELD_OUT_WORDS = slice(0, None, 5)  # of the sorted vocabulary: the names of `ask`
BEFORE = "before"
LAST_OF = {"linear_attention": "out_proj", "full_attention": "o_proj", "mlp": "down_proj"}  # of each kind of layer


@dataclass(frozen=True)
class Form:
    """How a fact, a question about it and the answer's beginning are worded."""

    fact: str
    question: str
    answer: str


FORMS = (
    Form("The locker of {name} opens with {value}.", "Q: What opens the locker of {name}?", "A: The locker of {name} opens with"),
    Form("{name} is registered under {value}.", "Under what is {name} registered?", "{name} is registered under"),
    Form("Call {name} at {value}.", "Question: Where can you call {name}?", "Answer: Call {name} at"),
    Form("The price of {name} was {value}.", "Question: What was the price of {name}?", "Answer: The price of {name} was"),
    Form("Parcel {value} goes to {name}.", "Q: Which parcel goes to {name}?", "A: To {name} goes parcel"),
    Form("{name} = {value}", "print({name})", ">>>"),
    Form("The badge of {name} shows {value}.", "Question: What does the badge of {name} show?", "Answer: The badge of {name} shows"),
)  # fmt: skip
NEW_FORM = Form(
    "The seat number of {name} is {value}.",
    "Question: What is the seat number of {name} in the notes above?",
    "Answer: The seat number of {name} in the notes above is",
)  # not in training
SETS = {"known forms": FORMS, "new form": (NEW_FORM,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("step", choices=("data", "train", "ask", "tasks", "report"))
    add("--seed", type=int, default=0, help="of the stage (0)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of report (0 1 2)")
    add("--control", action="store_true", help="train, ask, tasks: the stage without the facts")
    add("--tokens", type=int, default=3_000_000, help="of the stage (3,000,000)")
    add("--learning_rate", default="2e-3", help="peak, of Muon (2e-3)")
    add("--questions", type=int, default=32, help="of a length, with ask (32)")
    add("--samples", type=int, default=10, help="of a task and length, with tasks (10)")
    add("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens (1024 2048 4096 8192)")
    add("--runs", type=Path, default=Path("runs/long_context"))
    add("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    {"data": data, "train": train, "ask": ask, "tasks": tasks, "report": report}[arguments.step](arguments)


# Text


def data(arguments: argparse.Namespace) -> None:
    """train.jsonl, python.jsonl and the words of both sides."""
    folder = arguments.runs / "text"
    folder.mkdir(parents=True, exist_ok=True)
    documents, _ = split_documents(read_documents())
    documents = [document for document in documents if not document.name.startswith(TOPICS)]
    prose, vocabulary = training_prose(documents)
    held_out = vocabulary[HELD_OUT_WORDS]
    words = sorted(set(vocabulary) - set(held_out))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    rng, count, texts = random.Random(0), 0, []
    while count < SHARE * arguments.tokens * 1.05:
        size = int(TEXT_TOKENS[0] * (TEXT_TOKENS[1] / TEXT_TOKENS[0]) ** rng.random())
        made = text_of(rng, prose, words, FORMS, tokenizer, size, num_questions=8)
        texts.append(json.dumps({"text": made.whole}) + "\n")
        count += size
    write_text(folder / "facts.jsonl", "".join(texts))
    write_text(folder / "python.jsonl", as_jsonl(documents))
    write_json(folder / "words.json", {"names": words, "held_out_names": held_out})
    print(
        f"{len(texts):,} texts; names of {len(words):,} words, held out {len(held_out):,}; {prose.num_words():,} words of prose"
    )


def training_prose(documents: Sequence[Document]) -> tuple[Prose, list[str]]:
    """Sentences of the training files that the evaluation's haystack does not have, and words that it does not have."""
    haystack = prose_of(document.text for document in read_documents() if document.name.startswith(TOPICS))
    known, seen = set(haystack.sentences), {word.strip(".,;:()'\"`").lower() for s in haystack.sentences for word in s}
    prose = prose_of(document.text for document in documents)
    kept = tuple(sentence for sentence in prose.sentences if sentence not in known)
    words = [word for word in prose.vocabulary if word not in seen]
    return Prose(kept, prose.vocabulary), words


@dataclass(frozen=True)
class Made:
    """A text: what comes before the first answer, how that begins, the answer, and everything."""

    prompt: str
    answer: str
    whole: str


def text_of(
    rng: random.Random, prose: Prose, words: Sequence[str], forms: Sequence[Form], tokenizer: PreTrainedTokenizerBase,
    size: int, num_questions: int,
) -> Made:  # fmt: skip
    """About `size` tokens, at most: facts of one form among sentences, then questions."""
    form = rng.choice(forms)
    num_facts = rng.randint(1, max(1, min(24, size // 100)))
    facts: dict[str, str] = {}
    while len(facts) < num_facts:
        facts["-".join(rng.sample(words, 2))] = str(rng.randrange(10**4, 10 ** rng.randint(5, 8)))
    asked = rng.sample(list(facts), min(num_questions, num_facts))
    questions = [f"\n\n{form.question.format(name=name)}\n{form.answer.format(name=name)}" for name in asked]
    answers = [f" {facts[name]}{'.' if form.fact.endswith('.') else ''}" for name in asked]
    end = "".join(question + answer for question, answer in zip(questions, answers, strict=True))
    lines = [form.fact.format(name=name, value=value) for name, value in facts.items()]
    filling = fitted(rng, prose, tokenizer, size - len(tokenizer(end + " ".join(lines))["input_ids"]) - 2 * num_facts)
    places = sorted(rng.randint(0, len(filling)) for _ in lines)
    for place, line in reversed(list(zip(places, lines, strict=True))):
        filling.insert(place, line)
    context = " ".join(filling)
    return Made(context + questions[0], f" {facts[asked[0]]}", context + end + "\n")


def fitted(rng: random.Random, prose: Prose, tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """Sentences of at most `size` tokens, from a random place on."""
    found, start = [], rng.randrange(len(prose.sentences))
    while size > 0:
        sentence = " ".join(prose.sentences[(start + len(found)) % len(prose.sentences)])
        size -= len(tokenizer(" " + sentence)["input_ids"])
        found.append(sentence)
    return found[:-1]


# Training


def folder_of(arguments: argparse.Namespace) -> Path:
    return arguments.runs / f"{'python' if arguments.control else 'facts'}-{arguments.seed}"


def train(arguments: argparse.Namespace) -> None:
    folder, text = folder_of(arguments), arguments.runs / "text"
    if (folder / "model" / "config.json").is_file():
        return
    sources, weights = {"python": {"path": str(text / "python.jsonl")}}, {"python": 1.0}
    if not arguments.control:
        sources["facts"], weights = {"path": str(text / "facts.jsonl")}, {"python": 1 - SHARE, "facts": SHARE}
    words = ["--sources", json.dumps(sources), "--phases", json.dumps([{"weights": weights}]), "--sequence_length", str(LENGTH),
             "--per_device_train_batch_size", str(ROWS_PER_STEP), "--shuffle_rows", "400", "--optimizer", "muon",
             "--learning_rate", arguments.learning_rate, "--warmup_tokens", "3%", "--decay_tokens", "50%", "--min_lr_ratio", "0.05",
             "--total_tokens", str(arguments.tokens), "--seed", str(arguments.seed), "--logging_steps", "10", "--save_steps", "100",
             "--save_total_limit", "1", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true",
             "--output_dir", str(folder)]  # fmt: skip
    print(f"nemotron-h pretrain {shlex.join(words)}", flush=True)
    pretrain.main(words)


# Questions


def ask(arguments: argparse.Namespace) -> None:
    """answers.json of the run and of the model before: the share of answers that greedy decoding would get wholly right; of the
    run also without each mixer, by half of the questions."""
    asked = {
        (name, length): list(questions(arguments, forms, length))
        for name, forms in SETS.items()
        for length in arguments.lengths
    }
    known = {key: of[: max(1, len(of) // 2)] for key, of in asked.items() if key[0] == "known forms"}
    for name, path in models(arguments).items():
        output = arguments.runs / name / "answers.json"
        if output.is_file():
            continue
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        found = {"whole": shares(model, asked)}
        for index, kind in enumerate(model.config.layers_block_type if name != BEFORE else ()):
            if kind != "mlp":
                with_it = remove(model, index)
                found[f"without layer {index}, {kind}"] = shares(model, known)
                with_it()
        write_json(output, found)


def models(arguments: argparse.Namespace) -> dict[str, str]:
    """Name -> folder of the model before the stage and of the run."""
    return {BEFORE: EMBEDDED_MODEL, folder_of(arguments).name: str(folder_of(arguments) / "model")}


def remove(model: PreTrainedModel, index: int):
    """The layer adds nothing, until what is returned is called."""
    mixer = model.model.layers[index].mixer
    last = getattr(mixer, LAST_OF[model.config.layers_block_type[index]])
    kept = last.weight.detach().clone()
    with torch.no_grad():
        last.weight.zero_()

    def put_back() -> None:
        with torch.no_grad():
            last.weight.copy_(kept)

    return put_back


def shares(
    model: PreTrainedModel, asked: dict[tuple[str, int], list[tuple[Tensor, Tensor]]]
) -> dict[str, dict[str, float]]:
    """Known or new form -> length -> share of right answers."""
    found: dict[str, dict[str, float]] = {}
    for (name, length), pairs in asked.items():
        found.setdefault(name, {})[str(length)] = mean(answers_right(model, *question) for question in pairs)
    print(json.dumps(found), flush=True)
    return found


def questions(arguments: argparse.Namespace, forms: Sequence[Form], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids of a prompt, ids of its answer), the same for all models."""
    words = json.loads((arguments.runs / "text" / "words.json").read_text(encoding="utf-8"))["held_out_names"]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    _, held_out = split_documents(read_documents())
    prose = prose_of(document.text for document in held_out)
    for number in range(arguments.questions):
        rng = random.Random(f"{length}/{number}")
        made = text_of(rng, prose, words, forms, tokenizer, length, num_questions=1)
        before, both = (tokenizer(text)["input_ids"] for text in (made.prompt, made.prompt + made.answer))
        shared = next((k for k, (a, b) in enumerate(zip(before, both)) if a != b), len(before))
        yield torch.tensor([both[:shared]]), torch.tensor(both[shared:])


@torch.no_grad()
def answers_right(model: PreTrainedModel, prompt: Tensor, answer: Tensor) -> bool:
    """Whether each token of the answer is the likeliest after those before it, as greedy decoding needs."""
    logits = model(torch.cat([prompt, answer[None, :-1]], dim=1), logits_to_keep=len(answer)).logits[0]
    return bool((logits.argmax(-1) == answer).all())


def tasks(arguments: argparse.Namespace) -> None:
    """`nemotron-h eval --tasks long` of the run and of the model before."""
    for name, path in models(arguments).items():
        words = ["--model", str(path), "--tasks", "long", "--lengths", ",".join(map(str, arguments.lengths)),
                 "--limit", str(arguments.samples), "--dtype", "float32", "--output", str(arguments.runs / name / "eval")]  # fmt: skip
        print(f"nemotron-h eval {shlex.join(words)}", flush=True)
        eval_command.main(words)


# Report


def report(arguments: argparse.Namespace) -> None:
    """Everything that is there, as JSON, tables and a picture."""
    runs, names = (
        arguments.runs,
        [BEFORE, *(f"{kind}-{seed}" for kind in ("python", "facts") for seed in arguments.seeds)],
    )
    answers = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in names if (path := runs / name / "answers.json").is_file()
    }  # fmt: skip
    evaluated = {
        name: json.loads(path.read_text(encoding="utf-8"))["long_context"]
        for name in names if (path := runs / name / "eval" / "results.json").is_file()
    }  # fmt: skip
    if not any(name.startswith("facts") for name in answers):
        raise ValueError(f"--runs={str(runs)!r}: no run has an answers.json, repeat `train` and `ask`")
    content = {"command": "python experiments/long_context/run.py data | train | train --control | ask | tasks | report",
               "tokens": arguments.tokens, "machine": machine(), "versions": versions(), "answers": answers,
               "tasks": evaluated}  # fmt: skip
    write_json(arguments.output / "results.json", content)
    written = tables(answers) + task_table(evaluated)
    write_text(arguments.output / "tables.md", written)
    draw(answers, arguments.output / "layers.png")
    print(written)


def of_kind(answers: dict, kind: str) -> list:
    return [found for name, found in answers.items() if name.startswith(kind)]


def tables(answers: dict) -> str:
    """Percent of right answers by form and length, before and after; then without each layer."""
    lengths = list(next(iter(answers.values()))["whole"]["known forms"])
    lines = [
        f"| percent right | form | {' | '.join(f'{int(length):,}' for length in lengths)} |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for kind in (BEFORE, "python", "facts"):
        for form in ("known forms", "new form"):
            if rows := of_kind(answers, kind):
                cells = [spread([100 * row["whole"][form][length] for row in rows]) for length in lengths]
                lines.append(f"| {kind} | {form} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| facts, known forms | {' | '.join(f'{int(length):,}' for length in lengths)} |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    rows = of_kind(answers, "facts")
    for case in rows[0]:
        cells = [spread([100 * row[case]["known forms"][length] for row in rows]) for length in lengths]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def task_table(evaluated: dict[str, list[dict]]) -> str:
    """Percent right of `nemotron-h eval --tasks long`, over all depths; runs of a kind together."""
    whole = [row for rows in evaluated.values() for row in rows if row["depth"] is None]
    if not whole:
        return ""
    lengths, tasks = ({row[key]: None for row in whole} for key in ("length", "task"))
    lines = ["", f"| `eval`, percent right | model | {' | '.join(f'{length:,}' for length in lengths)} |",
             "|---" * (len(lengths) + 2) + "|"]  # fmt: skip
    for task in tasks:
        for kind in (BEFORE, "python", "facts"):
            runs = of_kind(evaluated, kind)
            scores = [[100 * row["score"] for rows in runs for row in rows
                       if row["depth"] is None and (row["task"], row["length"]) == (task, length)] for length in lengths]  # fmt: skip
            if runs:
                lines.append(f"| {task} | {kind} | {' | '.join(map(spread, scores))} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.0f}" + (f" ± {stdev(values):.0f}" if len(values) > 1 else "")


def draw(answers: dict, path: Path) -> None:
    """Right answers by length, whole and without each mixer."""
    rows = of_kind(answers, "facts")
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for case in rows[0]:
        if not case.endswith("mlp"):
            by_length = rows[0][case]["known forms"]
            values = [100 * mean(row[case]["known forms"][length] for row in rows) for length in by_length]
            style = "-" if case == "whole" else "--" if case.endswith("full_attention") else ":"
            axes.plot([int(length) for length in by_length], values, style, marker="o", label=case)
    axes.axvline(LENGTH, color="0.6", linewidth=1)
    axes.set(
        xlabel="tokens of the prompt (line: rows of training)",
        ylabel="right answers, percent",
        xscale="log",
        ylim=(-3, 103),
    )
    lengths = [int(length) for length in rows[0]["whole"]["known forms"]]
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, format="png")


if __name__ == "__main__":
    sys.exit(main())
