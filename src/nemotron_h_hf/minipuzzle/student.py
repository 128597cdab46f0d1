"""Stage student.json: long distillation of the winner, and the student as an ordinary checkpoint with a card."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..compression.candidates import amount
from ..cost import num_parameters
from ..elastic.live.saving import write_manifest
from ..elastic.resolve import resolve
from ..errors import require
from ..hub import model_card
from ..memory_model import memory
from ..model.modeling_nemotron_h import NemotronHForCausalLM
from ..model.saving import saving
from ..output_folders import is_made, note_made, writing
from ..tokenizer_files import save_tokenizer
from ..whole_files import write_json, write_text
from .distilling import distill, held_out_figures, load_student, remove_checkpoints
from .run import Run

LONG = "distill"  # folder of the long distillation
SPEED_REPEATS, SPEED_TOKENS = 3, 16


def make_student(run: Run, ranked: Mapping[str, Any], tournament: Mapping[str, Any]) -> dict[str, Any]:
    """Train on and write it, or go on."""
    stage, arguments = run.stages["student"], run.arguments
    if (known := stage.result()) is None:
        winner = next(one for one in ranked["ranked"] if one["name"] == tournament["winner"])
        trained, losses = run.work / tournament["model"], None
        if arguments.long_tokens:
            output = run.work / LONG
            losses = distill(run, trained, output, arguments.long_tokens, arguments.seed + arguments.rounds)
            trained = output / "model"
        known = stage.finish(**_facts(run, ranked, winner, trained, losses))
    remove_checkpoints(run.work / LONG)
    _write(run, known)
    return known


def _facts(
    run: Run, ranked: Mapping[str, Any], winner: Mapping[str, Any], trained: Path, losses: Mapping[str, float] | None
) -> dict[str, Any]:
    """What the student is next to the teacher."""
    arguments, deployment = run.arguments, run.arguments.deployment
    child = resolve(run.config, winner["sizes"]).config
    run.forget_image()
    student = load_student(run, trained)
    figures = held_out_figures(run, student)
    teacher = run.load()
    speeds = measure_speed(
        {"teacher": teacher, "student": student.to(teacher.dtype)}, run.text.ranking_rows[0]["input_ids"]
    )
    tokens = arguments.rounds * arguments.short_tokens + arguments.long_tokens
    return {
        "name": winner["name"], "sizes": winner["sizes"], "model": str(trained.relative_to(run.work)),
        "trained_tokens": tokens, "long_distillation": losses, "deployment": asdict(deployment),
        "teacher": {
            "parameters": num_parameters(run.config), "bytes": memory(run.config, deployment).total,
            "pattern": run.config.hybrid_override_pattern, **_of(ranked["parent"]), **speeds["teacher"],
        },
        "student": {
            "parameters": num_parameters(child), "bytes": memory(child, deployment).total,
            "pattern": child.hybrid_override_pattern, **figures, **speeds["student"],
        },
        "before_distillation": _of(winner),
    }  # fmt: skip


def _of(result: Mapping[str, Any]) -> dict[str, float]:
    return {"accuracy": result["accuracy"], "loss": result["loss"]}


@torch.no_grad()
def measure_speed(models: Mapping[str, NemotronHForCausalLM], ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """Tokens per second of a prompt (l) and of greedy decoding behind it, the best of several, models by turns."""
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for _ in range(SPEED_REPEATS):
        for name, model in models.items():
            prompt, best = ids[None].to(model.device), found[name]
            start = time.perf_counter()
            model(prompt, use_cache=False, logits_to_keep=1)
            _wait(model)
            middle = time.perf_counter()
            length = {"min_new_tokens": SPEED_TOKENS, "max_new_tokens": SPEED_TOKENS}
            model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length)
            _wait(model)
            decode = time.perf_counter() - middle - (middle - start)
            best["prefill_tokens_per_second"] = max(
                best.get("prefill_tokens_per_second", 0), ids.numel() / (middle - start)
            )
            if decode > 0:
                best["decode_tokens_per_second"] = max(best.get("decode_tokens_per_second", 0), SPEED_TOKENS / decode)
    return found


def _wait(model: NemotronHForCausalLM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _write(run: Run, facts: Mapping[str, Any]) -> None:
    """The folder of the student: weights in the teacher's dtype, tokenizer, manifest, card; nothing if it is there."""
    arguments = run.arguments
    require(arguments.output is not None, "output", None, "a folder for the student")
    with writing(arguments.output, run.teacher, run.work) as output:
        made_from = {"command": "minipuzzle", "stage": run.stages["student"].digest}
        if is_made(output, made_from):
            return
        with saving(output) as staging:
            dtype = run.config.dtype or torch.bfloat16
            model = NemotronHForCausalLM.from_pretrained(run.work / facts["model"], dtype=dtype)
            model.save_pretrained(staging)
            save_tokenizer(run.text.tokenizer, staging)
            write_manifest(staging)
            write_json(staging / "minipuzzle.json", {**facts, "teacher_name": teacher_name(run)})
            write_text(staging / "README.md", card(run, facts, staging, output.name))
            note_made(staging, made_from)


def teacher_name(run: Run) -> str:
    """Of a folder its last word."""
    given = Path(str(run.arguments.teacher))
    return given.resolve().name if given.is_dir() else str(given)


def card(run: Run, facts: Mapping[str, Any], folder: Path, name: str) -> str:
    """The model card, with what was removed, by which scores, and how much it was trained."""
    arguments, gone = run.arguments, sorted(set(range(run.config.num_hidden_layers)) - set(facts["sizes"]["layers"]))
    teacher, student = facts["teacher"], facts["student"]
    sizes = [
        f"{field} {getattr(run.config, field)} -> {size}" for field, size in facts["sizes"].items() if field != "layers"
    ]
    lines = [
        f"Compressed from {teacher_name(run)} by `nemotron-h minipuzzle` (after arXiv 2504.03624): {teacher['parameters']:,} "
        f"-> {student['parameters']:,} parameters, {amount('bytes', teacher['bytes'])} -> "
        f"{amount('bytes', student['bytes'])} ({arguments.deployment.describe()}).",
        f"Layers removed, counted from 0: {', '.join(map(str, gone)) or 'none'}. Sizes: {'; '.join(sizes) or 'as they were'}.",
        f"Layers were scored by {arguments.layer_score} ({arguments.reduce} over {arguments.layer_samples} rows of "
        f"{arguments.sequence_length} tokens), neurons by their activations {arguments.neuron_score} the activation function "
        f"({arguments.width_samples} rows).",
        f"Then distilled on {facts['trained_tokens']:,} tokens of the teacher's predictions. Held-out loss: teacher "
        f"{teacher['loss']:.4f}, cut {facts['before_distillation']['loss']:.4f}, student {student['loss']:.4f}.",
    ]
    return model_card(folder, name, training="\n".join(lines))
