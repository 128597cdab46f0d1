"""Damage that can be seen is an error that names the file, wherever the file is read."""

import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from megatron_fixtures import FIXTURES
from nemotron_h_hf.conversion import torchzip
from nemotron_h_hf.conversion.convert import convert
from nemotron_h_hf.conversion.source_checkpoint import naming
from nemotron_h_hf.conversion.torch_dist import check_tiling
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from nemotron_h_hf import EMBEDDED_MODEL, HybridCache
from nemotron_h_hf.checkpoint_summary import read_contents
from nemotron_h_hf.model import loading
from nemotron_h_hf.model.weights import Checkpoint, find_tensors, read_header
from nemotron_h_hf.training import checkpoints

NORM = "backbone.layers.0.norm.weight"
NORM_2 = "backbone.layers.1.norm.weight"
D = "backbone.layers.0.mixer.D"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def split(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file, taken apart here by hand."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: dict | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def overlap(header: dict) -> None:
    header[NORM]["data_offsets"] = list(header[NORM_2]["data_offsets"])


def swap(header: dict) -> None:
    header[NORM]["shape"], header[D]["shape"] = header[D]["shape"], header[NORM]["shape"]
    header[NORM]["data_offsets"], header[D]["data_offsets"] = header[D]["data_offsets"], header[NORM]["data_offsets"]


def negative_shape(header: dict) -> None:
    header["lm_head.weight"]["shape"] = [-size for size in header["lm_head.weight"]["shape"]]


def negative_offset(header: dict) -> None:
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin - 2**63, end - 2**63]


def too_short(header: dict) -> None:
    header[NORM]["data_offsets"][1] -= 4


def other_shape(header: dict) -> None:
    header[NORM]["shape"] = [header[NORM]["shape"][0] - 1]


def other_width(header: dict) -> None:
    header[NORM]["dtype"] = "BF16"


def unknown_dtype(header: dict) -> None:
    header[NORM]["dtype"] = "F33"


def fraction(header: dict) -> None:
    header[NORM]["shape"] = [float(size) for size in header[NORM]["shape"]]


@pytest.mark.parametrize(
    "damage",
    [overlap, negative_shape, negative_offset, too_short, other_shape, other_width, unknown_dtype, fraction],
    ids=lambda damage: damage.__name__,
)
def test_headers_that_contradict_themselves(folder, damage):
    """safetensors refuses each of them, and all our readers too, naming the file."""
    path = folder / "model.safetensors"
    header, data = split(path)
    damage(header)
    write(path, header, data)
    with pytest.raises(SafetensorError):
        load_file(path)
    for reader in (read_header, Checkpoint, lambda file: find_tensors([file])):
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            reader(path)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "model.safetensors" in read_contents(folder).damaged_files


