"""Nested speculation: the parent checks what a model inside it drafts. Acceptance and speed against plain decoding, in one run.

    python experiments/elastic_speculation/run.py [--parent FOLDER] [--drafts NAME ...] [--draft-tokens 1 2 4 8]
                                                   [--new-tokens 64] [--rounds 3] [--threads 1] [--output NAME.json]

Without a parent the embedded model is made one: its weights put in order, nothing trained. For each prompt and round the
parent decodes greedily alone, then with each draft model and each number of drafted tokens; the texts must be equal. The
speed-up of a setting is the median over prompts and rounds of plain seconds / its seconds, both of the same round.

    acceptance   drafted tokens that stayed / drafted tokens (forward passes of the draft)
    cost         seconds of the draft's pass over one token / the parent's, medians measured here
    predicted    (1 - a^(k+1)) / ((1 - a) (c k + 1)) for a acceptance of a token, c cost, k drafted tokens (arXiv 2211.17192)
"""

import argparse
import json
import platform
import re
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from nemotron_h_hf import EMBEDDED_MODEL, HybridCache, NemotronHElasticForCausalLM, NemotronHForCausalLM
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.elastic.budgets import read_elastic
from nemotron_h_hf.elastic.prepare.elasticize import elasticize
from nemotron_h_hf.elastic.resolve import resolve

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "elastic_speculation"

