"""Sharded safetensors: what is written is what the safetensors library reads, and the other way round."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemotron_h_hf import checkpoint
from nemotron_h_hf.checkpoint import ShardWriter, plan_shards, save
from nemotron_h_hf.model.weights import Checkpoint, TensorSpec


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(7, 5),
        "b": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "int": torch.arange(6).reshape(2, 3),
        "half": torch.randn(2, 2, 2).half(),
        "bool": torch.tensor([True, False, True]),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    }


def specs_of(found: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**9])
def test_written_files_are_ordinary_safetensors(tmp_path, max_shard_bytes):
    expected = tensors()
    digests = save(tmp_path, specs_of(expected), expected.items(), max_shard_bytes)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found |= load_file(file)
    assert set(found) == set(expected) and all(same(found[name], expected[name]) for name in expected)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (max_shard_bytes < 10**9)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert set(content["weight_map"]) == set(expected)
    data = expected["a"].numpy().tobytes()
    assert digests["a"].sha256 == hashlib.sha256(data).hexdigest()
    ours = Checkpoint(tmp_path)
    assert list(sorted(ours)) == sorted(expected) and all(same(ours[name], expected[name]) for name in expected)


def test_files_of_the_library_are_read_by_rows(tmp_path):
    expected = tensors()
    save_file(expected, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = Checkpoint(path)
        assert found.bytes_read == 0 and len(found) == len(expected) and "a" in found and "z" not in found
        assert all(same(found[name], expected[name]) for name in expected)
        before = found.bytes_read
        assert same(found.rows("a", 2, 5), expected["a"][2:5])
        assert found.bytes_read - before == 3 * 5 * 4
        assert found.spec("a") == TensorSpec("a", torch.float32, (7, 5)) and found.spec("a").num_bytes == 140
        with pytest.raises(ValueError, match="rows=2:9 of a"):
            found.rows("a", 2, 9)


def test_casting_while_writing(tmp_path, monkeypatch):
    """In many small pieces, to cross borders between pieces."""
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 64)
    monkeypatch.setattr(checkpoint, "WORTH_A_THREAD_BYTES", 1)
    tensor = torch.randn(37, 11)
    tensor[3, 4], tensor[30, 1], tensor[36, 10] = float("nan"), float("inf"), float("-inf")
    digests = save(tmp_path, [TensorSpec("t", torch.bfloat16, (37, 11))], [("t", tensor)])
    assert same(load_file(tmp_path / "model.safetensors")["t"], tensor.bfloat16())
    data = tensor.bfloat16().view(torch.uint8).numpy().tobytes()
    assert digests["t"] == (hashlib.sha256(data).hexdigest(), 1, 2)


def test_views_and_transposes_are_written_row_after_row(tmp_path):
    tensor = torch.randn(6, 8)
    cut = {"t": tensor.t(), "rows": tensor[2:4], "columns": tensor[:, 1:3]}
    save(tmp_path, specs_of(cut), cut.items())
    assert all(same(value, cut[name]) for name, value in load_file(tmp_path / "model.safetensors").items())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), max_size=8), st.integers(1, 60))
def test_shards_keep_order_groups_and_limit(sizes, limit):
    groups = [[TensorSpec(f"{i}.{j}", torch.uint8, (n,)) for j, n in enumerate(group)] for i, group in enumerate(sizes)]
    shards = plan_shards(groups, limit)
    assert [spec for shard in shards.values() for spec in shard] == [spec for group in groups for spec in group]
    of = {spec: file for file, shard in shards.items() for spec in shard}
    assert all(len({of[spec] for spec in group}) == 1 for group in groups)
    for shard in shards.values():
        assert sum(spec.num_bytes for spec in shard) <= limit or len({spec.name.split(".")[0] for spec in shard}) >= 1
        over = sum(spec.num_bytes for spec in shard) > limit
        assert not over or sum(spec.num_bytes > 0 for spec in shard) <= 3
    assert len(shards) == 1 or all(f"-of-{len(shards):05d}." in file for file in shards)


def test_an_interrupted_file_never_has_its_name(tmp_path):
    specs = specs_of({"a": torch.zeros(4), "b": torch.zeros(4)})
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "x.safetensors", specs) as writer:
        writer.write("a", torch.zeros(4))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="1 of 2 announced"), ShardWriter(tmp_path / "x.safetensors", specs) as writer:
        writer.write("a", torch.zeros(4))
    assert [path.name for path in tmp_path.iterdir()] == []


def test_what_does_not_fit_its_announcement_is_refused(tmp_path):
    spec = [TensorSpec("a", torch.float32, (2,))]
    for name, tensor in (("b", torch.zeros(2)), ("a", torch.zeros(3))):
        with pytest.raises(ValueError, match=r"does not fit the announced a \(2,\)"):
            save(tmp_path / name, spec, [(name, tensor)])
    with pytest.raises(ValueError, match="more tensors came"):
        save(tmp_path / "c", spec, [("a", torch.zeros(2))] * 2)
    with pytest.raises(ValueError, match="announced twice"):
        save(tmp_path / "d", spec * 2, [])
    with pytest.raises(ValueError, match="complex64"):
        save(tmp_path / "e", [TensorSpec("a", torch.complex64, (2,))], [])
    save(tmp_path / "f", spec, [("a", torch.zeros(2))])
    with pytest.raises(ValueError, match="holds safetensors files already"):
        save(tmp_path / "f", spec, [("a", torch.zeros(2))])


def test_damage_is_named(tmp_path):
    def folder(name: str) -> Path:
        save(tmp_path / name, specs_of(tensors()), tensors().items(), 100)
        return tmp_path / name

    cut = folder("cut")
    files = sorted(path.name for path in cut.glob("*.safetensors"))
    os.truncate(cut / files[0], 50)
    with pytest.raises(ValueError, match=f"{files[0]} is cut short"):
        Checkpoint(cut)
    missing = folder("missing")
    (missing / files[1]).unlink()
    with pytest.raises(ValueError, match=f"{files[1]} is missing"):
        Checkpoint(missing)
    leaving = folder("leaving")
    index = leaving / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001', '"../cut/model-00001'))
    with pytest.raises(ValueError, match="allowed is a plain file name"):
        Checkpoint(leaving)
    overlapping = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    overlapping.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file or damaged.*invalid offset"):
        Checkpoint(tmp_path)
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        Checkpoint(tmp_path / "nothing")
