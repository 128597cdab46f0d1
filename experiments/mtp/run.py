"""Multi-token prediction on the embedded model: a head trained on its frozen trunk, then acceptance and speed.

    python experiments/mtp/run.py train   --output runs/mtp [--tokens 1.5M] [--seed 0]      # resumes
    python experiments/mtp/run.py measure --output runs/mtp [--new-tokens 64] [--rounds 3] [--threads 1]
    python experiments/mtp/run.py plot

train is `nemotron-h pretrain` with --mtp_depth 1, on the standard library's sources without the held-out files. One depth has
weights; the loss runs it twice (--mtp_steps 2). measure decodes greedily, for every prompt (beginnings of held-out files) and
round one after the other: plain, drafts of the head, prompt lookup, and a smaller model nested in the same weights. All texts
must be equal. The speed-up of a setting is the median over prompts and rounds of plain seconds / its seconds.

Small models spend their time in Python, not in weights. What a pass with drafts costs in a larger model is measured on one with
random weights (LARGE): seconds of a pass over k + 1 tokens with its k drafts / seconds of a plain token. At the head's
tokens_per_pass that gives `predicted`, the speed-up of a model of that size whose drafts are kept as often.

    acceptance         drafted tokens that were kept / drafted tokens
    tokens_per_pass    new tokens / passes of the whole model over new tokens
    by_depth           for the head: share of passes in which the draft of each depth was kept
"""

import argparse
import json
import shlex
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, NemotronHElasticForCausalLM, NemotronHForCausalLM
from nemotron_h_hf.cost import num_parameters, parameters_by_kind
from nemotron_h_hf.data.stdlib_text import as_jsonl, read_documents, split_documents
from nemotron_h_hf.elastic.prepare.elasticize import elasticize
from nemotron_h_hf.scripts import pretrain

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "mtp"
HEAD, LOOKUP, NESTED, DRAFTED = "multi-token prediction", "prompt lookup", "nested", (1, 2, 3, 4)
MLP = AutoConfig.from_pretrained(EMBEDDED_MODEL).intermediate_size
NESTED_BUDGET = {
    "MLP 50%": {"intermediate_size": MLP // 2}
}  # untrained: accepted most in docs/results/elastic_speculation
PROMPT_TOKENS, NUM_PROMPTS, WARM_UP_TOKENS = 128, 8, 8
LARGE = {
    "hybrid_override_pattern": "M-M*-M-M-M*-M-", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "mamba_num_heads": 32, "mamba_head_dim": 64, "n_groups": 4, "vocab_size": 16384,
    "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*-",
}  # fmt: skip
LENGTH, ROWS = 512, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "measure", "plot"))
    parser.add_argument("--output", type=Path, default=Path("runs/mtp"))
    parser.add_argument("--tokens", default="1.5M")
    for name, default in (("seed", 0), ("new-tokens", 64), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"train": train, "measure": measure, "plot": plot}[arguments.step](arguments)


