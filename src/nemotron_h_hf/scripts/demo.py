"""Load the embedded models, generate text, ask all sizes of one image, look at a picture, and compare the cache with a transformer's.

    nemotron-h demo            # what `make demo` runs; nothing is downloaded

The tables are measured, not computed: every size generates from the weights that are in memory once; one context is fed to
the model piece by piece, and the bytes of its cache are read. The transformer's figures come from a real transformers cache,
filled with tensors of its shapes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchEncoding,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import is_vision_available
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import (
    EMBEDDED_MODEL,
    EMBEDDED_VISION_MODEL,
    HybridCache,
    NemotronHConfig,
    NemotronHElasticForCausalLM,
)
from nemotron_h_hf.command_line import option, read_options
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.elastic.budgets import read_elastic
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.units import human_bytes, human_count

CONTEXTS = (256, 1024, 4096, 16384)
PIECE_TOKENS = 1024
QUESTION = "def read_lines(path, encoding='utf-8'):"  # it was shown signatures and the first lines of their docstrings
TIMED_TOKENS, TIMES = 64, 3
REPETITION_PENALTY = 1.15  # a model this small falls into loops

NEXT_STEPS = """What to try next
  nemotron-h generate --prompt "class Stack:" --temperature 0.5    continue your own prompt
  nemotron-h generate --budget half                                the smallest size alone
  nemotron-h info nemotron-h-8b                                    pattern, parameters and memory of a released shape
  nemotron-h info path/to/checkpoint                               the same, and a check of its files
  nemotron-h bench cpu                                             speed on this machine, next to transformers' own model
  README.md                                                        loading it from Python"""


@dataclass(frozen=True)
class DemoArguments:
    """What the command line says."""

    prompt: str = option("def read_lines(path):", "text to continue")
    max_new_tokens: int = option(120, "tokens to write (120)")
    seed: int = option(0, "of the sampling (0)")


def main(argv: Sequence[str] | None = None) -> int:
    """Print five sections: text, sizes, a picture, memory, next steps."""
    arguments = read_options(DemoArguments, argv, "demo", __doc__)
    disable_progress_bar()
    set_seed(arguments.seed)
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = NemotronHElasticForCausalLM.from_pretrained(EMBEDDED_MODEL).eval()
    print(f"{type(model).__name__}.from_pretrained took {time.perf_counter() - start:.1f} s:")
    print(f"  {model.config.hybrid_override_pattern}  (M Mamba-2, * attention, - MLP)")
    print(f"  {human_count(num_parameters(model.config))} parameters, {model.dtype}, on {model.device}\n")
    print(f"It continues {arguments.prompt!r} like this:\n")
    print(write(model, tokenizer, arguments))
    print()
    print("\n".join(size_table(model, tokenizer)))
    print()
    print(look())
    print()
    print("\n".join(memory_table(model)))
    print(f"\n{NEXT_STEPS}")
    return 0


def write(model: PreTrainedModel, tokenizer, arguments: DemoArguments) -> str:
    """Prompt and continuation, indented; says how fast."""
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        repetition_penalty=REPETITION_PENALTY,
    )
    seconds = time.perf_counter() - start
    num_new = output.shape[1] - inputs["input_ids"].shape[1]
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    body = "\n".join(f"  | {line}" for line in text.splitlines())
    return f"{body}\n\n{num_new} tokens in {seconds:.1f} s, {num_new / seconds:.0f} tokens/s with the prompt."


def size_table(parent: NemotronHElasticForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each budget answers, the bytes of weights it reads and its speed, one string per line."""
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    sizes = {name: parent.submodel(name) for name in by_size(parent.config)}
    image = sum(tensor.nbytes for tensor in parent.parameters())
    copies = sum(small.shared_bytes()["copies"] for small in sizes.values())
    lines = [
        f"{len(sizes)} sizes answer from one image of {human_bytes(image)}; the smaller ones are its first rows and columns"
        f" ({human_bytes(copies)} of copies in all).",
        f"Asked for a docstring of {QUESTION!r} they say:\n",
        f"  {'budget':<15} {'parameters':>10} {'weights':>9} {'tokens/s':>9}",
    ]
    speeds = tokens_per_second(sizes, inputs)
    for name, small in sizes.items():
        weights = list(small.parameters())
        num_weights, num_bytes = sum(tensor.numel() for tensor in weights), sum(tensor.nbytes for tensor in weights)
        lines.append(
            f"  {name:<15} {human_count(num_weights):>10} {human_bytes(num_bytes):>9} {speeds[name]:>9.0f}"
            f"  {answer(small, tokenizer, inputs)}"
        )
    return lines