def test_a_swap_of_two_tensors_is_seen_by_their_shapes(folder):
    header, data = split(folder / "model.safetensors")
    swap(header)
    write(folder / "model.safetensors", header, data)
    with pytest.raises(ValueError, match="shape"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_name_that_is_there_twice(folder):
    path = folder / "model.safetensors"
    header, data = split(path)
    text = json.dumps(header)
    write(path, text[:-1] + f', "{NORM}": {json.dumps(header[NORM_2])}' + "}", data)
    with pytest.raises(ValueError, match=f"model.safetensors.*{NORM} is there twice"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("text", ['{"a":' + "[" * 10**5 + "]" * 10**5 + "}", '{"a": ' + "9" * 5000 + "}"])
def test_headers_beyond_reading(folder, text):
    write(folder / "model.safetensors", text, b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("code", ["I32", "U32"])
def test_integers_are_no_weights(folder, tmp_path, code):
    header, data = split(folder / "model.safetensors")
    header[D]["dtype"] = code
    write(folder / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=rf"model\.safetensors has {D} in {code}"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{D}"):
        convert(folder, tmp_path / "megatron")
    assert not list(tmp_path.glob("megatron/*"))


def test_one_of_many_halves_is_of_the_other_kind(folder, monkeypatch):
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    header, data = split(folder / "model.safetensors")
    header[NORM]["dtype"] = "F16"
    write(folder / "model.safetensors", header, data)
    said = []
    monkeypatch.setattr(loading.logger, "warning", lambda message, *_: said.append(message))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert re.search(rf"{NORM} in F16 and .* in BF16", "\n".join(said))
    assert next(p for name, p in model.named_parameters() if name.endswith("layers.0.norm.weight")).isfinite().all()


def test_a_tensor_in_two_shards(folder):
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shutil.copy(shards[0], shards[1])
    with pytest.raises(ValueError, match=rf"{shards[0].name}.* and in .*{shards[1].name}"):
        AutoModelForCausalLM.from_pretrained(folder)


# Saved caches


@pytest.fixture(scope="module")
def cache_file(tmp_path_factory) -> Path:
    model, path = tiny_model(), tmp_path_factory.mktemp("cache") / "cache.safetensors"
    with torch.no_grad():
        model(torch.arange(3, 14)[None], use_cache=True).past_key_values.save(path)
    return path


@pytest.mark.parametrize("damage", ["bit", "length", "integers", "infinity"])
def test_damaged_caches(cache_file, tmp_path, damage):
    path = tmp_path / "cache.safetensors"
    header, data = split(cache_file)
    name = next(name for name in header if name.endswith("ssm_state"))
    if damage == "bit":
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    elif damage == "length":
        header["__metadata__"]["length"] = "12"
    else:  # a file of an older version, without a checksum
        del header["__metadata__"]["sha256"]
        if damage == "integers":
            header[name]["dtype"] = "I32"
        else:
            begin = header[name]["data_offsets"][0]
            data = data[:begin] + struct.pack("<f", float("inf")) + data[begin + 4 :]
    write(path, header, data)
    with pytest.raises(ValueError, match=r"cache\.safetensors"):
        HybridCache.load(path, tiny_model().config)
    assert HybridCache.load(cache_file, tiny_model().config).get_seq_length() == 11


# Megatron's zips


@pytest.mark.parametrize("layout", ["torch", "torch_dist"])
def test_verify_compares_the_checksums_of_megatrons_zips(saved, tmp_path, layout):
    """A bit in the middle of the largest tensor; Python's zipfile is the independent judge."""
    convert(saved, tmp_path / "megatron", format=layout)
    convert(tmp_path / "megatron", tmp_path / "good", verify_output=True)
    file = max(
        (tmp_path / "megatron").rglob("*.pt" if layout == "torch" else "*.distcp"), key=lambda f: f.stat().st_size
    )
    wanted = load_file(tmp_path / "good" / "model.safetensors")["lm_head.weight"].numpy().tobytes()
    data = bytearray(file.read_bytes())
    data[data.index(wanted) + len(wanted) // 2] ^= 0x40
    file.write_bytes(data)
    if layout == "torch":
        assert zipfile.ZipFile(file).testzip() is not None
    with pytest.raises(ValueError, match=rf"{file.name}.* is damaged: Bad CRC-32"):
        convert(tmp_path / "megatron", tmp_path / "bad", verify_output=True)
    assert not list((tmp_path / "bad").rglob("*.safetensors"))


def test_zips_that_torch_wrote_without_checksums_pass(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(100.0)}, tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torchzip.check_records(tmp_path / "file.pt", 0, (tmp_path / "file.pt").stat().st_size)
    assert torchzip.read(tmp_path / "file.pt").value["a"].shape == (100,)


# Checkpoints of training


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "model.safetensors", checkpoints.MARKER])
def test_a_flipped_bit_in_a_training_checkpoint(tmp_path, file):
    folder = tmp_path / "checkpoint-3"
    checkpoints.begin(folder)
    for name in ("optimizer.pt", "rng_state.pth", "model.safetensors"):
        (folder / name).write_bytes(bytes(range(256)) * 40)
    checkpoints.mark_whole(folder, {"step": 3, "tokens_per_step": 64})
    assert checkpoints.check_whole(folder)["step"] == 3
    data = (folder / file).read_bytes()
    damaged = data.replace(b'"step": 3', b'"step": 4') if file == checkpoints.MARKER else data[:-9] + b"\0" + data[-8:]
    assert damaged != data and len(damaged) == len(data)
    (folder / file).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{file}.* is damaged.*remove .*checkpoint-3"):
        checkpoints.check_whole(folder)
    if file != checkpoints.MARKER:
        assert checkpoints.check_whole(folder, contents=False)["step"] == 3


# A full disk


@pytest.mark.parametrize(
    "words, named",
    [
        (["convert", EMBEDDED_MODEL, "{}/mc"], r"/mc/release/__0_0\.distcp"),
        (["convert", EMBEDDED_MODEL, "{}/mc", "--format", "torch"], r"/mc/release/mp_rank_00/model_optim_rng\.pt"),
        pytest.param(
            ["pretrain", "--sources", "{{a: {{path: {}/a.txt}}}}", "--output_dir", "{}/mc", "--max_steps", "1", "--use_cpu",
             "--sequence_length", "64", "--per_device_train_batch_size", "1", "--save_strategy", "no", "--report_to", "none"],
            "/mc/model could not be written", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_file_that_cannot_grow_is_named(words, named, tmp_path):
    """A limit on the size of files gives the same error in the same place as a full disk."""
    (tmp_path / "a.txt").write_text("a text of some length, " * 500)
    code = (
        "import resource, signal, sys, nemotron_h_cli; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)); sys.exit(nemotron_h_cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *(word.format(tmp_path) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert re.search(rf"nemotron-h {words[0]}: error: .*{named}", done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("line", "wrong", "said"),
    [
        ("kv_channels: 24", "kv_channels: '24'", "kv_channels is '24': allowed is a positive integer"),
        ("kv_channels: 24", "kv_channels: 0", "kv_channels is 0: allowed is a positive integer"),
        ("vocab_size: 229", "vocab_size: 2z9", "vocab_size is '2z9': allowed is a positive integer"),
        ("vocab_size: 229", "vocab_size: 2.5", "vocab_size is 2.5: allowed is a positive integer"),
        (
            "layernorm_epsilon: 1.0e-05",
            "layernorm_epsilon: 1.0e/05",
            "layernorm_epsilon is '1.0e/05': allowed is a positive number",
        ),
    ],
)
def test_an_argument_that_is_no_number_is_named_with_its_checkpoint(line, wrong, said, tmp_path):
    shutil.copytree(FIXTURES["dense_nemo2"].path, tmp_path / "run")
    yaml = tmp_path / "run" / "context" / "model.yaml"
    text = yaml.read_text()
    assert line in text
    yaml.write_text(text.replace(line, wrong))
    with pytest.raises(ValueError, match=said) as error:
        convert(tmp_path / "run", tmp_path / "out")
    assert str(tmp_path / "run") in str(error.value) and not (tmp_path / "out").exists()


def test_chunks_that_do_not_fit_name_the_checkpoint():
    with pytest.raises(
        ValueError, match=r"^some/folder: w: a chunk of \(2,\) at \(3,\) reaches beyond its shape \(4,\)"
    ):
        with naming(Path("some/folder")):
            check_tiling("w", (4,), [((3,), (2,))])
