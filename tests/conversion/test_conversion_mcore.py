"""megatron-core's own loader reads what is written, under parallel sizes of its choice. Runs where it is installed:

pip install --no-deps megatron-core
"""

from __future__ import annotations

import pytest
import torch
from megatron_fixtures import FIXTURES
from megatron_stubs import process_group
from nemotron_h_hf.conversion import convert, read_megatron, write_megatron
from nemotron_h_hf.conversion.layouts import cut_for_rank

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def loading():
    """megatron.core.dist_checkpointing, in a process group of one."""
    module = pytest.importorskip("megatron.core.dist_checkpointing")
    with process_group():
        yield module


@pytest.fixture(scope="module", params=["dense_nemo2", "moe_t1p1e2_torch", "super19_t1p1_torch_dist"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    convert(FIXTURES[request.param].path, folder / "hf")
    write_megatron(folder / "hf", folder / "run", max_shard_size="100KB")
    return folder / "run"


def test_all_tensors_load_and_are_the_same(loading, run):
    from megatron.core.dist_checkpointing.validation import StrictHandling

    folder, ours = run / "release", read_megatron(run)
    known = loading.load_tensors_metadata(str(folder))
    state = {key: whole(loading, key, entry) for key, entry in known.items()}
    strict = StrictHandling.RETURN_ALL
    loaded, missing, unexpected = loading.load(state, str(folder), strict=strict)
    assert not unexpected and all(key.endswith("_extra_state") for key in missing)
    assert loaded["args"].num_layers == ours.args["num_layers"]
    for name in ours:
        if name in known:
            assert torch.equal(loaded[name], ours[name]), name
        elif ".mlp.experts." in name:
            stack, _, expert = name.rpartition(".weight")
            key = stack.replace(".mlp.experts.", ".mlp.experts.experts.") + ".weight"
            assert torch.equal(loaded[key][int(expert)], ours[name]), name
        else:
            parts = [loaded[f"{name}.{part}"] for part in ("z", "x", "B", "C", "dt") if f"{name}.{part}" in known]
            assert torch.equal(torch.cat(parts), ours[name]), name


def whole(loading, key, entry):
    data = torch.zeros(entry.global_shape, dtype=entry.dtype)
    return loading.ShardedTensor.from_rank_offsets(key, data, replica_id=0)


@pytest.mark.parametrize("tp", [2, 4])
def test_any_tensor_parallel_rank_loads_its_share(loading, run, tp):
    """The shares of in_proj's parts, of the columns of out_proj and of the embedding, as Megatron would ask for them."""
    folder, ours = run / "release", read_megatron(run)
    known = loading.load_tensors_metadata(str(folder))
    axes = {"embedding.word_embeddings.weight": 0, "decoder.layers.0.mixer.out_proj.weight": 1}
    axes |= {f"decoder.layers.0.mixer.in_proj.weight.{part}": 0 for part in ("z", "x", "B", "C", "dt")}
    for rank in range(tp):
        state = {}
        for key, axis in axes.items():
            shape = [size // tp if i == axis else size for i, size in enumerate(known[key].global_shape)]
            data = torch.zeros(shape, dtype=known[key].dtype)
            state[key] = loading.ShardedTensor.from_rank_offsets(key, data, (axis, rank, tp), replica_id=0)
        loaded = loading.load(state, str(folder), validate_access_integrity=False)
        for key, axis in axes.items():
            if not key.startswith("decoder.layers.0.mixer.in_proj"):
                expected = cut_for_rank(ours[key], axis, [ours[key].shape[axis]], tp, rank)
                assert torch.equal(loaded[key], expected), key
        sizes = [
            known[f"decoder.layers.0.mixer.in_proj.weight.{part}"].global_shape[0]
            for part in ("z", "x", "B", "C", "dt")
        ]
        local = torch.cat(
            [loaded[f"decoder.layers.0.mixer.in_proj.weight.{part}"] for part in ("z", "x", "B", "C", "dt")]
        )
        assert torch.equal(local, cut_for_rank(ours["decoder.layers.0.mixer.in_proj.weight"], 0, sizes, tp, rank))
