"""train-tiny: the split, the tokenizer, the loop and its resume, bits per byte, parsing share, the whole command."""

import json
import lzma
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nemotron_h_hf.data.stdlib_text import Document, read_documents, split_documents
from nemotron_h_hf.hub import save_tokenizer
from nemotron_h_hf.scripts import train_tiny
from nemotron_h_hf.training.bits_per_byte import bits_per_byte, windows, xz_bits_per_byte
from nemotron_h_hf.training.byte_bpe import train_tokenizer
from nemotron_h_hf.training.muon import orthogonalise
from nemotron_h_hf.training.parsing_share import Sampling, function_headers, function_text, parses, parsing_share
from nemotron_h_hf.training.pretrain_loop import LoopSettings, batch_of_step, learning_rate, make_optimizers, train

torch.set_num_threads(1)
SOURCES = [
    "def add(a, b):\n    return a + b\n",
    "class Stack(list):\n    pass\n",
    "for i in range(10):\n    print(i)\n",
]


def small_llama(vocab_size: int = 300) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_key_value_heads=1, **shape))


def small_settings(**changes) -> LoopSettings:
    plain = {"max_tokens": 20 * 64, "sequence_length": 32, "batch_size": 2, "warmup_steps": 4, "log_steps": 1}
    return LoopSettings(**(plain | changes))


def losses_of(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SOURCES, vocab_size=280, max_length=512)


def write_library(root):
    (root / "pkg").mkdir(parents=True)
    (root / "pydoc_data").mkdir()
    (root / "site-packages").mkdir()
    for index in range(60):
        (root / "pkg" / f"m{index:02}.py").write_text(f"value_{index} = 'a line of its own, number {index}'\n")
    (root / "pkg" / "copy.py").write_bytes((root / "pkg" / "m00.py").read_bytes())
    (root / "pkg" / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "site-packages" / "other.py").write_text("installed = True\n")
    (root / "pydoc_data" / "topics.py").write_text("topics = {'while': 'The while statement', 'if': 'The if'}\n")


def test_documents_and_split_are_complete_disjoint_and_repeatable(tmp_path):
    write_library(tmp_path)
    documents = read_documents(tmp_path)
    names = [document.name for document in documents]
    assert len(names) == 62 and "pydoc_data/topics.py#while" in names
    assert not {"pkg/latin.py", "site-packages/other.py", "pydoc_data/topics.py"} & set(names)
    train_part, held_out = split_documents(documents, 0.2)
    backwards = split_documents(documents[::-1], 0.2)
    assert (train_part, held_out) == (backwards[0][::-1], backwards[1][::-1])
    assert {d.name for d in train_part}.isdisjoint(d.name for d in held_out)
    assert 3 <= len(held_out) <= 25 and len(train_part) + len(held_out) == 62
    more = split_documents([*documents, Document("new.py", "x = 1\n")], 0.2)
    assert {d.name for d in held_out} - {"new.py"} <= {d.name for d in more[1]}  # a new file moves no other


def test_a_held_out_copy_of_training_text_is_dropped():
    body = "".join(f"a_rather_long_line_number_{i} = compute_something({i})\n" for i in range(20))
    documents = [Document(f"{i}.py", body + f"# {i}") for i in range(50)]
    train_part, held_out = split_documents(documents, 0.5)
    assert train_part and held_out == []


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80))
def test_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text or "<|" in text


