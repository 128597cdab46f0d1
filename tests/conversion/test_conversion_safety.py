"""Hostile and broken checkpoints: nothing of them runs, and what is wrong is named."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from megatron_fixtures import FIXTURES, SHARED, assert_same
from nemotron_h_hf.conversion import convert, read_megatron, torchzip, unpickle
from nemotron_h_hf.conversion.torch_dist import check_tiling

HOSTILE = sorted((SHARED / "hostile").iterdir()) if SHARED.is_dir() else []
OTHERS_MARKER = Path("/var/tmp/pwned_marker")  # what the shared hostile folders would make


class Attack:
    """Unpickled carelessly, it makes the folder it was given."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.makedirs, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "code of a checkpoint was run"


@pytest.fixture
def dist(tmp_path) -> Path:
    """A copy of a distributed checkpoint's weights folder, in NeMo's layout."""
    shutil.copytree(FIXTURES["dense_nemo2"].path, tmp_path / "dist")
    return tmp_path / "dist" / "weights"


@pytest.fixture
def ranks(tmp_path) -> Path:
    """A copy of a run of rank files."""
    return Path(shutil.copytree(FIXTURES["dense_t2p1_torch"].path, tmp_path / "run"))


def test_the_attack_works_on_a_careless_reader(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "careless")))
    assert (tmp_path / "careless").exists()


def test_code_in_common_pt(dist, marker, tmp_path):
    args = argparse.Namespace(tensor_model_parallel_size=1, evil=Attack(marker))
    torch.save({"args": args, "evil": [Attack(marker)]}, dist / "common.pt")
    report = convert(dist.parent, tmp_path / "hf")
    assert "os.makedirs" in report.stand_ins and "WARNING: its pickles name os.makedirs" in "\n".join(report.summary())
    assert_same(tmp_path / "hf", FIXTURES["dense_nemo2"].expected())


def test_code_in_the_metadata(dist, marker, tmp_path):
    value = pickle.loads((dist / ".metadata").read_bytes())
    value.planner_data = Attack(marker)
    (dist / ".metadata").write_bytes(pickle.dumps(value))
    report = convert(dist.parent, tmp_path / "hf")
    assert "os.makedirs" in report.stand_ins
    assert_same(tmp_path / "hf", FIXTURES["dense_nemo2"].expected())


@pytest.mark.parametrize("where", ["beside", "weight"])
def test_code_in_a_rank_file(ranks, marker, tmp_path, where):
    path = ranks / "iter_0000100" / "mp_rank_01" / "model_optim_rng.pt"
    value = _load(path)
    if where == "beside":
        value["evil"] = Attack(marker)
        torch.save(value, path)
        assert "os.makedirs" in convert(ranks, tmp_path / "hf").stand_ins
        assert_same(tmp_path / "hf", FIXTURES["dense_t2p1_torch"].expected())
    else:
        value["model"]["decoder.final_norm.weight"] = Attack(marker)
        torch.save(value, path)
        with pytest.raises(ValueError, match="final_norm.weight is <stand-in for os.makedirs>"):
            read_megatron(ranks)


