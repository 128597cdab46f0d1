"""report.html, one file that needs no network, and the same as Markdown: what the stages found so far."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..compression.candidates import amount
from ..inputs import read_json
from ..whole_files import write_text
from .arguments import STAGES

TOP = 15  # candidates in tables
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}td,th{padding:.2rem .8rem;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"""
Found = dict[str, dict[str, Any]]
"""Stage -> its file."""


class Section(NamedTuple):
    """A heading with sentences, a table (its first row is the head) and the name of a picture."""

    title: str
    text: list[str]
    table: list[list[str]] = []
    picture: str | None = None


def write_report(work: Path) -> None:
    """Both files, of all stages that are done."""
    found = {name: read_json(path) for name in STAGES if (path := work / f"{name}.json").is_file()}
    sections = sections_of(found)
    write_text(work / "report.html", as_html(sections, pictures_of(found)))
    write_text(work / "report.md", as_markdown(sections))


def pictures_of(found: Found) -> dict[str, str]:
    """Name -> SVG; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    from .report_plots import draw

    return draw(found)


def sections_of(found: Found) -> list[Section]:
    """What there is to tell."""
    tellers = {"scores": [_scores], "candidates": [_candidates], "ranked": [_ranked, _controls],
               "benchmarked": [_benchmarked], "tournament": [_tournament], "student": [_student]}  # fmt: skip
    return [tell(found[name]) for name in found for tell in tellers[name]]


def _scores(scores: Mapping[str, Any]) -> Section:
    measure, values = next(iter(scores["importance"].items()))
    by_kind: dict[str, list[float]] = {}
    for layer, rank in values["rank"].items():
        by_kind.setdefault(KINDS[scores["pattern"][int(layer)]], []).append(rank)
    ranks = [[kind, str(len(found)), f"{sum(found) / len(found):.1f}", f"{min(found):.1f}", f"{max(found):.1f}"]
             for kind, found in by_kind.items()]  # fmt: skip
    least = sorted(values["rank"], key=values["rank"].get)[:10]
    told = ", ".join(f"{layer} ({scores['pattern'][int(layer)]})" for layer in least)
    text = [
        f"Layers by {measure}; 0 is the least important, ranks are means over samples. The least important ones: {told}."
    ]
    return Section("Layer importance", text, [["kind", "layers", "mean rank", "least", "most"], *ranks], "importance")


KINDS = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "MoE"}


def _candidates(found: Mapping[str, Any]) -> Section:
    limits = ", ".join(f"{name} at most {amount(name, most)}" for name, most in found["limits"].items())
    teacher = ", ".join(f"{name} {amount(name, value)}" for name, value in found["teacher"].items())
    text = [
        f"Limits: {limits}. The teacher: {teacher}.",
        f"{found['num_models']:,} models in the grid, {found['num_fitting']:,} fit, {len(found['candidates']):,} are candidates.",
    ]
    return Section("Candidates", text)


def _ranked(found: Mapping[str, Any]) -> Section:
    measured, parent = found["measured"], found["parent"]
    head = ["candidate", *found["ranked"][0]["costs"], "accuracy", "agreement", "loss"]
    rows = [
        [one["name"], *(amount(name, cost) for name, cost in one["costs"].items()), f"{one['accuracy']:.4f}",
         f"{one['agreement']:.4f}", f"{one['loss']:.4f}"]
        for one in found["ranked"][:TOP]
    ]  # fmt: skip
    extra = measured["extra_memory_bytes"]
    text = [
        f"{len(found['ranked'])} candidates on {found['num_tokens']:,} held-out tokens; the teacher: accuracy "
        f"{parent['accuracy']:.4f}, loss {parent['loss']:.4f}. Agreement is with the teacher's most likely token.",
        f"{measured['seconds_per_candidate']:.2f} s for a candidate as a budget of one memory image; {measured['layers_run']:,} "
        f"layers ran, {measured['layers_without_sharing']:,} without shared beginnings."
        + ("" if extra is None else f" Memory beyond the teacher's, activations included: {extra / 2**20:.0f} MiB."),
    ]
    return Section("Ranking, before distillation", text, [head, *rows], "candidates")


def _controls(found: Mapping[str, Any]) -> Section:
    best = next(one for one in found["ranked"] if one["name"] != "mixed")  # whose counts the controls keep
    rows = [["importance", *_three(best)], *([one["rule"], *_three(one)] for one in found["controls"])]
    text = ["The best candidate next to choices that are made otherwise, within the same limits, before distillation."]
    return Section("Controls", text, [["choice", "accuracy", "agreement", "loss"], *rows], "quality")


def _three(one: Mapping[str, Any]) -> list[str]:
    if "loss" not in one:
        return ["none fits", "", ""]
    return [f"{one['accuracy']:.4f}", f"{one['agreement']:.4f}", f"{one['loss']:.4f}"]


def _benchmarked(found: Mapping[str, Any]) -> Section:
    names = list((found["teacher"] or {}).keys())
    text = [f"Finalists: {', '.join(found['finalists'])}; layers and sizes in which they differ from the first: "
            f"{', '.join(map(str, found['distances'].values()))}."]  # fmt: skip
    if not names:
        return Section("Finalists", [*text, "No tasks were asked for: the ranking decided."])
    rows = [["the teacher", *(f"{found['teacher'][name]:.4f}" for name in names)]]
    rows += [[one, *(f"{found['scores'][one][name]:.4f}" for name in names)] for one in found["order"][:TOP]]
    return Section("Benchmarks", text, [["candidate", *names], *rows])


def _tournament(found: Mapping[str, Any]) -> Section:
    rows = [
        [
            str(number + 1),
            name,
            f"{one['before']:.4f}",
            f"{one['after']:.4f}",
            f"{one['loss']:.4f}",
            f"{one['accuracy']:.4f}",
        ]
        for number, entries in enumerate(found["rounds"])
        for name, one in sorted(entries.items(), key=lambda pair: pair[1]["after"])
    ]
    text = [
        f"{found['tokens']:,} tokens of distillation for each, in each round; the winner is {found['winner']}. KL is the "
        "held-out divergence from the teacher; loss and accuracy are those of the next token."
    ]
    return Section(
        "Tournament", text, [["round", "model", "KL before", "KL after", "loss", "accuracy"], *rows], "tournament"
    )


def _student(found: Mapping[str, Any]) -> Section:
    teacher, student = found["teacher"], found["student"]
    rows = [[name, _number(name, teacher[name]), _number(name, student[name])] for name in teacher
            if name in student and name != "pattern"]  # fmt: skip
    text = [
        f"{found['name']}, distilled on {found['trained_tokens']:,} tokens. Held-out loss of the cut before: "
        f"{found['before_distillation']['loss']:.4f}.",
        f"Teacher: {teacher['pattern']}",
        f"Student: {student['pattern']}",
    ]
    return Section("The student", text, [["", "teacher", "student"], *rows])


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name in ("loss", "accuracy") else amount(name, value)


def as_html(sections: Sequence[Section], pictures: Mapping[str, str]) -> str:
    """One page; pictures are SVG inside of it."""
    parts = []
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
        parts.append(pictures.get(section.picture or "", ""))
        if section.table:
            parts.append(
                f"<table>{''.join(_row(row, 'td' if number else 'th') for number, row in enumerate(section.table))}</table>"
            )
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>MiniPuzzle</title><style>{STYLE}</style>'
        f"<h1>MiniPuzzle</h1>\n{body}\n</html>\n"
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def as_markdown(sections: Sequence[Section]) -> str:
    """The same without pictures."""
    lines = ["# MiniPuzzle"]
    for section in sections:
        lines += ["", f"## {section.title}", *(line for text in section.text for line in ("", text))]
        if section.table:
            head, *rows = section.table
            lines += ["", _line(head), _line(["---"] * len(head)), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |"
