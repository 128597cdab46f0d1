"""The distillation loss against the formula on whole logits, in float64: values, gradients, masks, kept top-k, memory."""

import pytest
import torch
from test_ssd import LargestTensor
from torch import nn

from nemotron_h_hf.model import loss as loss_module
from nemotron_h_hf.training.losses import LiveTeacher, TopK, distillation_loss, top_k

V, HIDDEN, SHAPE = 53, 12, (2, 9)


def sides(dtype=torch.float64, vocab=V):
    """Hidden states and heads of a student and a teacher of another width, and labels with holes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    heads = []
    for width in (HIDDEN, 2 * HIDDEN):
        head = nn.Linear(width, vocab, bias=False, dtype=dtype)
        head.weight = nn.Parameter(normal(vocab, width) * 0.8)
        heads.append(head)
    student, teacher = normal(*SHAPE, HIDDEN).requires_grad_(), normal(*SHAPE, 2 * HIDDEN).requires_grad_()
    labels = torch.randint(0, vocab, SHAPE, generator=generator)
    labels[0, 2:5], labels[1, 0] = -100, -100
    return student, heads[0], LiveTeacher(teacher, heads[1]), labels


def naive(student_logits, teacher_logits, labels, temperature, k=None):
    """Sums over the positions with a label, written position by position from the definition."""
    kl = cross_entropy = torch.zeros((), dtype=torch.float64)
    count = 0
    for row in range(SHAPE[0]):
        for t in range(SHAPE[1] - 1):
            if labels[row, t + 1] == -100:
                continue
            p = torch.softmax(teacher_logits[row, t] / temperature, 0)
            q = torch.softmax(student_logits[row, t] / temperature, 0)
            if k is not None:
                kept = teacher_logits[row, t].argsort(descending=True)[:k]
                p = torch.cat([p[kept], 1 - p[kept].sum()[None]])
                q = torch.cat([q[kept], 1 - q[kept].sum()[None]])
            kl = kl + temperature**2 * (p * (p.log() - q.log())).sum()
            cross_entropy = cross_entropy - torch.log_softmax(student_logits[row, t], 0)[labels[row, t + 1]]
            count += 1
    return kl, cross_entropy, count


@pytest.mark.parametrize("kept", [None, 5])
@pytest.mark.parametrize("temperature, weight", [(1.0, 0.0), (2.5, 0.0), (0.7, 0.3), (2.0, 1.0)])
@pytest.mark.parametrize("positions_per_chunk", [1, 5, 10**6])
@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(23)])
def test_value_and_gradients_are_those_of_whole_logits(
    kept, temperature, weight, positions_per_chunk, num_items, monkeypatch
):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", positions_per_chunk * V)
    student, head, live, labels = sides()
    kl, cross_entropy, count = naive(head(student), live.lm_head(live.hidden_states), labels, temperature, kept)
    divisor = count if num_items is None else num_items
    expected = ((1 - weight) * kl + weight * cross_entropy) / divisor
    wanted = torch.autograd.grad(expected, [student, head.weight])

    teacher = live if kept is None else top_k(*live, V, kept, temperature)
    out = distillation_loss(student, head, labels, V, teacher, temperature, weight, num_items)
    tolerance = {"rtol": 0, "atol": 1e-12 if kept is None else 2e-6}  # kept logits are stored in fp32
    torch.testing.assert_close(out.loss, expected, **tolerance)
    torch.testing.assert_close(out.kl, kl.detach() / divisor, **tolerance)
    torch.testing.assert_close(out.cross_entropy, cross_entropy.detach() / divisor, **tolerance)
    found = torch.autograd.grad(out.loss, [student, head.weight], retain_graph=True)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    out.loss.backward()
    assert live.hidden_states.grad is None and live.lm_head.weight.grad is None
    with torch.no_grad():
        again = distillation_loss(student, head, labels, V, teacher, temperature, weight, num_items).loss
    torch.testing.assert_close(again, expected, **tolerance)


def test_kept_logits_bound_the_full_divergence_from_below():
    student, head, live, labels = sides()
    full = distillation_loss(student, head, labels, V, live).kl
    partial = [distillation_loss(student, head, labels, V, top_k(*live, V, k)).kl for k in (1, 5, 20, V - 1)]
    assert all(low < high for low, high in zip([0.0, *partial], partial, strict=False))
    torch.testing.assert_close(partial[-1], full, rtol=0, atol=1e-6)
    alike = distillation_loss(live.hidden_states, live.lm_head, labels, V, top_k(*live, V, 5)).kl
    assert abs(alike) < 1e-6


def test_the_rest_stays_exact_when_nearly_no_mass_is_left():
    """r = 1e-9 and s = 1e-13 are lost in 1 - sum of fp32 probabilities; their term is finite and pulls at the student."""
    z_teacher, z_student = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    z_teacher[..., 0], z_student[..., 0] = 21.8, 31.0
    labels, head = torch.zeros(1, 2, dtype=torch.long), nn.Identity()
    student = z_student.requires_grad_()
    out = distillation_loss(student, head, labels, 4, top_k(z_teacher, head, 4, 1), num_items_in_batch=1)
    wide = distillation_loss(z_student.double(), head, labels, 4, LiveTeacher(z_teacher.double(), head), 1.0, 0.0, 1)
    torch.testing.assert_close(out.kl.double(), wide.kl, rtol=1e-2, atol=1e-9)
    assert torch.isfinite(torch.autograd.grad(out.loss, student)[0]).all()


@pytest.mark.parametrize("kept", [None, 8])
@pytest.mark.parametrize("training", [False, True])
def test_logits_of_the_whole_batch_never_exist(kept, training, monkeypatch):
    vocab, length = 2048, 100
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 32 * vocab)
    _, head, live, _ = sides(torch.float32, vocab)
    student = torch.randn(2, length, HIDDEN, requires_grad=True)
    live = live._replace(hidden_states=torch.randn(2, length, 2 * HIDDEN))
    with torch.set_grad_enabled(training), LargestTensor() as largest:
        teacher = live if kept is None else top_k(*live, vocab, kept)
        out = distillation_loss(student, head, torch.ones(2, length, dtype=torch.long), vocab, teacher)
        if training:
            out.loss.backward()
    assert largest.numel == 32 * vocab  # one chunk; the whole is 200 * vocab


def test_half_precision_is_summed_in_float32():
    student, head, live, labels = sides(torch.bfloat16)
    out = distillation_loss(student, head, labels, V, live)
    kl, _, count = naive(head(student).double(), live.lm_head(live.hidden_states).double(), labels, 1.0)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.kl.double(), kl.detach() / count, rtol=1e-5, atol=0)


def test_no_label_at_all_is_no_loss():
    student, head, live, labels = sides()
    out = distillation_loss(student, head, torch.full_like(labels, -100), V, live, num_items_in_batch=4)
    assert out.loss == 0
    assert torch.autograd.grad(out.loss, student)[0].abs().max() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"cross_entropy_weight": 1.5}, "cross_entropy_weight=1.5"),
        ({"teacher": "short"}, r"\(2, 8\)"),
        ({"teacher": "many"}, "k=53"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    student, head, live, labels = sides()
    kept = top_k(*live, V, 3)
    teachers = {
        "short": LiveTeacher(live.hidden_states[:, 1:], live.lm_head),
        "many": TopK(torch.zeros(*SHAPE, V), torch.zeros(*SHAPE, V), kept.log_rest),
    }
    if isinstance(change.get("teacher"), str):
        change = {"teacher": teachers[change["teacher"]]}
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{"hidden_states": student, "lm_head": head, "labels": labels, "vocab_size": V,
                             "teacher": live, **change})  # fmt: skip
    with pytest.raises(ValueError, match="k=53"):
        top_k(*live, V, V)
