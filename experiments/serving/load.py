"""Load: 1, 8 and 32 clients with prompts of many lengths, through the official client.

    python experiments/serving/load.py --seconds 30

Three ways to serve, one after the other on the same machine, one thread for each process, fp32:

    ours        one process, the embedded model given three budgets (by its shape alone); clients ask for all of them
    three       a process of `nemotron-h serve --budget` for each of the three, the same requests
    transformers   `transformers serve` of the embedded model, whole; ours with the whole model alone is next to it

Each client asks again as soon as it has its answer; every tenth answer is dropped half way. Throughput is tokens received per
second, from all streams; first-token times are from request to first text. Memory is the resident set before and after.
Needs the `serve` and `dev` extras. Writes docs/results/serving/load.json. Linux.
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

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.environment import machine, versions

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "serving"
BUDGETS = {
    "whole": {},
    "middle": {"hidden_size": 160, "intermediate_size": 448, "mamba_num_heads": 4},
    "small": {"hidden_size": 128, "intermediate_size": 320, "mamba_num_heads": 4},
}
TEXT = Path(argparse.__file__).read_text()


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    report = {
        "command": f"python experiments/serving/load.py --seconds {options.seconds:g}", "machine": machine(),
        "versions": versions(), "load_average_before": os.getloadavg(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        parent = parent_of_the_box(Path(folder) / "parent")
        every = [f"parent:{name}" for name in BUDGETS]
        ways = {
            "ours, three budgets, one process": ([[*serve(parent)]], [(0, name) for name in every]),
            "ours, three processes": (
                [serve(parent, "--budget", name) for name in BUDGETS], [(i, "parent") for i in range(len(BUDGETS))],
            ),
            "ours, whole model": ([serve(EMBEDDED_MODEL)], [(0, Path(EMBEDDED_MODEL).name)]),
            "transformers serve": ([transformers_serve()], [(0, EMBEDDED_MODEL)]),
        }  # fmt: skip
        for name, (commands, targets) in ways.items():
            report[name] = measure(commands, targets, options)
            print(name, json.dumps(report[name]), flush=True)
    report["load_average_after"] = os.getloadavg()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "load.json").write_text(json.dumps(report, indent=1) + "\n")


def parent_of_the_box(folder: Path) -> str:
    """The embedded model with budgets in its configuration: their speed is that of trained ones, their text is not."""
    shutil.copytree(EMBEDDED_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config["elastic"] = {"version": 1, "budgets": BUDGETS}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def serve(model: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "nemotron_h_cli", "serve", model, "--dtype", "float32", "--port", "PORT", *options]


def transformers_serve() -> list[str]:
    program = "from transformers.cli.transformers import main; main()"
    return [sys.executable, "-c", program, "serve", EMBEDDED_MODEL, "--dtype", "float32", "--port", "PORT"]


def measure(commands: list[list[str]], targets: list[tuple[int, str]], options: argparse.Namespace) -> dict:
    """All numbers of clients against running servers."""
    with servers(commands) as (ports, processes):
        asyncio.run(load(ports, targets, len(targets), 3))  # warm
        before, found = resident(processes), {}
        for clients in options.clients:
            found[f"{clients} clients"] = asyncio.run(load(ports, targets, clients, options.seconds))
        return {**found, "resident_bytes_before": before, "resident_bytes_after": resident(processes)}


@contextmanager
def servers(commands: list[list[str]]):
    """Processes that answer, and their ports."""
    ports, processes = [], []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        for command in commands:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ports.append(free.getsockname()[1])
            command = [word.replace("PORT", str(ports[-1])) for word in command]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        for port in ports:
            wait_for(port)
        yield ports, processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


def wait_for(port: int) -> None:
    """Until something listens."""
    deadline = time.monotonic() + 180
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


async def load(ports: list[int], targets: list[tuple[int, str]], clients: int, seconds: float) -> dict:
    """So many clients for so many seconds."""
    first, counts = [], {"tokens": 0, "requests": 0, "dropped": 0, "errors": 0}
    end = time.monotonic() + seconds
    started = time.monotonic()
    connections = [
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=300)
        for port in ports
    ]

    async def client(number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < end:
            server, model = targets[(number + counts["requests"]) % len(targets)]
            at, length = choose.randrange(len(TEXT) - 4000), choose.choice((40, 200, 1000, 3000))
            asked, drop = time.monotonic(), choose.random() < 0.1
            try:
                most = choose.choice((16, 32, 64))
                stream = await connections[server].completions.create(
                    model=model, prompt=TEXT[at : at + length], max_tokens=most, temperature=0.8, stream=True
                )
                seen = 0
                async for chunk in stream:
                    if chunk.choices and chunk.choices[0].text:
                        if not seen:
                            first.append(time.monotonic() - asked)
                        seen += 1
                        counts["tokens"] += time.monotonic() < end
                        if drop and seen >= most // 2:
                            counts["dropped"] += 1
                            break
                await stream.close()
                counts["requests"] += 1
            except openai.OpenAIError as error:
                counts["errors"] += 1
                print(type(error).__name__, error, file=sys.stderr)
                await asyncio.sleep(0.1)

    await asyncio.gather(*(client(number) for number in range(clients)))
    for connection in connections:
        await connection.close()
    first.sort()
    took = min(seconds, time.monotonic() - started)
    return {
        **counts, "tokens_per_second": round(counts["tokens"] / took, 1),
        "first_token_seconds_median": round(statistics.median(first), 3) if first else None,
        "first_token_seconds_p95": round(first[int(0.95 * (len(first) - 1))], 3) if first else None,
    }  # fmt: skip


def resident(processes: list[subprocess.Popen]) -> int:
    """Bytes of all of them."""
    texts = (Path(f"/proc/{process.pid}/status").read_text() for process in processes)
    return sum(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024 for text in texts)


if __name__ == "__main__":
    main()