PROMPTS = (
    "The function returns a list of", "Raise an exception if the", "This module provides", "The default value is",
    "Return the number of", "If the file does not exist, then", "The following example shows how", "A string that",
)  # fmt: skip
BOX = AutoConfig.from_pretrained(EMBEDDED_MODEL)
HIDDEN, MLP = BOX.hidden_size, BOX.intermediate_size
UNTRAINED = {
    "MLP 50%": {"intermediate_size": MLP // 2},
    "5 layers": {"depth": 5},
    "width 75%": {"hidden_size": HIDDEN * 3 // 4, "intermediate_size": MLP * 3 // 4},
    "width 50%": {"hidden_size": HIDDEN // 2, "intermediate_size": MLP // 2, "mamba_num_heads": 4},
}
WARM_UP_TOKENS = 8


def main() -> None:
    """Measure every setting and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", help="a checkpoint with budgets; default: the embedded model, not trained")
    parser.add_argument("--drafts", nargs="+", help="names of budgets; default: all that are smaller than the parent")
    parser.add_argument("--draft-tokens", nargs="+", type=int, default=[1, 2, 4, 8])
    for name, default in (("new-tokens", 64), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", default="speculation.json", help="file in docs/results/elastic_speculation")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    parent, tokenizer = load(arguments.parent)
    names = arguments.drafts or [
        name for name in read_elastic(parent.config).budgets if parent.submodel(name) is not parent
    ]
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    results = measure(parent, names, prompts, arguments)
    report = {
        "command": "python experiments/elastic_speculation/run.py" + command_of(arguments), "prompts": PROMPTS,
        "parent": arguments.parent or "the embedded model, elasticised and not trained",
        "parent_parameters": num_parameters(parent.config), "dtype": "float32", **vars(arguments),
        "torch": torch.__version__, "cpu": cpu_name(), **results,
    }  # fmt: skip
    (RESULTS / arguments.output).write_text(json.dumps(report, indent=2) + "\n")


def load(folder: str | None) -> tuple[NemotronHElasticForCausalLM, object]:
    """The parent in fp32 (in which one pass over several tokens picks the tokens of single steps) and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder or EMBEDDED_MODEL)
    if folder is not None:
        return NemotronHElasticForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer
    model = NemotronHForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    model.config.elastic = None  # other budgets than its own, in another order
    text = tokenizer(Path(argparse.__file__).read_text(), return_tensors="pt").input_ids[0]
    rows = [{"input_ids": row} for row in text[: 24 * 256].view(24, 256)]
    elasticize(model, rows[:16], rows[16:], UNTRAINED, choices={}, num_removals=2)
    return NemotronHElasticForCausalLM.from_model(model), tokenizer


def measure(parent, names: list[str], prompts: list[torch.Tensor], arguments: argparse.Namespace) -> dict:
    """Plain decoding and every setting, interleaved."""
    drafts = {name: parent.submodel(name) for name in names}
    settings = [(name, count) for name in names for count in arguments.draft_tokens]
    ratios: dict[tuple, list[float]] = {setting: [] for setting in settings}
    counts = {setting: {"drafted": 0, "parent_passes": 0, "tokens": 0} for setting in settings}
    for setting in [None, *settings]:
        decode(parent, drafts, setting, prompts[0], WARM_UP_TOKENS)
    for number in range(arguments.rounds):
        for prompt in prompts:
            expected, plain, _ = decode(parent, drafts, None, prompt, arguments.new_tokens)
            for setting in settings:
                text, seconds, passes = decode(parent, drafts, setting, prompt, arguments.new_tokens)
                if not torch.equal(text, expected):
                    raise AssertionError(f"{setting}: another text than the parent's")
                ratios[setting].append(plain / seconds)
                for key, value in {**passes, "tokens": arguments.new_tokens}.items():
                    counts[setting][key] += value
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
    costs = {name: step_seconds(model) for name, model in {"parent": parent, **drafts}.items()}
    table = [row(setting, ratios[setting], counts[setting], costs) for setting in settings]
    sizes = {
        name: num_parameters(resolve(parent.config, read_elastic(parent.config).budgets[name]).config) for name in names
    }
    for entry in table:
        print(json.dumps(entry), flush=True)
    return {"draft_parameters": sizes, "seconds_of_one_token": costs, "all_texts_equal": True, "results": table}


def row(setting: tuple[str, int], ratios: list[float], counts: dict[str, int], costs: dict[str, float]) -> dict:
    """One line of the table."""
    name, count = setting
    accepted = counts["tokens"] - counts["parent_passes"]  # each pass of the parent adds one token itself
    share, cost = accepted / counts["drafted"], costs[name] / costs["parent"]
    chance = chance_of_a_token(share, count)
    predicted = (sum(chance**i for i in range(count + 1))) / (cost * count + 1)
    return {
        "draft": name, "draft_tokens": count, "acceptance": round(share, 4), "cost": round(cost, 4),
        "tokens_per_parent_pass": round(counts["tokens"] / counts["parent_passes"], 3), "predicted": round(predicted, 3),
        "speed_up": round(statistics.median(ratios), 3), "speed_up_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }  # fmt: skip


def chance_of_a_token(share: float, count: int) -> float:
    """The chance a of each token that gives this share of accepted ones among `count`: mean of a, a^2, ..., by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        fits = sum(middle**i for i in range(1, count + 1)) / count < share
        low, high = (middle, high) if fits else (low, middle)
    return low


@torch.no_grad()
def decode(parent, drafts: dict, setting: tuple[str, int] | None, prompt: torch.Tensor, count: int):
    """(text, seconds, passes of both models) of one greedy text, with or without a draft."""
    settings, passes, hooks = (
        {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count},
        {},
        [],
    )
    if setting is not None:
        draft = settings["assistant_model"] = drafts[setting[0]]
        draft.generation_config.num_assistant_tokens = setting[1]
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0
        for key, model in (("drafted", draft), ("parent_passes", parent)):
            passes[key] = 0
            hooks.append(model.register_forward_pre_hook(lambda *_, key=key: passes.update({key: passes[key] + 1})))
    start = time.perf_counter()
    text = parent.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    seconds = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return text, seconds, passes


@torch.no_grad()
def step_seconds(model, repeats: int = 60) -> float:
    """Median seconds of a pass over one token with a cache."""
    ids, times = torch.full((1, 1), 5), []
    cache = HybridCache(model.config)
    model(ids.expand(1, 32), cache=cache)
    for _ in range(repeats):
        start = time.perf_counter()
        model(ids, cache=cache)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def command_of(arguments: argparse.Namespace) -> str:
    """The arguments as they would be typed."""
    parts = []
    for name, value in vars(arguments).items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            parts += [
                f"--{name.replace('_', '-')}",
                *(repr(str(one)) if " " in str(one) else str(one) for one in values),
            ]
    return " " + " ".join(parts)


def cpu_name() -> str:
    """The processor, as the kernel names it."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