def test_code_in_extra_state_is_never_unpickled(ranks, marker, tmp_path):
    path = ranks / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"
    value = _load(path)
    bomb = torch.frombuffer(bytearray(pickle.dumps(Attack(marker))), dtype=torch.uint8)
    value["model"]["decoder.layers.0.mixer.in_proj._extra_state"] = bomb
    value["model"]["decoder.layers.1.mlp.linear_fc1._extra_state"] = io.BytesIO(pickle.dumps(Attack(marker)))
    torch.save(value, path)
    convert(ranks, tmp_path / "hf")
    assert_same(tmp_path / "hf", FIXTURES["dense_t2p1_torch"].expected())


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.name)
def test_shared_hostile_folders(path, tmp_path):
    assert not OTHERS_MARKER.exists()
    if path.name.startswith("broken"):
        with pytest.raises(ValueError, match="cut short|no file has"):
            convert(path, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
    else:
        convert(path, tmp_path / "hf")
        assert_same(tmp_path / "hf", FIXTURES["dense_t2p1_torch"].expected())
    assert not OTHERS_MARKER.exists()


def _edit(dist: Path, change) -> None:
    """Change `.metadata`; the fixture is ours, so here its real classes may be loaded."""
    value = pickle.loads((dist / ".metadata").read_bytes())
    change(value)
    (dist / ".metadata").write_bytes(pickle.dumps(value))


def _first(value, name: str):
    return next(index for index in value.storage_data if index.fqn == name)


NORM = "module.decoder.final_norm.weight"


@pytest.mark.parametrize("target", ["../outside.distcp", "/etc/hostname", "link.distcp", "", 7])
def test_chunks_outside_of_the_folder_are_refused(dist, target):
    (dist.parent / "outside.distcp").write_bytes((dist / "__0_0.distcp").read_bytes())
    (dist / "link.distcp").symlink_to(dist.parent / "outside.distcp")
    _edit(dist, lambda value: setattr(value.storage_data[_first(value, NORM)], "relative_path", target))
    with pytest.raises(ValueError, match="outside of the folder|a file name is expected|not the metadata"):
        read_megatron(dist)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda info: setattr(info, "offset", 10**12), "is cut short: module.decoder.final_norm.weight needs bytes"),
        (lambda info: setattr(info, "length", 10**15), "is cut short"),
        (lambda info: setattr(info, "offset", -1), "is cut short"),
        (lambda info: setattr(info, "length", 16), "too few for torch.bfloat16"),
        (lambda info: setattr(info, "relative_path", "__9_9.distcp"), "__9_9.distcp is missing"),
    ],
)
def test_impossible_places_are_refused(dist, change, message):
    _edit(dist, lambda value: change(value.storage_data[_first(value, NORM)]))
    with pytest.raises(ValueError, match=message):
        read_megatron(dist)


def test_chunks_that_share_bytes_are_refused(dist):
    def overlap(value):
        other = value.storage_data[_first(value, "module.decoder.layers.0.mixer.in_proj.layer_norm_weight")]
        place = value.storage_data[_first(value, NORM)]
        place.relative_path, place.offset, place.length = other.relative_path, other.offset, other.length

    _edit(dist, overlap)
    with pytest.raises(ValueError, match="the bytes of .* and .* overlap"):
        read_megatron(dist)


def test_a_chunk_that_holds_something_else_is_refused_when_it_is_read(dist):
    def swap(value):
        one, two = (_first(value, f"module.decoder.layers.0.mixer.{name}") for name in ("A_log", "norm.weight"))
        value.storage_data[one], value.storage_data[two] = value.storage_data[two], value.storage_data[one]

    _edit(dist, swap)
    with pytest.raises(ValueError, match="the metadata says"):
        read_megatron(dist)["decoder.layers.0.mixer.A_log"]


