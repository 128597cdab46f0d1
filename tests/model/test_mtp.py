"""Multi-token prediction: every depth equals a float64 reference written from the formulas, with and without a cache."""

import json

import pytest
import torch
from puzzle_tiny import MTP_BLOCKS, RELEASED
from reference import reference_mtp
from tiny import prompt, spread, tiny_model

from nemotron_h_hf import NemotronHForCausalLM, NemotronHPuzzleConfig, NemotronHPuzzleForCausalLM
from nemotron_h_hf.model.mtp import add_mtp
from nemotron_h_hf.model.padding import read_rows

pytestmark = pytest.mark.usefixtures("no_grad")
ONE, TWO = {"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 2}
CASES = {
    "one depth, attention and MLP": ("dense", {**ONE, "mtp_hybrid_override_pattern": "*-"}, 1),
    "one depth repeated": ("dense", {**ONE, "mtp_hybrid_override_pattern": "*-"}, 3),
    "two depths, Mamba too": ("dense", {**TWO, "mtp_hybrid_override_pattern": "M*-"}, 2),
    "one layer is first and last": ("dense", {**ONE, "mtp_hybrid_override_pattern": "*"}, 1),
    "no attention": ("attention_free", {**ONE, "mtp_hybrid_override_pattern": "M-"}, 2),
    "experts": ("moe", {**ONE, "mtp_hybrid_override_pattern": "*E"}, 2),
    "latent experts, repeated": ("latent", {**ONE, "mtp_hybrid_override_pattern": "*E"}, 2),
    "two depths of latent experts": ("latent", {**TWO, "mtp_hybrid_override_pattern": "*E"}, 2),
    "tied, residual in fp32": ("dense", {**ONE, "mtp_hybrid_override_pattern": "*-", "tie_word_embeddings": True,
                                         "residual_in_fp32": True}, 2),
}  # fmt: skip


def chain(model, ids, num_depths):
    """Logits of each depth for one row, all columns at once."""
    hidden, logits = model.model(ids).last_hidden_state, []
    for depth in range(num_depths):
        length = ids.shape[1] - depth - 1
        embeds = model.model.embeddings(ids[:, depth + 1 :])
        hidden = model.mtp(hidden[:, :length], embeds, read_rows(None, embeds), depth)
        logits.append(model.lm_head(hidden))
    return logits


@pytest.mark.parametrize("case", CASES)
def test_every_depth_is_the_reference(case):
    shape, fields, num_depths = CASES[case]
    model = tiny_model(shape, **fields).double()
    ids = prompt(1, 13)
    atol = 1e-4 if model.config.residual_in_fp32 else 1e-9
    expected = reference_mtp(model.state_dict(), model.config, ids[0], num_depths)
    for ours, theirs in zip(chain(model, ids, num_depths), expected, strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=0, atol=atol)


def test_a_puzzle_has_its_own_sizes_in_the_head():
    blocks = [{**MTP_BLOCKS[0], "sliding_window": 4}, MTP_BLOCKS[1]]
    config = NemotronHPuzzleConfig(**{**RELEASED, "mtp_block_configs": blocks, "dtype": None})
    model, ids = spread(NemotronHPuzzleForCausalLM(config)).eval().double(), prompt(1, 13)
    for ours, theirs in zip(chain(model, ids, 2), reference_mtp(model.state_dict(), config, ids[0], 2), strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", ["*-", "M-"])
def test_a_cache_of_a_depth_continues(pattern):
    """In two parts with padding on the left, the second in single tokens: as all columns at once."""
    model = tiny_model("dense", **ONE, mtp_hybrid_override_pattern=pattern)
    ids, mask = prompt(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    hidden, embeds = model.model(ids, attention_mask=mask).last_hidden_state[:, :-1], model.model.embeddings(ids[:, 1:])
    whole = model.mtp(hidden, embeds, read_rows(mask[:, :-1], embeds))
    cache, parts = model.mtp.new_cache(), []
    for start, end in ((0, 7), (7, 10), (10, 11)):
        part = embeds[:, start:end]
        parts.append(model.mtp(hidden[:, start:end], part, read_rows(mask[:, :end], part), cache=cache))
    real = mask[:, :-1].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=0, atol=1e-5)


def test_documents_of_a_row_do_not_see_each_other():
    model = tiny_model("dense", **ONE, mtp_hybrid_override_pattern="M*-")
    ids = prompt(1, 14)
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    hidden, embeds = model.model(ids, position_ids=positions).last_hidden_state, model.model.embeddings(ids.roll(-1, 1))
    packed = model.mtp(hidden, embeds, read_rows(None, embeds, positions))
    alone = chain(model, ids[:, 6:], 1)[0]
    torch.testing.assert_close(model.lm_head(packed[:, 6:-1]), alone, rtol=0, atol=1e-5)


def naive_losses(model, ids, labels, num_depths):
    """Of one document: for each depth, the cross-entropies of the labels that are there, from the float64 reference."""
    losses = []
    for depth, logits in enumerate(reference_mtp(model.state_dict(), model.config, ids, num_depths), start=1):
        targets = labels[depth + 1 :]
        chosen = -logits[: len(targets)].log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        losses.append(chosen[targets != -100])
    return losses


@pytest.mark.parametrize("case, num_steps", [("one depth repeated", 3), ("two depths of latent experts", None)])
def test_the_loss_of_packed_documents(case, num_steps):
    """Each document's own predictions and nothing across; labels of -100 do not count."""
    shape, fields, num_depths = CASES[case]
    model = tiny_model(shape, **fields).double()
    ids, sizes = prompt(1, 17), [7, 2, 8]
    labels = ids.clone()
    labels[0, [3, 12]] = -100
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    settings = {"labels": labels, "position_ids": positions, "use_cache": False}
    plain = model(ids, **settings)
    output = model(ids, **settings, mtp_loss_weight=0.3, mtp_steps=num_steps)
    pairs = zip(ids[0].split(sizes), labels[0].split(sizes))
    by_document = [naive_losses(model, text, own, num_depths) for text, own in pairs if len(text) > num_depths]
    expected = torch.stack([torch.cat(losses).mean() for losses in zip(*by_document)]).mean()
    torch.testing.assert_close(output.mtp_loss.double(), expected, rtol=0, atol=1e-6)
    added = (
        sum(torch.cat(losses).sum() for losses in zip(*by_document)) / num_depths / int((labels[:, 1:] != -100).sum())
    )
    torch.testing.assert_close(output.loss.double(), plain.loss + 0.3 * added, rtol=0, atol=1e-6)
    assert plain.mtp_loss is None


def test_accumulated_losses_count_once():
    """Two halves of a batch, each with the number of items of both, add up to the mean of their losses."""
    model, ids = tiny_model("dense", **ONE, mtp_hybrid_override_pattern="*-"), prompt(2, 9)
    both = [model(row[None], labels=row[None], num_items_in_batch=16, mtp_loss_weight=1.0) for row in ids]
    whole = model(ids, labels=ids, mtp_loss_weight=1.0)
    torch.testing.assert_close(sum(part.loss for part in both), whole.loss, rtol=0, atol=1e-5)


def test_fresh_heads_change_nothing_else(tmp_path):
    model, ids = tiny_model("moe"), prompt()
    before = model(ids).logits
    add_mtp(model, 2)
    assert model.config.mtp_hybrid_override_pattern == "*E" and torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    back = NemotronHForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    assert {"mtp.layers.0.eh_proj.weight", "mtp.layers.3.final_layernorm.weight"} <= set(back.state_dict())
    assert all(parameter.std() > 0 for name, parameter in back.mtp.named_parameters() if "norm" not in name)
    with pytest.raises(ValueError, match="mtp_depth=1: allowed is None, or 2"):
        add_mtp(model, 1)
    with pytest.raises(ValueError, match="mtp_hybrid_override_pattern='X'"):
        add_mtp(tiny_model("dense"), 1, "X")


@pytest.mark.parametrize("given, words", [
    ({"inputs_embeds": torch.zeros(1, 4, 48), "labels": torch.zeros(1, 4, dtype=torch.long)}, "allowed with input_ids and labels"),
    ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "shift_labels": torch.zeros(1, 4, dtype=torch.long)}, "shift_labels alone"),
])  # fmt: skip
def test_a_loss_needs_tokens_and_labels(given, words):
    with pytest.raises(ValueError, match=words):
        tiny_model("dense", **ONE, mtp_hybrid_override_pattern="*-")(**given, mtp_loss_weight=1.0)


def test_files_that_contradict_the_configuration(tmp_path):
    """Fewer depths than the configuration says, or more: nothing is half loaded."""
    model = tiny_model("dense", **TWO, mtp_hybrid_override_pattern="*-")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for depth, words in (
        (3, r"lacks \d+ tensors.*mtp\.layers\.4"),
        (1, r"no place for.*mtp\.layers\.2"),
        (0, "no place for.*mtp"),
    ):
        path.write_text(json.dumps(fields | {"num_nextn_predict_layers": depth}))
        with pytest.raises(ValueError, match=words):
            NemotronHForCausalLM.from_pretrained(tmp_path)
