"""The share of sampled Python functions that Python's own parser accepts.

A prompt is a line break and the header of a function of a held-out file, indented as it is there (`    def name(self):`).
It ends at the colon: the tokenizer keeps a newline and the indentation after it together, so a prompt that ends in a
newline is split as no training text is. The model writes up to `max_new_tokens` after it. What it wrote counts as the
function up to the first following line that is indented no deeper than the header; when the tokens ran out before
that, the unfinished last line is dropped. `ast.parse` of header plus body decides (inside an `if`, for a header that is
indented), so an empty body, a wrong indentation, an unclosed bracket or an unclosed string is a failure.
"""

import ast
import random
import warnings
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; one completion per prompt."""

    num_samples: int = 200
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def function_headers(source: str) -> list[str]:
    """The headers of all functions in `source`, indented as there, each ending in its colon; [] if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except SyntaxError:
        return []
    lines = source.splitlines(keepends=True)
    headers = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.body[0].lineno > node.lineno:
            header = "".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
            if header.rstrip().endswith(":"):
                headers.append(header.rstrip())
    return headers


def choose_prompts(sources: list[str], sampling: Sampling) -> list[str]:
    """`num_samples` different headers drawn with the seed (all of them when there are fewer)."""
    headers = sorted({header for source in sources for header in function_headers(source)})
    random.Random(sampling.seed).shuffle(headers)
    return headers[: sampling.num_samples]


def function_text(header: str, written: str, finished: bool) -> str:
    """Header and body, cut at the first line no deeper than the header, or at the last whole line otherwise."""
    lines = written.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if index > 0 and line.strip() and indentation(line) <= indentation(header):
            return header + "".join(lines[:index])
    return header + "".join(lines if finished else lines[:-1])


def indentation(line: str) -> int:
    """Columns before the first character, a tab reaching to the next multiple of 8 as Python counts it."""
    return len(line.expandtabs(8)) - len(line.expandtabs(8).lstrip())


def parses(function: str) -> bool:
    """Whether `ast.parse` accepts the function, indented or not (it is never run)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse("if True:\n" + function if indentation(function) else function)
    except (SyntaxError, ValueError, RecursionError):  # ValueError: a null byte
        return False
    return True


@torch.no_grad()
def parsing_share(model: nn.Module, tokenizer, prompts: list[str], sampling: Sampling) -> tuple[float, list[str]]:
    """The share of completions that parse, and the functions themselves in the order of `prompts`."""
    if not prompts:
        raise ValueError("prompts=[]: allowed is one or more function headers")
    torch.manual_seed(sampling.seed)
    device = next(model.parameters()).device
    functions = []
    for header in prompts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode("\n" + header, add_special_tokens=False)]])
        out = model.generate(
            ids.to(device), attention_mask=torch.ones_like(ids).to(device), do_sample=True, top_k=0,
            max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new_ids = out[0, ids.shape[1] :].tolist()
        finished = tokenizer.eos_token_id in new_ids
        functions.append(function_text(header, tokenizer.decode(new_ids, skip_special_tokens=True), finished))
    return sum(map(parses, functions)) / len(functions), functions
