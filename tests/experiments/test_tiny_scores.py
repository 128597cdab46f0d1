"""Bits per byte against one token at a time, xz's figures, and the share of sampled functions that parse."""

import lzma
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemotron_h_hf.data.byte_bpe import train_tokenizer
from nemotron_h_hf.evaluation.held_out import windows

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "tiny"))
from bits_per_byte import bits_per_byte, xz_bits_per_byte  # noqa: E402
from parsing_share import Sampling, function_headers, function_text, parses, parsing_share  # noqa: E402


def small_llama(vocab_size: int = 300) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_key_value_heads=1, **shape))


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (16, 1), (7, 6), (64, 32)])
def test_bits_per_byte_against_one_token_at_a_time(window, stride):
    model = small_llama().double().eval()
    documents = [([5, 9, 200, 3, 3, 17, 250, 44, 1, 8, 8, 90, 91, 92, 7, 6, 120], 40), ([], 0), ([12], 2)]
    bits = 0.0
    for ids, _ in documents:
        ids = [0, *ids, 0]
        for position in range(1, len(ids)):
            # the window that scores this position: the first one, or as few strides on as reach it
            start = 0 if position < window else stride * math.ceil((position - window + 1) / stride)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[start:position]])).logits[0, -1]
            bits -= torch.log_softmax(logits, -1)[ids[position]].item() / math.log(2)
    assert bits_per_byte(model, documents, 0, window, stride) == pytest.approx(bits / 42, rel=1e-5)


def test_windows_score_every_token_once():
    for num_tokens in range(2, 40):
        scored = [i for _, first, end in windows(num_tokens, 8, 3) for i in range(first, end)]
        assert scored == list(range(1, num_tokens))


def test_xz_figures_are_those_of_the_compressor():
    texts = ["x = 1\n" * 50, "y = 2\n" * 50]
    joined = len(lzma.compress("".join(texts).encode(), preset=9)) * 8 / 600
    assert xz_bits_per_byte(texts)["joined"] == joined < xz_bits_per_byte(texts)["per_file"]


def test_function_headers_cut_and_parse():
    source = "class A:\n    @staticmethod\n    def f(a,\n          b=1):\n        return a\ndef g(): pass\n"
    assert function_headers(source) == ["    def f(a,\n          b=1):"]
    header = "def f(a):"
    assert function_text(header, "\n    return a\n\nprint(f(1))\n", True) == "def f(a):\n    return a\n\n"
    assert function_text(header, " return a\nf(1)", True) == "def f(a): return a\n"
    assert function_text(header, "\n    x = 1\n    return (a", False) == "def f(a):\n    x = 1\n"
    method = function_text("    def f(self):", "\n        return 1\n\n    def g(self):\n        pass\n", True)
    assert method == "    def f(self):\n        return 1\n\n" and parses(method)
    assert not parses("    def f(self):\n    return 1\n")
    assert parses("def f(a):\n    return a\n")
    assert not any(map(parses, ["def f(a):\n", "def f(a):\n    (\n", "def f(a):\n    '''\n", "x = '\0'\n"]))


def test_parsing_share_is_repeatable():
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b\n"], vocab_size=280, max_length=512)
    model, sampling = small_llama(vocab_size=280).eval(), Sampling(num_samples=2, max_new_tokens=6)
    first = parsing_share(model, tokenizer, ["def f(a):", "def g(b):"], sampling)
    assert first == parsing_share(model, tokenizer, ["def f(a):", "def g(b):"], sampling)
    assert first[0] in (0.0, 0.5, 1.0) and first[1][1].startswith("def g(b):")