@pytest.mark.parametrize(
    "boxes, message",
    [
        ([((0, 0), (4, 6))], None),
        ([((0, 0), (4, 3)), ((0, 3), (4, 3))], None),
        ([((0, 0), (1, 6)), ((1, 0), (3, 2)), ((1, 2), (3, 4))], None),  # no grid
        ([((0, 0), (4, 5))], "20 elements"),
        ([((0, 0), (5, 6))], "beyond"),
        ([((0, 0), (4, 3)), ((0, 0), (4, 3))], "same place"),
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], "overlap"),
        ([((0, 0), (4, 4)), ((0, 3), (4, 2))], "overlap"),
    ],
)
def test_chunks_must_fill_a_tensor_exactly(boxes, message):
    if message is None:
        check_tiling("t", (4, 6), boxes)
    else:
        with pytest.raises(ValueError, match=message):
            check_tiling("t", (4, 6), boxes)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_files_that_are_cut_short_are_named(ranks, dist_file_of, keep):
    for path in (ranks / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt", *dist_file_of):
        size = path.stat().st_size
        os.truncate(path, int(size * keep) if isinstance(keep, float) else keep)
        with pytest.raises(ValueError, match=path.name):
            source = read_megatron(ranks if "mp_rank" in str(path) else path.parent)
            list(source.values())


@pytest.fixture
def dist_file_of(tmp_path) -> list[Path]:
    """Files of three separate copies of a distributed checkpoint."""
    found = []
    for name in (".metadata", "__0_1.distcp", "common.pt"):
        shutil.copytree(FIXTURES["dense_nemo2"].path, tmp_path / name)
        found.append(tmp_path / name / "weights" / name)
    return found


def test_missing_files_are_named(ranks, dist):
    (dist / "__0_1.distcp").unlink()
    with pytest.raises(ValueError, match="__0_1.distcp is missing"):
        read_megatron(dist)
    shutil.rmtree(ranks / "iter_0000100" / "mp_rank_01")
    with pytest.raises(ValueError, match="no file has tensor rank 1 .*mp_rank_01"):
        read_megatron(ranks)


def test_copies_that_differ_are_refused(ranks, tmp_path):
    path = ranks / "iter_0000100" / "mp_rank_01" / "model_optim_rng.pt"
    value = _load(path)
    value["model"]["decoder.final_norm.weight"] = value["model"]["decoder.final_norm.weight"] + 1
    torch.save(value, path)
    with pytest.raises(ValueError, match="final_norm.weight differs between its copies: .*mp_rank_01"):
        convert(ranks, tmp_path / "hf")
    assert not (tmp_path / "hf" / "config.json").exists()


def test_compressed_and_foreign_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x00" * 10**6)
    with pytest.raises(ValueError, match="bomb.pt.*compressed"):
        torchzip.read(tmp_path / "bomb.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(1))
    with pytest.raises(ValueError, match="old.pt is not a torch.save zip"):
        torchzip.read(tmp_path / "old.pt")


@pytest.mark.parametrize(
    "junk", [b"", b"\x80", b"\x80\x04.", b"(" * 1000, b"cos\nsystem\n(S'x'\ntR", b"\x80\x04\x95" + b"\xff" * 9]
)
def test_junk_is_a_named_error(junk):
    with pytest.raises(ValueError, match="some file is not a readable pickle"):
        unpickle.load(io.BytesIO(junk), "some file")


def test_stand_ins_swallow_everything(marker):
    value = {"a": Attack(marker), "list": [Attack(marker)] * 2, "path": Path("/x"), "size": torch.Size([2])}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found, names = unpickle.load(io.BytesIO(pickle.dumps(value, protocol)), "test")
        assert isinstance(found["a"], unpickle.StandIn) and found["size"] == (2,)
        assert "os.makedirs" in names


def test_yaml_tags_do_nothing(dist, marker):
    path = dist.parent / "context" / "model.yaml"
    path.write_text(path.read_text() + f'\nevil: !!python/object/apply:os.makedirs ["{marker}"]\n')
    read_megatron(dist)


def test_tracker_may_not_leave_the_folder(ranks):
    for text in ("../../etc", "/etc", "", "1" * 50):
        (ranks / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(ValueError, match="allowed is a number or 'release'"):
            read_megatron(ranks)


def test_a_rank_file_may_not_be_a_link_out(ranks, tmp_path):
    path = ranks / "iter_0000100" / "mp_rank_01" / "model_optim_rng.pt"
    path.rename(tmp_path / "elsewhere.pt")
    path.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(ValueError, match="leads outside"):
        read_megatron(ranks)


def _load(path: Path) -> dict:
    """The fixture's own object, for changing it: weights and arguments, by the package's reader."""
    found = torchzip.read(path).value
    args = {key: value for key, value in vars(found["args"]).items() if not isinstance(value, unpickle.StandIn)}
    model = {}
    for name, extent in found["model"].items():
        if isinstance(extent, unpickle.Extent):
            model[name] = torch.empty(extent.shape, dtype=extent.dtype)
            data = path.read_bytes()[extent.offset : extent.offset + extent.num_bytes]
            if data:
                model[name] = torch.frombuffer(bytearray(data), dtype=extent.dtype).reshape(extent.shape)
    return {"args": argparse.Namespace(**json_ready(args)), "checkpoint_version": 3.0, "model": model}


def json_ready(args: dict) -> dict:
    return {key: value for key, value in args.items() if _is_plain(value)}


def _is_plain(value) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", ["super19_t1p1_torch_dist", "dense_t2p1_torch"])
def test_a_snapshot_in_the_cache_of_the_hub_is_read(name, tmp_path):
    """All of its files are links to `blobs` of its repository; links to those of another, or elsewhere, lead out."""
    run, repository = FIXTURES[name].path, tmp_path / "models--owner--run"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in run.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / str(number), snapshot / file.relative_to(run)
        shutil.copy(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    convert(snapshot, tmp_path / "hf")
    assert_same(tmp_path / "hf", FIXTURES[name].expected())
    other = tmp_path / "models--owner--other" / "blobs"
    (repository / "blobs").rename(tmp_path / "moved")
    other.parent.mkdir()
    (tmp_path / "moved").rename(other)
    for link in (path for path in snapshot.rglob("*") if path.is_symlink()):
        blob = other / link.readlink().name
        link.unlink()
        link.symlink_to(blob)
    with pytest.raises(ValueError, match="outside"):
        read_megatron(snapshot)