def by_size(config: NemotronHConfig) -> list[str]:
    """Names of the budgets, the largest first."""
    budgets = read_elastic(config).budgets
    return sorted(budgets, key=lambda name: -num_parameters(resolve(config, name).config))


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding) -> str:
    """The likeliest answer, on one line."""
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=REPETITION_PENALTY)
    return " ".join(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split())


def tokens_per_second(sizes: Mapping[str, PreTrainedModel], inputs: BatchEncoding) -> dict[str, float]:
    """New tokens per second by name: the best of TIMES turns, in which the sizes alternate, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(1 + TIMES):
        for name, model in sizes.items():
            start = time.perf_counter()
            model.generate(**inputs, min_new_tokens=TIMED_TOKENS, max_new_tokens=TIMED_TOKENS, do_sample=False)
            seconds[name].append(time.perf_counter() - start)
    return {name: TIMED_TOKENS / min(found[1:]) for name, found in seconds.items()}


def look() -> str:
    """What the embedded vision-language model says of its picture; where Pillow is missing, what to install."""
    if not is_vision_available():
        return "Looking at a picture needs Pillow: pip install 'nemotron-h-hf[vision]'"
    processor = AutoProcessor.from_pretrained(EMBEDDED_VISION_MODEL)
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_VISION_MODEL)
    picture, questions = f"{EMBEDDED_VISION_MODEL}/digits.png", [f"digit in tile {n:02d} ?" for n in range(1, 7)]
    texts = [f"<bos><image>{question}" for question in questions]
    inputs = processor(images=[[picture]] * len(texts), text=texts, return_tensors="pt", add_special_tokens=False)
    answers = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
    tiles = len(inputs["pixel_values"]) // len(texts)
    lines = [
        f"  | {question} {answer}" for question, answer in zip(questions, processor.batch_decode(answers[:, None]))
    ]
    return "\n".join([f"A smaller one that sees is asked about digits.png, which it gets as {tiles} tiles:\n", *lines])


def memory_table(model: PreTrainedModel) -> list[str]:
    """Cache bytes of both models at growing contexts, one string per line."""
    llama, num_llama = same_size_transformer(model.config)
    lines = [
        "Cache memory of one sequence as its context grows, measured in this run:",
        f"  a pure transformer of the same size: {llama.num_hidden_layers} Llama layers of the same width and the same "
        f"key/value heads, {human_count(num_llama)} parameters",
        "",
        f"  {'context':>8}  {'Nemotron-H':>12}  {'transformer':>12}  {'ratio':>6}",
    ]
    for context, hybrid_bytes in zip(CONTEXTS, hybrid_cache_bytes(model), strict=True):
        transformer_bytes = transformer_cache_bytes(llama, context, model.dtype)
        ratio = transformer_bytes / hybrid_bytes
        lines.append(
            f"  {context:>8,}  {human_bytes(hybrid_bytes):>12}  {human_bytes(transformer_bytes):>12}  {ratio:>5.1f}x"
        )
    return lines


def same_size_transformer(config: NemotronHConfig) -> tuple[LlamaConfig, int]:
    """A Llama shape of equal width and heads with as many layers as bring it nearest in parameters; their number.

    Its gated MLP has three matrices where ours has two, so it gets two thirds of the MLP width.
    """
    hidden, mlp_width = config.hidden_size, max(config.mlp_widths) * 2 // 3
    attention = 2 * hidden * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    per_layer = attention + 3 * hidden * mlp_width + 2 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2) + hidden
    num_layers = max(1, round((num_parameters(config) - embeddings) / per_layer))
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        intermediate_size=mlp_width,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    return llama, embeddings + num_layers * per_layer


@torch.inference_mode()
def hybrid_cache_bytes(model: PreTrainedModel) -> Iterator[int]:
    """Feed one sequence piece by piece; the bytes of its cache at each of `CONTEXTS`."""
    cache, num_seen = HybridCache(model.config), 0
    for context in CONTEXTS:
        while num_seen < context:
            piece = min(PIECE_TOKENS, context - num_seen)
            input_ids = torch.randint(model.config.vocab_size, (1, piece))
            model(input_ids, cache=cache, use_cache=True, logits_to_keep=1)
            num_seen += piece
        yield cache.memory_bytes()["total"]


def transformer_cache_bytes(config: LlamaConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of a real `DynamicCache` of `config` after `context` tokens."""
    cache = DynamicCache(config=config)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), layer)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


if __name__ == "__main__":
    sys.exit(main())
