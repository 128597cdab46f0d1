"""Continue a prompt with a Nemotron-H model, printing tokens as they come.

    nemotron-h generate                                            # the embedded model and a prompt that suits it
    nemotron-h generate --prompt "import os" --max-new-tokens 64
    echo "def main" | nemotron-h generate --prompt - --temperature 0
    nemotron-h generate --model owner/name --dtype bfloat16 --device cuda --cache static
    nemotron-h generate --budget half                              # of an elastic parent, this smaller model alone is read
    nemotron-h generate --model owner/name --num-mtp-tokens 2      # drafts by multi-token prediction, where the model has it
    nemotron-h generate --model a/vision-model --image photo.png --prompt "What is this?"      # --image may be given again

Pictures go in front of the prompt, or where it says <image>. The text goes to standard output, a line with the speed to
standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchEncoding,
    BatchFeature,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHVLConfig
from nemotron_h_hf.command_line import option, read_options
from nemotron_h_hf.inputs import load_tokenizer, read_device

DEFAULT_PROMPT = "def read_lines(path):"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class GenerateArguments:
    """What the command line says; temperature 0 is greedy, prompt_lookup 0 and num_mtp_tokens None are off."""

    model: str = option(EMBEDDED_MODEL, "checkpoint folder or hub id (the embedded model)")
    budget: str | None = option(None, "of an elastic parent: a name, 50%%, or 2MiB@4Ki (the whole parent)")
    prompt: str = option(DEFAULT_PROMPT, "text to continue; - reads it from standard input")
    max_new_tokens: int = option(128, "stop after so many tokens (128)")
    temperature: float = option(0.7, "0 takes the likeliest token each time (0.7)")
    top_p: float = option(0.95, "sample from this share of the probability (0.95)")
    seed: int = option(0, "of the sampling (0)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    dtype: str = option("auto", "of the weights (auto: as stored)", choices=DTYPES)
    cache: str = option("dynamic", "growing or fixed cache", choices=("dynamic", "static"))
    prompt_lookup: int = option(0, "guess up to N tokens from the prompt (0: off)", metavar="N")
    num_mtp_tokens: int | None = option(
        None, "draft K tokens by multi-token prediction for each pass (off)", metavar="K"
    )
    image: list[str] = option([], "a picture for a vision-language model", action="append", metavar="FILE")


class TimedStreamer(TextStreamer):
    """Prints text as it comes, counts tokens, and notes when the first and the last of them came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.num_tokens = -1  # the first call brings the prompt
        self.first = self.last = self.start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call) or the next tokens, on any device."""
        is_prompt = self.num_tokens < 0
        self.num_tokens = 0 if is_prompt else self.num_tokens + value.numel()
        super().put(value)
        self.last = time.perf_counter()
        if is_prompt or self.num_tokens == value.numel():
            self.first = self.last

    def report(self, num_prompt_tokens: int) -> str:
        """The line about speed: the prompt with the first token, then the tokens after it."""
        prefill = self.first - self.start
        line = f"{num_prompt_tokens} prompt tokens and the first new one in {prefill:.2f} s"
        if self.num_tokens > 1:
            line += f"; {(self.num_tokens - 1) / (self.last - self.first):.1f} tokens/s after it"
        return f"{line}; {self.num_tokens} new tokens"


def main(argv: Sequence[str] | None = None) -> int:
    """Load, generate, print."""
    arguments = parse(argv)
    disable_progress_bar()
    device = read_device(arguments.device)
    set_seed(arguments.seed)
    model, tokenizer, inputs = look(arguments) if arguments.image else read(arguments)
    model, inputs = model.to(device).eval(), inputs.to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(f"--prompt {arguments.prompt!r} has no tokens; at least one is needed")
    streamer = TimedStreamer(tokenizer)
    model.generate(**inputs, streamer=streamer, **generation_options(arguments))
    print(streamer.report(inputs["input_ids"].shape[1]), file=sys.stderr)
    return 0


def read(arguments: GenerateArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, BatchEncoding]:
    """Model, tokenizer and inputs of a prompt of text; of a vision-language model too."""
    tokenizer = load_tokenizer(arguments.model)
    sees = isinstance(AutoConfig.from_pretrained(arguments.model), NemotronHVLConfig)
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = auto.from_pretrained(arguments.model, **loading_options(arguments))
    return model, tokenizer, tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)


def look(arguments: GenerateArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, BatchFeature]:
    """The same of a prompt with pictures, as a conversation where the model has a chat template.

    Raises:
        ValueError: for a model that does not see.
    """
    config = AutoConfig.from_pretrained(arguments.model)
    if not isinstance(config, NemotronHVLConfig):
        raise ValueError(f"--image with --model {arguments.model}: a {config.model_type} reads text alone")
    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, **loading_options(arguments))
    missing = len(arguments.image) - arguments.prompt.count("<image>")
    prompt = "<image>" * max(0, missing) + arguments.prompt
    if processor.chat_template is not None:
        message = {"role": "user", "content": prompt}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=arguments.image, text=prompt, return_tensors="pt")
    return model, processor.tokenizer, inputs


def loading_options(arguments: GenerateArguments) -> dict:
    """The options of `from_pretrained`."""
    return {"dtype": arguments.dtype} | ({} if arguments.budget is None else {"budget": arguments.budget})


def parse(argv: Sequence[str] | None) -> GenerateArguments:
    """Read and check the command line."""
    arguments = read_options(GenerateArguments, argv, "generate", __doc__)
    if arguments.prompt == "-":
        arguments = replace(arguments, prompt=sys.stdin.read())
    check(arguments)
    return arguments


def check(arguments: GenerateArguments) -> None:
    """`ValueError` naming the option that is out of range."""
    if not arguments.prompt:
        raise ValueError("--prompt is empty; give some text, or - and text on standard input")
    if not arguments.prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in arguments.prompt):
        raise ValueError("--prompt is not UTF-8")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens={arguments.max_new_tokens}: allowed is 1 or more")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature={arguments.temperature}: allowed is 0 (greedy) or more")
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top-p={arguments.top_p}: allowed is above 0 and at most 1")
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed={arguments.seed}: allowed is from 0 to {2**32 - 1}")
    if arguments.prompt_lookup < 0:
        raise ValueError(f"--prompt-lookup={arguments.prompt_lookup}: allowed is 0 (off) or more")
    if arguments.prompt_lookup and arguments.cache == "static":
        raise ValueError("--prompt-lookup needs --cache dynamic: a fixed cache cannot take guesses back")


def generation_options(arguments: GenerateArguments) -> dict:
    """The options of `generate()` that the arguments ask for."""
    options: dict = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if options["do_sample"]:
        options |= {"temperature": arguments.temperature, "top_p": arguments.top_p}
    if arguments.cache == "static":
        options["cache_implementation"] = "static"
    if arguments.prompt_lookup:
        options["prompt_lookup_num_tokens"] = arguments.prompt_lookup
    if arguments.num_mtp_tokens is not None:
        options["num_mtp_tokens"] = arguments.num_mtp_tokens
    return options


if __name__ == "__main__":
    sys.exit(main())
