"""The plain loop (plain_loop.py) as a program: train a model like the embedded one, or a larger one, from the text of this Python.

The data is this Python's standard library (sources and language reference), the tokenizer a byte-level BPE trained on
the same text, the model a small dense Nemotron-H or, to compare with, a Llama of the same parameter count. At the end
come bits per byte on held-out files next to `xz -9`, the share of sampled functions that parse, and an ordinary
checkpoint folder with bfloat16 weights.

    python experiments/tiny/tiny_models.py --output-dir runs/tiny                        # on a CPU: under an hour
    python experiments/tiny/tiny_models.py --output-dir runs/tiny                        # the same command resumes
    python experiments/tiny/tiny_models.py --output-dir runs/llama --architecture llama --tokenizer runs/tiny/checkpoint
    python experiments/tiny/tiny_models.py --output-dir runs/look --max-tokens 100000    # a few minutes, to see it work
    python experiments/tiny/tiny_models.py --output-dir runs/big --device cuda --hidden-size 768 --intermediate-size 2304 \\
        --pattern M-M-M*-M-M-M*-M- --batch-size 32 --max-tokens 200000000 --learning-rate 1e-3
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from bits_per_byte import bits_per_byte, xz_bits_per_byte
from parsing_share import Sampling, choose_prompts, parsing_share
from plain_loop import LoopSettings, saved_step, train
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.data.byte_bpe import train_tokenizer
from nemotron_h_hf.data.stdlib_text import Document, corpus_digest, read_documents, split_documents
from nemotron_h_hf.inputs import read_json
from nemotron_h_hf.output_folders import writing
from nemotron_h_hf.tokenizer_files import save_tokenizer
from nemotron_h_hf.whole_files import write_json

HEAD_DIM = 64
FREE_TO_CHANGE = {"output_dir", "tokenizer", "time_limit_minutes", "device", "threads", "save_steps", "log_steps",
                  "num_samples"}  # fmt: skip
MAX_POSITIONS = 4096


def _flag(default, help_text: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class TrainTinyArguments:
    """Every flag of the command; `--help` is made from this."""

    output_dir: str = _flag("runs/tiny", "folder for state, log, report and checkpoint; resumed if it has a state")
    architecture: str = _flag("nemotron-h", "what to train; llama gets the same parameters", ("nemotron-h", "llama"))
    tokenizer: str = _flag("", "folder of a tokenizer to use instead of training one on the text")
    max_tokens: int = _flag(2_500_000, "training tokens; on resume, may change as long as the decay has not begun")
    time_limit_minutes: float = _flag(float("inf"), "stop, resumable, after this long")
    device: str = _flag("cpu", "cpu (float32) or cuda (bfloat16 autocast)")
    threads: int = _flag(0, "CPU threads, 0 for PyTorch's choice; resuming bit by bit needs the same number")
    vocab_size: int = _flag(2048, "tokens of the tokenizer")
    hidden_size: int = _flag(192, "width, a multiple of 64; sets the heads (of 64) of attention and Mamba layers")
    intermediate_size: int = _flag(576, "width of the MLP layers (Llama's follows from the parameter count)")
    pattern: str = _flag("M-M*-M-", "layers: M Mamba-2, - MLP, * attention")
    sequence_length: int = _flag(1024, "tokens per window, a multiple of the scan's chunk of 64")
    batch_size: int = _flag(2, "windows per step")
    learning_rate: float = _flag(4e-3, "peak, after a warm-up; the last 30 percent of the steps decay to a tenth")
    warmup_steps: int = _flag(50, "steps of warm-up")
    seed: int = _flag(0, "of initial weights and data order")
    log_steps: int = _flag(10, "steps per line of log.jsonl")
    save_steps: int = _flag(100, "steps between saves")
    num_samples: int = _flag(200, "sampled functions for the parsing share")


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare text and tokenizer, train (or resume), evaluate, save; 0 also when the time limit came first."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    with writing(arguments.output_dir, arguments.tokenizer) as folder:
        return run(arguments, folder)


def run(arguments: TrainTinyArguments, folder: Path) -> int:
    """The work, in a folder that no other run writes to."""
    settings = loop_settings(arguments)
    remember_arguments(arguments, settings, folder)
    train_documents, held_out = split_documents(read_documents())
    tokenizer = get_tokenizer(arguments, train_documents, folder)
    stream = token_stream(tokenizer, train_documents, arguments.seed)
    model = build_model(arguments).to(arguments.device)
    print(
        f"{arguments.architecture}: {count_parameters(model):,} parameters, {stream.numel():,} tokens of training text"
    )
    print(f"{settings.total_steps:,} steps of {settings.tokens_per_step:,} tokens")
    if not train(model, stream, settings, folder):
        print("Time limit reached. The same command continues from here.")
        return 0
    report = describe(arguments, model, stream, train_documents) | evaluate(model, tokenizer, held_out, arguments)
    save_checkpoint(model, tokenizer, folder / "checkpoint")
    write_json(folder / "report.json", report)
    print(json.dumps({name: value for name, value in report.items() if name != "examples"}, indent=2))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> TrainTinyArguments:
    parser = argparse.ArgumentParser(
        "python experiments/tiny/tiny_models.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for item in fields(TrainTinyArguments):
        flag = "--" + item.name.replace("_", "-")
        help_text = f"{item.metadata['help']} (default: {item.default!r})"
        choices = item.metadata["choices"]
        parser.add_argument(flag, type=item.type, default=item.default, choices=choices, help=help_text)
    arguments = TrainTinyArguments(**vars(parser.parse_args(argv)))
    for name, multiple in (("hidden_size", HEAD_DIM), ("sequence_length", 64)):
        value = getattr(arguments, name)
        if value <= 0 or value % multiple:
            raise ValueError(f"{name}={value}: allowed is a positive multiple of {multiple}")
    for name in ("max_tokens", "batch_size", "log_steps", "save_steps", "num_samples"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"{name}={getattr(arguments, name)}: allowed is 1 or more")
    return arguments


def loop_settings(arguments: TrainTinyArguments) -> LoopSettings:
    shared = {item.name for item in fields(LoopSettings)} & {item.name for item in fields(TrainTinyArguments)}
    return LoopSettings(**{name: value for name, value in asdict(arguments).items() if name in shared})


def remember_arguments(arguments: TrainTinyArguments, settings: LoopSettings, folder: Path) -> None:
    """Write the arguments next to the state; refuse to resume with arguments of another run."""
    path, now = folder / "arguments.json", asdict(arguments)
    if path.is_file():
        before = read_json(path)
        for name in now.keys() - FREE_TO_CHANGE - {"max_tokens"}:
            if before[name] != now[name]:
                raise ValueError(
                    f"{name}: got {now[name]!r}, but {folder} holds a run with {before[name]!r}; "
                    "give that, or another output_dir"
                )
        decay_start = min(before["max_tokens"], arguments.max_tokens) * (1 - settings.decay_share)
        done = saved_step(folder) * settings.tokens_per_step
        if before["max_tokens"] != arguments.max_tokens and done > decay_start:
            raise ValueError(
                f"max_tokens: got {arguments.max_tokens}, but {done} are spent and the decay has begun or would have; "
                f"allowed is {before['max_tokens']}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def get_tokenizer(arguments: TrainTinyArguments, documents: list[Document], folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer given, or the one of the run being resumed, or a new one trained on `documents`."""
    if arguments.tokenizer:
        return PreTrainedTokenizerFast.from_pretrained(arguments.tokenizer)
    if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
        tokenizer = train_tokenizer((d.text for d in documents), arguments.vocab_size, MAX_POSITIONS)
        save_tokenizer(tokenizer, folder / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document], seed: int) -> Tensor:
    """All documents in an order drawn from `seed`, each opened by <|endoftext|>, as one int32 tensor."""
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor([tokenizer.eos_token_id, *ids], dtype=torch.int32) for ids in encoded])


