"""Load for minutes: 1, 8 and 32 clients, mixed budgets, long and short prompts, dropped answers; through the official client.

    python experiments/serving/load.py --seconds 60

Four ways to serve, all started, one at a time under load; one thread for each process, fp32:

    ours, three budgets, one process    the embedded model and its budgets; clients ask for all of them
    ours, three processes               `nemotron-h serve --budget`, one for each of the three; the same requests
    ours, whole model                   `nemotron-h serve`, clients ask for the whole model alone
    transformers serve                  its native class, the whole model

For each number of clients the ways take turns for --rounds rounds, so that all of them see the same machine. A client asks
again as soon as it has its answer. Half of the requests are greedy, from a list whose answers each server first gives to one
client alone: under load they must be the same, and a dropped one must be the beginning of it. Where rounding can choose
(the two likeliest tokens closer than 0.001 in log-probability somewhere in the answer), a difference is counted as a tie.

Tokens are counted as they reach the clients; processor seconds are the servers'. Memory is the resident set, before and over
the time under load. Writes load.json (after each step), load.md and load.png into --output. Needs the `serve` and `dev`
extras. Linux.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import openai
from matplotlib.figure import Figure

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.environment import machine, versions

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "serving"
BUDGETS = {  # of an embedded model without budgets of its own: their speed is that of trained ones, their text is not
    "whole": {},
    "middle": {"hidden_size": 160, "intermediate_size": 448, "mamba_num_heads": 4},
    "small": {"hidden_size": 128, "intermediate_size": 320, "mamba_num_heads": 4},
}
TEXT = Path(argparse.__file__).read_text()
LENGTHS = (40, 200, 1000, 3000)  # letters of prompts
ASKED = [(TEXT[777 * i :][: LENGTHS[i % 4]], (16, 32, 64)[i % 3]) for i in range(12)]
"""Prompt and most tokens of the greedy requests."""
CACHES = "64MiB"
TIE = 1e-3  # nats


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each way and number of clients (60)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="turns that these seconds are split into (3)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (docs/results/serving)")
    options = parser.parse_args()
    report = {
        "command": f"python experiments/serving/load.py --seconds {options.seconds:g} --rounds {options.rounds}",
        "machine": machine(), "versions": versions(), "load_average_before": os.getloadavg(), "ways": {},
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        parent, budgets = parent_of_the_box(Path(folder) / "parent")
        commands = {
            "ours, three budgets, one process": ([serve(parent)], [(0, f"parent:{name}") for name in budgets]),
            "ours, three processes": (
                [serve(parent, "--budget", name) for name in budgets], [(i, "parent") for i in range(len(budgets))],
            ),
            "ours, whole model": ([serve(parent)], [(0, "parent")]),
            "transformers serve": ([transformers_serve(parent)], [(0, parent)]),
        }  # fmt: skip
        with servers(commands) as ways:
            asyncio.run(measure(ways, report, options))
    report["load_average_after"] = os.getloadavg()
    write(report, options.output)
    faults = [name for name, it in report["ways"].items() if it["errors"] or it["answers_that_differ"]]
    raise SystemExit(f"errors or mixed rows: {', '.join(faults)}; see load.json" if faults else 0)


def parent_of_the_box(folder: Path) -> tuple[str, list[str]]:
    """The embedded model, with budgets in its configuration: where it is, and their names."""
    shutil.copytree(EMBEDDED_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config["elastic"] = config.get("elastic") or {"version": 1, "budgets": BUDGETS}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder), list(config["elastic"]["budgets"])


def serve(model: str, *options: str) -> list[str]:
    words = ["--dtype", "float32", "--port", "PORT", "--cache-bytes", CACHES, *options]
    return [sys.executable, "-m", "nemotron_h_cli", "serve", model, *words]


def transformers_serve(model: str) -> list[str]:
    program = "from transformers.cli.transformers import main; main()"
    return [sys.executable, "-c", program, "serve", model, "--dtype", "float32", "--port", "PORT"]


class Way:
    """Running servers, the models to ask them for, and what was found."""

    def __init__(self, name: str, ports: list[int], processes: list[subprocess.Popen], targets: list) -> None:
        self.name, self.processes, self.targets = name, processes, targets
        self.has_scores = "transformers" not in name
        self.clients = [
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=600)
            for port in ports
        ]
        self.alone: dict[tuple[int, int], tuple[str, float]] = {}  # (target, asked) -> text, its closest call
        self.found = {"errors": 0, "messages": [], "compared": 0, "ties": 0, "answers_that_differ": 0}

    async def ask_alone(self) -> None:
        """The greedy answers, one after the other."""
        scores = {"logprobs": 2} if self.has_scores else {}
        for target, (server, model) in enumerate(self.targets):
            for asked, (prompt, most) in enumerate(ASKED):
                answer = await self.clients[server].completions.create(
                    model=model, prompt=prompt, max_tokens=most, temperature=0, **scores
                )
                tops = [sorted(it.values())[-2:] for it in answer.choices[0].logprobs.top_logprobs] if scores else []
                self.alone[target, asked] = answer.choices[0].text, min((b - a for a, b in tops), default=1.0)

    async def load(self, clients: int, seconds: float, seed: int) -> dict:
        """So many clients for so many seconds."""
        run = {"first": [], "tokens": 0, "requests": 0, "dropped": 0}
        end, started, worked = time.monotonic() + seconds, time.monotonic(), self.processor_seconds()
        await asyncio.gather(*(self.client(random.Random(100 * seed + i), end, run) for i in range(clients)))
        took = time.monotonic() - started
        return {**run, "seconds": took, "processor_seconds": self.processor_seconds() - worked}

    async def client(self, choose: random.Random, end: float, run: dict) -> None:
        """One that asks until the end."""
        while time.monotonic() < end:
            target, asked = choose.randrange(len(self.targets)), choose.randrange(len(ASKED))
            greedy, drop = choose.random() < 0.5, choose.random() < 0.1
            at = choose.randrange(len(TEXT) - max(LENGTHS))
            prompt = ASKED[asked][0] if greedy else TEXT[at : at + choose.choice(LENGTHS)]
            try:
                text = await self.answer(target, prompt, ASKED[asked][1], 0.0 if greedy else 0.8, drop, run)
            except openai.OpenAIError as error:
                self.found["errors"] += 1
                self.found["messages"] = [*self.found["messages"], f"{type(error).__name__}: {error}"[:200]][:10]
                await asyncio.sleep(0.1)
                continue
            if greedy:
                self.compare(text, *self.alone[target, asked], is_part=drop)

    async def answer(self, target: int, prompt: str, most: int, temperature: float, drop: bool, run: dict) -> str:
        """One answer, half of it if it is dropped."""
        server, model = self.targets[target]
        asked, parts = time.monotonic(), []
        stream = await self.clients[server].completions.create(
            model=model, prompt=prompt, max_tokens=most, temperature=temperature, stream=True
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].text:
                if not parts:
                    run["first"].append(time.monotonic() - asked)
                parts.append(chunk.choices[0].text)
                run["tokens"] += 1
                if drop and len(parts) >= most // 2:
                    run["dropped"] += 1
                    break
        await stream.close()
        run["requests"] += 1
        return "".join(parts)

    def compare(self, text: str, alone: str, closest: float, is_part: bool) -> None:
        """Count an answer that is not the one that the same client got alone."""
        self.found["compared"] += 1
        if text != alone and not (is_part and alone.startswith(text)):
            self.found["ties" if closest < TIE else "answers_that_differ"] += 1

    def processor_seconds(self) -> float:
        """Of all its processes until now."""
        fields = (Path(f"/proc/{it.pid}/stat").read_text().rpartition(")")[2].split() for it in self.processes)
        return sum(int(it[11]) + int(it[12]) for it in fields) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> float:
        """MiB of all its processes."""
        texts = (Path(f"/proc/{it.pid}/status").read_text() for it in self.processes)
        return round(sum(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) for text in texts) / 1024, 1)


async def measure(ways: list[Way], report: dict, options: argparse.Namespace) -> None:
    """All numbers of clients; what is known so far is written after each step."""
    for way in ways:
        await way.ask_alone()
        await way.load(len(way.targets), 2, seed=0)  # warm
        way.found["resident_mib"] = [way.resident()]
        report["ways"][way.name] = way.found
    for clients in options.clients:
        runs = {way.name: [] for way in ways}
        for turn in range(options.rounds):
            for way in ways:
                runs[way.name].append(await way.load(clients, options.seconds / options.rounds, seed=turn + 1))
                way.found["resident_mib"].append(way.resident())
        for way in ways:
            way.found[f"{clients} clients"] = summary(runs[way.name])
            print(f"{clients} clients, {way.name}: {json.dumps(way.found[f'{clients} clients'])}", flush=True)
        write(report, options.output)


def summary(runs: list[dict]) -> dict:
    """Of the turns of one way."""
    first = sorted(it for run in runs for it in run["first"])
    speeds = [run["tokens"] / run["seconds"] for run in runs]
    total = {what: sum(run[what] for run in runs) for what in ("tokens", "requests", "dropped", "processor_seconds")}
    return {
        **total, "tokens_per_second": round(statistics.median(speeds), 1), "slowest_and_fastest_turn": [round(min(speeds), 1),
        round(max(speeds), 1)], "tokens_per_processor_second": round(total["tokens"] / max(total["processor_seconds"], 0.01), 1),
        "first_token_seconds_median": round(statistics.median(first), 3) if first else None,
        "first_token_seconds_p95": round(first[int(0.95 * (len(first) - 1))], 3) if first else None,
    }  # fmt: skip


@contextmanager
def servers(commands: dict):
    """The ways, with processes that answer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ways: list[Way] = []
    started: list[subprocess.Popen] = []
    try:
        for name, (own, targets) in commands.items():
            ports, processes = [free_port() for _ in own], []
            for port, command in zip(ports, own):
                words = [word.replace("PORT", str(port)) for word in command]
                processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL))
                started.append(processes[-1])
            for port, process in zip(ports, processes):
                wait_for(port, process)
            ways.append(Way(name, ports, processes, targets))
        yield ways
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Until something listens."""
    deadline = time.monotonic() + 300
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def write(report: dict, folder: Path) -> None:
    """load.json, load.md, load.png."""
    (folder / "load.json").write_text(json.dumps(report, indent=1) + "\n")
    counts = [name for name in next(iter(report["ways"].values())) if name.endswith(" clients")]
    lines = [f"| tokens/s (median first token, s; tokens per processor second) | {' | '.join(counts)} | MiB before, middle, after | "
             "errors | greedy answers that differ |", "|" + "---|" * (len(counts) + 4)]  # fmt: skip
    for name, it in report["ways"].items():
        cells = [
            f"{it[count]['tokens_per_second']:.0f} ({it[count]['first_token_seconds_median']}; "
            f"{it[count]['tokens_per_processor_second']:.0f})"
            for count in counts
        ]
        held = it["resident_mib"]
        memory = ", ".join(f"{held[i]:.0f}" for i in (0, len(held) // 2, -1))
        differ = f"{it['answers_that_differ']} of {it['compared']} ({it['ties']} ties)"
        lines.append(f"| {name} | {' | '.join(cells)} | {memory} | {it['errors']} | {differ} |")
    (folder / "load.md").write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 3), ("tokens_per_second", "first_token_seconds_median", "resident_mib")):
        for name, it in report["ways"].items():
            values = it[what] if what == "resident_mib" else [it[count][what] for count in counts]
            axes.plot(range(len(values)) if what == "resident_mib" else counts, values, "o-", label=name)
        axes.set(title=what.replace("_", " "), ylim=(0, None), xlabel="turns" if what == "resident_mib" else "")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(folder / "load.png", dpi=110)


if __name__ == "__main__":
    main()