def train(arguments: argparse.Namespace) -> None:
    """The head alone."""
    text = arguments.output / "train.jsonl"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(as_jsonl(split_documents(read_documents())[0]), encoding="utf-8")
    words = ["--sources", json.dumps({"python": {"path": str(text)}}), "--shuffle_rows", "4000",
             "--mtp_depth", "1", "--mtp_steps", "2", "--mtp_loss_weight", "1", "--mtp_freeze_trunk", "true",
             "--total_tokens", arguments.tokens, "--sequence_length", str(LENGTH), "--per_device_train_batch_size", str(ROWS),
             "--learning_rate", "3e-3", "--warmup_tokens", "5%", "--decay_tokens", "50%", "--optimizer", "muon",
             "--use_cpu", "true", "--save_steps", "100", "--logging_steps", "10", "--report_to", "none",
             "--seed", str(arguments.seed), "--output_dir", str(arguments.output / "run")]  # fmt: skip
    print(f"nemotron-h pretrain {shlex.join(words)}", flush=True)
    started = time.monotonic()
    pretrain.main(words)
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def measure(arguments: argparse.Namespace) -> None:
    """Every setting on every prompt, interleaved, and the report."""
    logging.set_verbosity_error()
    folder = arguments.output / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parent = nesting(NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer)
    drafts = {name: parent.submodel(name) for name in NESTED_BUDGET}
    settings = [(HEAD, k) for k in DRAFTED] + [(LOOKUP, k) for k in (2, 4, 8)] + [(NESTED, k) for k in (1, 2, 4)]
    found: dict[tuple, dict[str, list]] = {
        setting: {"speed_up": [], "passes": [], "drafted": [], "by_depth": []} for setting in settings
    }
    rates = []
    held_out = split_documents(read_documents())[1]
    texts = [tokenizer(document.text, return_tensors="pt").input_ids[:, :PROMPT_TOKENS] for document in held_out]
    prompts = [text for text in texts if text.shape[1] == PROMPT_TOKENS][:: max(1, len(texts) // NUM_PROMPTS)][
        :NUM_PROMPTS
    ]
    for setting in [None, *settings]:
        decode(plain, parent, drafts, setting, prompts[0], WARM_UP_TOKENS)
    for number in range(arguments.rounds):
        for prompt in prompts:
            expected, alone = decode(plain, parent, drafts, None, prompt, arguments.new_tokens)
            rates.append(arguments.new_tokens / alone["seconds"])
            for setting in settings:
                text, facts = decode(plain, parent, drafts, setting, prompt, arguments.new_tokens)
                if not torch.equal(text, expected):
                    raise AssertionError(f"{setting}: another text than plain decoding's")
                own = found[setting]
                own["speed_up"].append(alone["seconds"] / facts["seconds"])
                for name in ("passes", "drafted", "by_depth"):
                    own[name].append(facts[name])
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
    count = len(prompts) * arguments.rounds
    table = [row(setting, own, count * (arguments.new_tokens - 1)) for setting, own in found.items()]
    costs = costs_of_steps(arguments.rounds)
    report = {
        "command": f"python experiments/mtp/run.py measure --new-tokens {arguments.new_tokens} --rounds {arguments.rounds} "
                   f"--threads {arguments.threads}",
        "trained": f"python experiments/mtp/run.py train --tokens {arguments.tokens} --seed {arguments.seed}",
        "mtp_loss": json.loads((arguments.output / "run" / "metrics.jsonl").read_text().splitlines()[-1])["mtp_loss"],
        "machine": "2-core x86 CPU", "dtype": "float32", "threads": arguments.threads, "torch": torch.__version__,
        "parameters": parameters_by_kind(plain.config), "prompts": len(prompts), "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": arguments.new_tokens, "rounds": arguments.rounds, "all_texts_equal": True,
        "plain_tokens_per_second": round(statistics.median(rates), 1), "results": table,
        "large": {"config": LARGE, "parameters": num_parameters(NemotronHConfig(**LARGE)), "cost_of_a_step": costs,
                  "predicted": {entry["draft_tokens"]: round(entry["tokens_per_pass"] / costs[entry["draft_tokens"]], 3)
                                for entry in table if entry["drafts_by"] == HEAD}},
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "mtp.json").write_text(json.dumps(report, indent=2) + "\n")


def nesting(model: NemotronHForCausalLM, tokenizer) -> NemotronHElasticForCausalLM:
    """The same weights in order of importance, with a smaller model inside; nothing is trained."""
    text = tokenizer(Path(argparse.__file__).read_text(), return_tensors="pt").input_ids[0]
    rows = [{"input_ids": row} for row in text[: 24 * 256].view(24, 256)]
    model.config.elastic = None  # another budget than the embedded model's
    elasticize(model, rows[:16], rows[16:], NESTED_BUDGET, choices={})
    return NemotronHElasticForCausalLM.from_model(model)


@torch.no_grad()
def decode(plain, parent, drafts: dict, setting: tuple[str, int] | None, prompt: torch.Tensor, count: int):
    """(text, what it took) of one greedy text; `None` is plain decoding."""
    kind, number = setting or (None, 0)
    model = parent if kind == NESTED else plain
    given = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_new_tokens": count,
        "return_dict_in_generate": True,
    }
    calls = {"passes": 0, "drafted": 0}
    hooks = [model.model.register_forward_pre_hook(lambda *_: calls.update(passes=calls["passes"] + 1))]
    if kind == HEAD:
        given["num_mtp_tokens"] = number
    elif kind == LOOKUP:
        given["prompt_lookup_num_tokens"] = number
    elif kind == NESTED:
        draft = given["assistant_model"] = next(iter(drafts.values()))
        draft.generation_config.num_assistant_tokens = number
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0
        hooks.append(draft.model.register_forward_pre_hook(lambda *_: calls.update(drafted=calls["drafted"] + 1)))
    start = time.perf_counter()
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **given)
    seconds = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    passes = calls["passes"] - (kind == HEAD)  # one is the prompt's; the others' first pass checks drafts too
    drafted = passes * number if kind == HEAD else calls["drafted"]
    by_depth = output.acceptance_by_depth if kind == HEAD else ()
    return output.sequences, {"seconds": seconds, "passes": passes, "drafted": drafted, "by_depth": by_depth}