def build_model(arguments: TrainTinyArguments) -> PreTrainedModel:
    """The freshly initialised float32 model; weights depend on the seed alone."""
    torch.manual_seed(arguments.seed)
    model = NemotronHForCausalLM(nemotron_h_config(arguments))
    if arguments.architecture == "nemotron-h":
        return model
    config = llama_config(arguments, count_parameters(model))
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(config)


def nemotron_h_config(arguments: TrainTinyArguments) -> NemotronHConfig:
    heads = arguments.hidden_size // HEAD_DIM
    return NemotronHConfig(
        hybrid_override_pattern=arguments.pattern, intermediate_size=arguments.intermediate_size,
        mamba_num_heads=2 * heads, mamba_head_dim=HEAD_DIM, ssm_state_size=64, n_groups=2, conv_kernel=4, chunk_size=64,
        **shared_config(arguments),
    )  # fmt: skip


def llama_config(arguments: TrainTinyArguments, parameter_budget: int) -> LlamaConfig:
    """A Llama with one block per two layers of the pattern, its MLP as wide as the budget allows (multiple of 8)."""
    num_layers = (len(arguments.pattern) + 1) // 2
    hidden = arguments.hidden_size
    shared = shared_config(arguments)
    attention = 2 * hidden * HEAD_DIM * (shared["num_attention_heads"] + shared["num_key_value_heads"])  # q, o, k, v
    outside = 2 * arguments.vocab_size * hidden + hidden
    per_layer = (parameter_budget - outside) / num_layers - attention - 2 * hidden
    width = max(8, round(per_layer / (3 * hidden) / 8) * 8)
    return LlamaConfig(num_hidden_layers=num_layers, intermediate_size=width, rms_norm_eps=1e-5, **shared)


