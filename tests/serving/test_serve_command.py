"""`nemotron-h serve` as a process: it listens, answers, and ends in order on SIGTERM while it answers."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from tiny import tiny_model

from nemotron_h_hf.scripts import serve

pytest.importorskip("fastapi")
pytest.importorskip("sse_starlette")


@pytest.mark.parametrize(("words", "said"), [
    (["--budget", "6b"], "budget='6b': allowed are 'full', 'half', 'three_quarters'"), (["--name", "a b"], "--name"),
    (["--cache-bytes", "much"], "--cache-bytes"), (["--max-batch", "0"], "--max-batch"), (["--port", "70000"], "--port"),
])  # fmt: skip
def test_options_are_checked(words, said):
    with pytest.raises(ValueError, match=said):
        serve.main(["--port", "0", *words])


def test_a_model_without_budgets_has_none_to_serve(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--budget='6b': allowed is to leave it out"):
        serve.main([str(tmp_path), "--port", "0", "--budget", "6b"])


@contextlib.contextmanager
def server(*options: str):
    """A process that serves the embedded model: it and its port."""
    command = [sys.executable, "-m", "nemotron_h_cli", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, next(int(it[1]) for line in process.stdout if (it := re.search(r"listening on .*:(\d+)", line)))
    finally:
        process.kill()


def ask(port: int, **fields) -> http.client.HTTPResponse:
    body = {"model": "nemotron-h-tiny", "prompt": "def secret(x):", "ignore_eos": True, **fields}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_runs():
    with server("--drain", "60") as (process, port):
        budgets = ("full", "three_quarters", "half")
        answers = [ask(port, model=f"nemotron-h-tiny:{name}", max_tokens=150, stream=True) for name in budgets]
        for answer in answers:
            answer.readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(OSError):
            http.client.HTTPConnection("127.0.0.1", port, timeout=5).request("GET", "/health")
        for answer in answers:
            assert answer.read().decode().endswith("data: [DONE]\n\n")
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert "secret" not in process.stderr.read()


@pytest.mark.slow
def test_readers_that_do_not_read_hold_nobody_up():
    """More bytes than sockets hold, unread: others are answered, the rows become free, and the server ends in time."""
    with server("--drain", "5") as (process, port):
        unread = [ask(port, max_tokens=1500, logprobs=20, stream=True) for _ in range(3)]
        assert len(json.loads(ask(port, max_tokens=4).read())["choices"]) == 1

        def running() -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("nemotron_h_running"))

        end = time.monotonic() + 600  # 4,500 tokens, on a machine that may be busy
        while running() and time.monotonic() < end:
            time.sleep(1)
        assert not running()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert unread