def test_tokenizer_folder_is_plain_and_has_every_byte(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("\x00\x7f\r\n\t", "日本 ünï 🐍", "        return x"):
        assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert loaded.eos_token_id == loaded.bos_token_id == 0 and loaded.pad_token_id == 1


def test_training_lowers_the_loss_and_resumes_exactly(tmp_path):
    stream = torch.arange(4096) % 37
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(small_llama(), stream, small_settings(), whole)
    losses = losses_of(whole)
    assert len(losses) == 20 and losses[-1] < losses[0] - 1

    assert not train(small_llama(), stream, small_settings(time_limit_minutes=0), cut)  # stopped before any step
    with pytest.raises(KeyboardInterrupt):
        train(Interrupted(small_llama(), after=13), stream, small_settings(save_steps=5), cut)
    assert len(losses_of(cut)) == 13  # the save is of step 10: three steps are repeated
    assert train(small_llama(), stream, small_settings(), cut)
    assert losses_of(cut) == losses
    weights, again = load_file(whole / "state.safetensors"), load_file(cut / "state.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


class Interrupted(torch.nn.Module):
    """A model whose user presses Ctrl-C during forward number `after` + 1."""

    def __init__(self, model, after):
        super().__init__()
        self.__dict__["inner"], self.left = model, after

    def forward(self, **inputs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner(**inputs)

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def named_parameters(self, *args, **kwargs):
        return self.inner.named_parameters(*args, **kwargs)

    def modules(self):
        return self.inner.modules()


def test_a_state_of_another_model_is_refused(tmp_path):
    train(small_llama(), torch.arange(512) % 37, small_settings(max_tokens=64), tmp_path)
    with pytest.raises(ValueError, match="another model"):
        train(small_llama(vocab_size=400), torch.arange(512) % 37, small_settings(max_tokens=64), tmp_path)


def test_every_window_of_an_epoch_is_seen_once():
    stream, plan = torch.arange(32 * 10 + 5), small_settings()
    epoch = torch.cat([batch_of_step(stream, plan, step) for step in range(5)])
    assert torch.equal(epoch.flatten().sort().values, torch.arange(320))
    assert not torch.equal(batch_of_step(stream, plan, 0), batch_of_step(stream, plan, 5))


def test_learning_rate_warms_up_stays_and_decays_to_a_tenth():
    plan = small_settings(max_tokens=100 * 64, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(plan, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:70] == [1.0] * 61
    assert all(a > b for a, b in zip(rates[70:], rates[71:], strict=False)) and 0.1 < rates[-1] < 0.14


def test_optimizers_split_the_parameters():
    model = train_tiny.build_model(train_tiny.TrainTinyArguments(hidden_size=128, vocab_size=300))
    muon, adamw = make_optimizers(model, small_settings())
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[p] for p in muon.param_groups[0]["params"]}
    decayed, undecayed = ({names[p] for p in group["params"]} for group in adamw.param_groups)
    assert len(by_muon) + len(decayed) + len(undecayed) == len(names)
    assert all(name.endswith("proj.weight") for name in by_muon) and decayed == {"lm_head.weight"}
    for kind in ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias", "embeddings.weight"):
        assert any(name.endswith(kind) for name in undecayed)


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 16, 40), (2, 40, 16)])
def test_orthogonalise_against_the_singular_vectors(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalise(matrices)
    singular = torch.linalg.svdvals(result)
    assert 0.3 < singular.min() and singular.max() < 1.3
    assert torch.nn.functional.cosine_similarity(result.flatten(1), (u @ vh).flatten(1)).min() > 0.95


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


def test_parsing_share_is_repeatable(tokenizer):
    model, sampling = small_llama(vocab_size=280).eval(), Sampling(num_samples=2, max_new_tokens=6)
    first = parsing_share(model, tokenizer, ["def f(a):", "def g(b):"], sampling)
    assert first == parsing_share(model, tokenizer, ["def f(a):", "def g(b):"], sampling)
    assert first[0] in (0.0, 0.5, 1.0) and first[1][1].startswith("def g(b):")


def test_both_architectures_have_the_same_parameter_count():
    for changes in ({}, {"hidden_size": 512, "intermediate_size": 1536, "pattern": "M-M-M*-M-"}):
        counts = [
            train_tiny.count_parameters(
                train_tiny.build_model(train_tiny.TrainTinyArguments(architecture=architecture, **changes))
            )
            for architecture in ("nemotron-h", "llama")
        ]
        assert abs(counts[0] - counts[1]) <= 0.01 * counts[0]


def test_the_command_trains_resumes_reports_and_saves(tmp_path, monkeypatch, capsys):
    texts = [f"def f{i}(a, b):\n    return a * {i} + b\n" * 8 for i in range(40)]
    documents = [Document(f"{i}.py", text) for i, text in enumerate(texts)]
    monkeypatch.setattr(train_tiny, "read_documents", lambda: documents)
    monkeypatch.setattr(train_tiny, "split_documents", lambda documents: (documents[:38], documents[38:]))
    flags = [
        "--output-dir",
        str(tmp_path / "run"),
        "--max-tokens",
        "1280",
        "--sequence-length",
        "64",
        "--hidden-size",
        "128",
    ]
    flags += ["--intermediate-size", "64", "--vocab-size", "270", "--pattern", "M*-", "--num-samples", "1"]
    assert train_tiny.main([*flags, "--time-limit-minutes", "0"]) == 0
    assert "continues from here" in capsys.readouterr().out
    assert train_tiny.main(flags) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["training_tokens"] == 1280 and 0 < report["bits_per_byte"]["window 64, stride 32"] < 9
    assert report["xz_bits_per_byte"]["joined"] < report["xz_bits_per_byte"]["per_file"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    assert model.dtype == torch.bfloat16 and model.config.model_type == "nemotron_h"
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint").eos_token_id == 0
    with pytest.raises(ValueError, match="learning_rate"):
        train_tiny.main([*flags, "--learning-rate", "1"])


@pytest.mark.parametrize(
    ("flag", "value"), [("--hidden-size", "100"), ("--sequence-length", "100"), ("--max-tokens", "0")]
)
def test_bad_flags_name_field_value_and_allowed(flag, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{flag[2:].replace('-', '_')}: got {value}, allowed"):
        train_tiny.main(["--output-dir", str(tmp_path), flag, value])
