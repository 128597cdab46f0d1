"""The loss-gap harness of docs/results/fp8: emulated BF16 against real, the figures of the plot, both precisions end to end."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nemotron_h_hf.data.stdlib_text import Document
from nemotron_h_hf.training.fp8 import converted_modules

PATH = Path(__file__).parents[2] / "experiments" / "fp8" / "gap.py"


@pytest.fixture(scope="module")
def gap():
    spec = importlib.util.spec_from_file_location("fp8_gap", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rounded_linear_is_bfloat16s(gap):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(48, 32, bias=False)
    x, grad = torch.randn(4, 7, 48, generator=generator), torch.randn(4, 7, 32, generator=generator)
    rounded = x.clone().requires_grad_()
    y = gap.rounded_linear(linear, rounded)
    y.backward(grad)
    true = x.bfloat16().requires_grad_()
    weight = linear.weight.detach().bfloat16().requires_grad_()
    expected = nn.functional.linear(true, weight)
    expected.backward(grad.bfloat16())
    pairs = (y, expected), (rounded.grad, true.grad), (linear.weight.grad, weight.grad)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32 and torch.equal(ours, ours.bfloat16().float())
        torch.testing.assert_close(ours, theirs.float(), rtol=2**-7, atol=1e-2)
        assert (ours == theirs).float().mean() > 0.97  # others differ by one step, where the sum's order decides


def write_logs(folder: Path, name: str, losses: list[float]) -> None:
    rows = [{"tokens": 20480 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_figures_of_the_plot(gap, tmp_path):
    for seed, relative in enumerate((0.001, 0.002, 0.003)):
        reference = [8 - 0.1 * step for step in range(50)]
        write_logs(tmp_path, f"bf16-{seed}", reference)
        write_logs(tmp_path, f"fp8-{seed}", [loss * (1 + relative) for loss in reference])
    write_logs(tmp_path, "fp8-9", [1.0] * 50)  # no reference: left out
    assert gap.main(["plot", "--logs", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "gap.json").read_text())["fp8"]
    assert summary["seeds"] == [0, 1, 2] and summary["tokens"] == 50 * 20480
    assert summary["gap_percent"] == 0.2
    assert summary["half_width_of_95_percent_interval"] == pytest.approx(4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert list(summary["gap_percent_at_tokens"]) == [str(20480 * line) for line in (10, 20, 30, 40, 50)]
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_pairs(gap, tmp_path):
    write_logs(tmp_path, "bf16-0", [1.0])
    with pytest.raises(ValueError, match="no bf16-SEED.jsonl with"):
        gap.main(["plot", "--logs", str(tmp_path)])


def test_smoothing_averages_up_to_the_last_lines(gap):
    assert gap.smoothed([1, 2, 3, 7], lines=2) == [1, 1.5, 2.5, 5]


@pytest.mark.slow
def test_two_steps_in_each_precision(gap, tmp_path, monkeypatch):
    document = Document(name="a.py", text="def f(x):\n    return x + 1\n" * 600)
    monkeypatch.setattr(gap, "read_documents", list)
    monkeypatch.setattr(gap, "split_documents", lambda _: ([document], []))
    monkeypatch.setattr(gap, "prepare", lambda threads: None)  # would stay this process's setting
    logs, losses = tmp_path / "logs", {}
    for precision in ("bf16", "fp8"):
        command = ["train", "--precision", precision, "--seeds", "3", "--max-tokens", "4096"]
        gap.main([*command, "--runs", str(tmp_path / "runs"), "--logs", str(logs)])
        [row] = [json.loads(line) for line in (logs / f"{precision}-3.jsonl").read_text().splitlines()]
        losses[precision] = row["loss"]
        assert row["tokens"] == 4096
        assert (tmp_path / "runs" / f"{precision}-3" / "checkpoint" / "model.safetensors").is_file()
    assert losses["bf16"] != losses["fp8"] and losses["fp8"] == pytest.approx(losses["bf16"], rel=5e-3)
    gap.main([*command, "--runs", str(tmp_path / "nowhere"), "--logs", str(logs)])
    assert not (tmp_path / "nowhere").exists()  # finished: left alone


def test_which_modules_each_precision_converts(gap):
    counts = {p: len(converted_modules(gap.make_model(gap.TrainTinyArguments(), p))) for p in gap.PRECISIONS}
    assert counts == {"bf16": 0, "fp8": 8, "fp8_all": 16, "fp32": 0}