def shared_config(arguments: TrainTinyArguments) -> dict:
    heads = arguments.hidden_size // HEAD_DIM
    return {
        "vocab_size": arguments.vocab_size, "hidden_size": arguments.hidden_size, "head_dim": HEAD_DIM,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2 if heads % 2 == 0 else 1,
        "max_position_embeddings": MAX_POSITIONS, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held_out: list[Document], arguments: TrainTinyArguments
) -> dict:
    """All figures of the report, for the weights as they are saved (rounded to bfloat16), computed in float32."""
    round_to_bfloat16(model.eval())
    texts = [document.text for document in held_out]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    documents = [(ids, len(text.encode())) for ids, text in zip(encoded, texts, strict=True)]
    sampling = Sampling(num_samples=arguments.num_samples)
    share, functions = parsing_share(model, tokenizer, choose_prompts(texts, sampling), sampling)
    return {
        "held_out_files": len(texts), "held_out_bytes": sum(size for _, size in documents),
        "held_out_tokens": sum(len(ids) for ids, _ in documents),
        "bits_per_byte": {
            f"window {window}, stride {window // 2}":
                round(bits_per_byte(model, documents, tokenizer.eos_token_id, window, window // 2), 4)
            for window in sorted({arguments.sequence_length, 2048})
        },
        "xz_bits_per_byte": {name: round(value, 4) for name, value in xz_bits_per_byte(texts).items()},
        "parsing_share": round(share, 4), "sampling": asdict(sampling) | {"num_samples": len(functions)},
        "examples": functions[:5],
    }  # fmt: skip


def describe(arguments: TrainTinyArguments, model: nn.Module, stream: Tensor, documents: list[Document]) -> dict:
    settings = loop_settings(arguments)
    return {
        "architecture": arguments.architecture, "parameters": count_parameters(model),
        "training_tokens": settings.total_steps * settings.tokens_per_step, "tokens_in_training_text": stream.numel(),
        "training_documents": len(documents), "training_text_digest": corpus_digest(documents),
        "python": platform.python_version(), "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%d"), "arguments": asdict(arguments) | {"output_dir": None, "tokenizer": None},
    }  # fmt: skip


@torch.no_grad()
def round_to_bfloat16(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bfloat16 weights, configuration, tokenizer and sampling defaults, as `from_pretrained` reads them."""
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95, top_k=0,
                                               bos_token_id=0, eos_token_id=0, pad_token_id=1)  # fmt: skip
    model.bfloat16().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


if __name__ == "__main__":
    raise SystemExit(main())
