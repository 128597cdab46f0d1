"""What the fuzzer does to files: to their bytes, to the JSON in them, to words of a command line. All from one random generator."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ODD_VALUES = (None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**40, 0.5, -0.0, 1e400, -1e400, float("nan"), "", "x", "nan",
              "../../etc/passwd", "\ud83d\ude00", "\0", [], {}, [[]], [0], {"a": {}})  # fmt: skip
ODD_WORDS = ("", "nan", "inf", "-inf", "-1", "0", "1e999", "1e-999", "99999999999999999999", "0x10", "½", "\u0660", "tpu", "cuda:99",
             "meta", "..", "/", "/dev/null", "-", "--", "---", "a/b", "a/b/c", "~", "[", "{", "*", "null", "true", "x" * 5000,
             "a\nb", "\t", "%s", "💥", "0GB", "-5GB", "1:2:3", "a=b", "a:b=c", "hidden_size=8", "\udcff", "0.5", "150%")  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One kind of damage that disks, networks and editors do."""
    if not data:
        return b"\0", "a byte in an empty file"
    at, length = rng.randrange(len(data)), min(rng.choice((1, 4, 64, 4096)), len(data))
    stop = min(len(data), at + length)
    kind = rng.choice(("bit", "bit", "bit", "byte", "cut", "more", "zeros", "lost", "twice", "swap"))
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], f"a bit at {at}"
    if kind == "byte":
        return data[:at] + rng.randbytes(1) + data[at + 1 :], f"a byte at {at}"
    if kind == "cut":
        return data[:at], f"cut at {at}"
    if kind == "more":
        return data + rng.randbytes(length), f"{length} bytes more"
    if kind == "zeros":
        return data[:at] + bytes(stop - at) + data[stop:], f"zeros from {at} to {stop}"
    if kind == "lost":
        return data[:at] + data[stop:], f"lost from {at} to {stop}"
    if kind == "twice":
        return data[:stop] + data[at:stop] + data[stop:], f"twice from {at} to {stop}"
    other = rng.randrange(len(data) - length + 1)
    low, high = sorted((min(at, len(data) - length), other))
    if low + length > high:
        return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :], f"a byte turned at {at}"
    first, second = data[low : low + length], data[high : high + length]
    swapped = data[:low] + second + data[low + length : high] + first + data[high + length :]
    return swapped, f"{length} bytes swapped between {low} and {high}"


def mutate_json(rng: random.Random, text: str) -> tuple[str, str]:
    """A change of one node of a JSON text, or one that makes it none."""
    content = json.loads(text)
    kind = rng.choice(("replace", "replace", "replace", "delete", "rename", "add", "twice", "deep", "text"))
    if kind == "text":
        data, what = mutate_bytes(rng, text.encode())
        return data.decode("latin-1"), what
    if kind == "deep":
        return '{"a":' + "[" * 10**5 + "]" * 10**5 + "}", "nested 100,000 deep"
    places = list(_places(content))
    parent, key = rng.choice(places)
    if kind == "twice" and isinstance(parent, dict) and parent is content:
        extra = f"{json.dumps(key)}: {json.dumps(rng.choice(ODD_VALUES))}"
        return json.dumps(content)[:-1] + f", {extra}}}", f"{key} twice: {extra}"
    if kind == "delete":
        del parent[key]
        return json.dumps(content), f"without {key}"
    if kind == "rename" and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
        return json.dumps(content), f"{key} renamed"
    if kind == "add" and isinstance(parent, dict):
        parent["unheard_of"] = rng.choice(ODD_VALUES)
        return json.dumps(content), "a field more"
    parent[key] = _other(rng, parent[key])
    return json.dumps(content), f"{key} = {parent[key]!r:.60}"


def _other(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or rng.random() < 0.5:
        return rng.choice(ODD_VALUES)
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, -value, value // 2, float(value), str(value), [value]))
    if isinstance(value, str) and value:
        return rng.choice((value[:-1], value + value[-1], value.upper(), value.swapcase(), value[::-1], [value]))
    if isinstance(value, list):
        return rng.choice((value[:-1], value + value[-1:], value[::-1], [value], dict(enumerate(map(str, value)))))
    return rng.choice(ODD_VALUES)


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def mutate_words(rng: random.Random, words: list[str]) -> tuple[list[str], str]:
    """One word of a command line replaced, left out, given twice or put elsewhere."""
    words, at = list(words), rng.randrange(1, len(words))
    kind = rng.choice(("odd", "odd", "odd", "odd", "left out", "twice", "moved", "bit"))
    if kind == "odd":
        words[at] = rng.choice(ODD_WORDS)
    elif kind == "left out":
        del words[at]
    elif kind == "twice":
        words.insert(at, words[at])
    elif kind == "moved":
        words.insert(rng.randrange(1, len(words)), words.pop(at))
    elif words[at]:
        place = rng.randrange(len(words[at]))
        words[at] = words[at][:place] + chr(33 + rng.randrange(90)) + words[at][place + 1 :]
    return words, f"word {at} {kind}: {' '.join(words)!r:.200}"


def change_file(rng: random.Random, path: Path) -> str:
    """Damage one file in its bytes; what was done."""
    data, what = mutate_bytes(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {what}"


def change_json(rng: random.Random, path: Path) -> str:
    """Damage one JSON file in its structure; what was done."""
    text, what = mutate_json(rng, path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="latin-1" if what.startswith(("a byte", "a bit")) else "utf-8", errors="replace")
    return f"{path.name}: {what}"
