"""The text of this Python and a tokenizer of it: the split is complete, disjoint and repeatable; any text survives."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nemotron_h_hf.data.byte_bpe import train_tokenizer
from nemotron_h_hf.data.stdlib_text import Document, read_documents, split_documents
from nemotron_h_hf.tokenizer_files import save_tokenizer

SOURCES = [
    "def add(a, b):\n    return a + b\n",
    "class Stack(list):\n    pass\n",
    "for i in range(10):\n    print(i)\n",
]


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
