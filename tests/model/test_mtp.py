"""Multi-token prediction: every depth equals a float64 reference written from the formulas, with and without a cache."""

import pytest
import torch
from reference import reference_mtp
from tiny import prompt, tiny_model

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
