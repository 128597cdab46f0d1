"""`nemotron-h serve` as a process: it listens, answers, and ends in order on SIGTERM while it answers."""

import http.client
import json
import re
import signal
import subprocess
import sys
import time

import pytest

from nemotron_h_hf.scripts import serve

pytest.importorskip("fastapi")
pytest.importorskip("sse_starlette")


@pytest.mark.parametrize(("words", "said"), [
    (["--budget", "6b"], "--budget: got '6b', allowed is to leave it out"), (["--name", "a b"], "--name"),
    (["--cache-bytes", "much"], "--cache-bytes"), (["--max-batch", "0"], "--max-batch"), (["--port", "70000"], "--port"),
])  # fmt: skip
def test_options_are_checked(words, said):
    with pytest.raises(ValueError, match=said):
        serve.main(["--port", "0", *words])


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_runs():
    command = [sys.executable, "-m", "nemotron_h_cli", "serve", "--port", "0", "--drain", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = next(int(found[1]) for line in process.stdout if (found := re.search(r"listening on .*:(\d+)", line)))
        body = {
            "model": "nemotron-h-tiny",
            "prompt": "def secret(x):",
            "max_tokens": 150,
            "ignore_eos": True,
            "stream": True,
        }
        answers = []
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answers.append(connection.getresponse())
            answers[-1].readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(OSError):
            http.client.HTTPConnection("127.0.0.1", port, timeout=5).request("GET", "/health")
        for answer in answers:
            assert answer.read().decode().endswith("data: [DONE]\n\n")
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert "secret" not in process.stderr.read()
    finally:
        process.kill()