@torch.no_grad()
def costs_of_steps(rounds: int, num_tokens: int = 24) -> dict[int, float]:
    """Drafted tokens k -> seconds of a step with them / seconds of a plain token, medians, in the large model."""
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**LARGE)).eval()
    prompt = torch.randint(3, LARGE["vocab_size"], (1, 8))  # short: its pass hardly counts
    ratios: dict[int, list[float]] = {k: [] for k in DRAFTED}
    for number in range(rounds + 1):
        _, alone = decode(model, None, {}, None, prompt, num_tokens)
        for k in DRAFTED:
            _, facts = decode(model, None, {}, (HEAD, k), prompt, num_tokens)
            if number:  # the first round warms up
                ratios[k].append(facts["seconds"] / facts["passes"] / (alone["seconds"] / alone["passes"]))
    return {k: round(statistics.median(found), 3) for k, found in ratios.items()}


def row(setting: tuple[str, int], own: dict[str, list], num_tokens: int) -> dict:
    """One line of the table."""
    kind, number = setting
    passes, drafted = sum(own["passes"]), sum(own["drafted"])
    shares = [sum(share * n for share, n in zip(column, own["passes"])) / passes for column in zip(*own["by_depth"])]
    entry = {
        "drafts_by": kind, "draft_tokens": number, "tokens_per_pass": round(num_tokens / passes, 3),
        "acceptance": round((num_tokens - passes) / drafted, 4) if drafted else None,
        "by_depth": [round(share, 4) for share in shares], "speed_up": round(statistics.median(own["speed_up"]), 3),
        "speed_up_range": [round(min(own["speed_up"]), 3), round(max(own["speed_up"]), 3)],
    }  # fmt: skip
    print(json.dumps(entry), flush=True)
    return entry


def plot(_: argparse.Namespace) -> None:
    """Tokens per pass and speed-up of every setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    report = json.loads((RESULTS / "mtp.json").read_text())
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for axis, field, label in zip(
        axes, ("tokens_per_pass", "speed_up"), ("tokens per pass", "speed-up over plain decoding")
    ):
        for kind in (HEAD, LOOKUP, NESTED):
            rows = [entry for entry in report["results"] if entry["drafts_by"] == kind]
            axis.plot(
                [entry["draft_tokens"] for entry in rows], [entry[field] for entry in rows], marker="o", label=kind
            )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xlabel("drafted tokens")
        axis.set_ylabel(label)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "mtp.png", dpi=110)


if __name__ == "__main__":
    main()
