"""OpenAI's API on a loopback socket, through the official client and curl, against `generate`."""

import http.client
import json
import shutil
import subprocess
import threading
import time
from unittest import mock

import pytest
import torch
from tiny import tiny_model
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from nemotron_h_hf import NemotronHElasticForCausalLM
from nemotron_h_hf.serving.engine import Engine

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")
pytest.importorskip("prometheus_client")

from nemotron_h_hf.serving import api  # noqa: E402
from nemotron_h_hf.serving.api import make_app  # noqa: E402
from nemotron_h_hf.serving.batch import Batch  # noqa: E402
from nemotron_h_hf.serving.metrics import Metrics  # noqa: E402
from nemotron_h_hf.serving.requests import Stopped  # noqa: E402

BUDGETS = {
    "large": {"trained": True, "loss": 1.5},
    "small": {"hidden_size": 32, "mamba_num_heads": 4, "num_attention_heads": 2, "intermediate_size": 40, "loss": 2.0},
    "short": {"layers": [0, 1, 3, 4, 5], "mamba_num_heads": 6},
}
IDS = ["tiny", "tiny:large", "tiny:small", "tiny:short"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>\n{% endif %}{% endif %}"
)
KEY = "a-key-for-tests"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}
CALLED = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1", "tool_call_id": "1"}]
PROMPT = "How now, brown cow?"


def letters():
    """One token for each letter, and special ones as in Nano v3; 0 ends."""
    tokens = ["<|im_end|>", *(chr(i) for i in range(32, 127)), "\n", *(it for it in SPECIAL if it != "<|im_end|>")]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=" "))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def parent():
    ordinary = tiny_model("dense", vocab_size=102, elastic={"version": 1, "budgets": BUDGETS})
    ordinary.generation_config.eos_token_id = 0
    return NemotronHElasticForCausalLM.from_model(ordinary)


@pytest.fixture(scope="module")
def server(parent):
    """(port, engine) of a server that needs a key."""
    metrics = Metrics("tiny")
    engine = Engine(
        parent, letters(), name="tiny", piece=16, max_batch=8, max_context=600, queue=4, watch=metrics.report
    )
    metrics.of(engine)
    config = uvicorn.Config(
        make_app(engine, metrics, keys=["other", KEY], most_body=20_000, drain=0), log_level="error"
    )
    listening = uvicorn.Config(config.app, port=0).bind_socket()
    served = uvicorn.Server(config)
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listening]})
    thread.start()
    while not served.started:
        time.sleep(0.01)
    yield listening.getsockname()[1], engine
    served.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_left(server):
    """After each test no row is left."""
    yield
    deadline = time.monotonic() + 20
    while server[1].running or server[1].waiting:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server[1].room.reserved() == 0


def ask(port, path, body=None, method="POST", **headers):
    """(status, headers, text) without a client's help."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, {**HEADERS, **headers})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


@torch.no_grad()
def greedy(parent, text, count, budget):
    tokenizer = letters()
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(tokens)
    written = parent.generate(
        tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, budget=budget
    )[0, tokens.shape[1] :].tolist()
    return written, tokenizer.decode(written, skip_special_tokens=True)


# Answers


def test_models_are_the_parent_and_its_budgets(client, server, parent):
    entries = {it.id: it for it in client.models.list()}
    assert list(entries) == IDS
    small = client.models.retrieve("tiny:small")
    assert (small.root, small.parent, small.loss, small.trained, small.max_model_len) == (
        "tiny",
        "tiny",
        2.0,
        False,
        600,
    )
    assert small.parameters == sum(t.numel() for t in parent.submodel("small").state_dict().values())
    orders = server[1].budgets.image_bytes() - entries["tiny"].bytes  # where heads lie in memory, prefix_order.py
    assert 0 <= orders < 0.01 * entries["tiny"].bytes
    with pytest.raises(openai.NotFoundError, match="tiny:large, tiny:small"):
        client.models.retrieve("tiny:none")


@pytest.mark.parametrize("name", IDS)
def test_greedy_text_is_that_of_generate(client, parent, name):
    tokens, text = greedy(parent, PROMPT, 12, name.partition(":")[2] or None)
    answer = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].token_ids == tokens and answer.choices[0].text == text
    assert answer.usage.completion_tokens == len(tokens) and answer.usage.prompt_tokens == len(PROMPT)


def test_a_stream_is_the_whole_answer_in_parts(client):
    settings = {"model": "tiny:small", "prompt": [PROMPT, "Well"], "max_tokens": 8, "n": 2, "seed": 3, "logprobs": 2,
                "extra_body": {"ignore_eos": True}}  # fmt: skip
    whole = client.completions.create(**settings)
    parts = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert not parts[-1].choices and parts[-1].usage.completion_tokens == 32
    for choice in whole.choices:
        own = [it.choices[0] for it in parts[:-1] if it.choices[0].index == choice.index]
        assert (
            "".join(it.text for it in own) == choice.text and own[-1].finish_reason == choice.finish_reason == "length"
        )
        assert sum((it.logprobs.token_logprobs for it in own if it.logprobs), []) == pytest.approx(
            choice.logprobs.token_logprobs, abs=1e-4
        )
        offsets = sum((it.logprobs.text_offset for it in own if it.logprobs), [])
        assert (
            offsets == choice.logprobs.text_offset
            and offsets[0] == 0
            and offsets[-1] in (len(choice.text) - 1, len(choice.text))
        )
    assert len({choice.text for choice in whole.choices}) == 4 and len(whole.choices) == 4
    again = client.completions.create(**{**settings, "prompt": "Well", "seed": 5})  # choice i: seed + i
    assert [it.text for it in again.choices] == [it.text for it in whole.choices[2:]]


def test_a_conversation_streamed_and_whole(client):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    settings = {"model": "tiny", "messages": messages, "max_completion_tokens": 9, "temperature": 0, "logprobs": True,
                "top_logprobs": 1, "extra_body": {"ignore_eos": True, "logit_bias": {"0": -100}}}  # fmt: skip
    whole = client.chat.completions.create(**settings)
    parts = list(client.chat.completions.create(**settings, stream=True))
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"
    text = "".join(it.choices[0].delta.content or "" for it in parts)
    assert text == whole.choices[0].message.content and len(whole.choices[0].logprobs.content) == 9
    likeliest = [it.top_logprobs[0].token for it in whole.choices[0].logprobs.content]
    assert likeliest == [it.token for it in whole.choices[0].logprobs.content]
    again = client.chat.completions.create(**settings)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.choices[0].message.content == text


def test_thinking_small_and_answering_large(client):
    answer = client.chat.completions.create(
        model="tiny:small>large", messages=[{"role": "user", "content": "Why?"}], max_tokens=20, temperature=0,
        extra_body={"thinking_token_budget": 4, "ignore_eos": True, "chat_template_kwargs": {"thinking": True},
                    "logit_bias": {"0": -100}},
    )  # fmt: skip
    thought = answer.choices[0].message.reasoning_content
    assert 0 < len(thought) <= 6 and "</think>" not in thought + answer.choices[0].message.content
    assert answer.usage.completion_tokens_details.reasoning_tokens in (5, 6)


def test_a_response_streamed_and_whole(client):
    told = {"instructions": "Be short.", "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]}
    settings = {"model": "tiny:small", "max_output_tokens": 9, "temperature": 0}
    extra = {"ignore_eos": True, "logit_bias": {"0": -100}}
    whole = client.responses.create(**settings, **told, extra_body=extra)
    events = list(client.responses.create(**settings, **told, extra_body=extra, stream=True))
    chat = client.chat.completions.create(
        model="tiny:small", max_tokens=9, temperature=0, extra_body=extra,
        messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
    )  # fmt: skip
    assert whole.output_text == chat.choices[0].message.content and whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens" and whole.usage.output_tokens == 9
    assert [it.type for it in events[:2]] == ["response.created", "response.in_progress"]
    assert [it.sequence_number for it in events] == list(range(len(events)))
    assert "".join(it.delta for it in events if it.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == whole.output_text
    assert last.response.usage.input_tokens == whole.usage.input_tokens == chat.usage.prompt_tokens
    again = [
        *told["input"],
        *(it.model_dump(exclude_none=True) for it in whole.output),
        {"role": "user", "content": "So?"},
    ]
    longer = client.responses.create(**settings, instructions="Be short.", input=again, extra_body=extra)
    assert longer.usage.input_tokens > whole.usage.total_tokens and longer.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_with_reasoning(client, stream):
    answer = client.responses.create(
        model="tiny", input="Why?", max_output_tokens=20, temperature=0, stream=stream,
        extra_body={"thinking_token_budget": 4, "ignore_eos": True, "chat_template_kwargs": {"thinking": True},
                    "logit_bias": {"0": -100, "99": -100}},
    )  # fmt: skip
    events = list(answer) if stream else []
    if stream:
        answer = events[-1].response
        thought = "".join(it.delta for it in events if it.type == "response.reasoning_text.delta")
        assert thought == answer.output[0].content[0].text
        kinds = [it.type for it in events if it.type.startswith("response.output_item")]
        assert kinds == ["response.output_item.added", "response.output_item.done"] * 2
    assert [it.type for it in answer.output] == ["reasoning", "message"]
    assert answer.usage.output_tokens_details.reasoning_tokens in (5, 6) and "</think>" not in str(answer.output)


# Refusals


@pytest.mark.parametrize(("change", "param"), [
    ({"tools": [CALL]}, "tools"), ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"store": True}, "store"),
    ({"input": []}, "input"), ({"input": [{"type": "function_call_output"}]}, "input"), ({"max_tokens": 3}, "max_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"), ({"text": {"format": {"type": "json_object"}}}, "text"),
    ({"reasoning": {"effort": "low"}}, "reasoning"), ({"max_output_tokens": 700}, "max_output_tokens"), ({"n": 2}, "n"),
])  # fmt: skip
def test_a_response_is_refused_by_field(server, change, param):
    status, _, text = ask(server[0], "/v1/responses", {"model": "tiny", "input": "Hi", **change})
    assert status == 400 and json.loads(text)["error"]["param"] == param, text


@pytest.mark.parametrize(("change", "param"), [
    ({"best_of": 2}, "best_of"), ({"echo": True}, "echo"), ({"nonsense": 1}, "nonsense"), ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"max_tokens": 0}, "max_tokens"), ({"n": 200}, "n"), ({"prompt": ""}, "prompt"),
    ({"prompt": [500]}, "prompt"), ({"stop": [""]}, "stop"), ({"logprobs": 40}, "logprobs"), ({"budget": "huge"}, "budget"),
    ({"max_tokens": 599}, "max_tokens"), ({"logit_bias": {"5": 200}}, "logit_bias"), ({"stream_options": {"x": 1}}, "stream_options.x"),
    ({"max_tokens": True}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"), ({"prompt": [True]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"), ({"prompt": ["a"] * 5}, "prompt"), ({"prompt": "\ud83d"}, "prompt"),
    ({"logit_bias": {"500": 1}}, "logit_bias"), ({"budget": "small>"}, "budget"), ({"budget": True}, "budget"),
    ({"thinking_budget": 1, "thinking_token_budget": 1}, "thinking_token_budget"), ({"n": 9}, "n"),
    ({"thinking_token_budget": -1}, "thinking_token_budget"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"\ud83d": 1}, "?"), ({"prompt": None}, "prompt"),
])  # fmt: skip
def test_a_refusal_names_the_field(server, change, param):
    status, _, text = ask(server[0], "/v1/completions", {"model": "tiny", "prompt": "Hi", **change})
    assert status == 400 and json.loads(text)["error"]["param"] == param, text


@pytest.mark.parametrize(("change", "param"), [
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"tool_choice": "required"}, "tool_choice"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"functions": []}, "functions"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 2, "max_completion_tokens": 2}, "max_completion_tokens"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 700}, "max_completion_tokens"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "messages"), ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"messages": CALLED}, "messages.tool_calls.function.arguments"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools"),
    ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"thinkin": True}}, "chat_template_kwargs"),
])  # fmt: skip
def test_a_conversation_is_refused_by_field(server, change, param):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **change}
    status, _, text = ask(server[0], "/v1/chat/completions", body)
    assert status == 400 and json.loads(text)["error"]["param"] == param, text


def test_unknown_models_keys_and_paths(server, client):
    with pytest.raises(openai.NotFoundError, match="model='gpt': allowed are tiny"):
        client.completions.create(model="gpt", prompt="Hi")
    with pytest.raises(openai.NotFoundError, match="tiny:7b"):
        client.completions.create(model="tiny:7b", prompt="Hi")
    for given in ("", "Bearer", "Bearer wrong", f"Bearer {KEY}x"):
        assert ask(server[0], "/v1/models", None, "GET", Authorization=given)[0] == 401
    assert ask(server[0], "/v1/nothing", None, "GET")[0] == 404
    assert ask(server[0], "/health", None, "GET", Authorization="")[0] == 200
    assert ask(server[0], "/health", None, "HEAD", Authorization="")[0] == 200


def test_bad_and_large_bodies(server):
    for bad in (b"{not json", b"\xff", b'{"model": "tiny", "prompt": "\xff"}', b"[" * 9000, b"1" * 9000):
        status, _, text = ask(server[0], "/v1/completions", bad)
        assert status == 400 and "not JSON" in text, (bad, text)
    good = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
    status, _, text = ask(server[0], "/v1/completions", good, **{"Content-Type": "text/plain"})
    assert status == 400 and "Content-Type: allowed is application/json" in text
    assert ask(server[0], "/v1/completions", {"model": "tiny", "prompt": "x" * 30_000})[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", server[0], timeout=60)
    parts = (b"x" * 1000 for _ in range(40))
    connection.request("POST", "/v1/completions", parts, HEADERS, encode_chunked=True)
    assert connection.getresponse().status == 413
    nothing = dict.fromkeys(("functions", "suffix", "reasoning_effort", "max_tokens", "stop", "stream_options"))
    assert ask(server[0], "/v1/completions", {**good, **nothing})[0] == 200, "a null asks for nothing"


@pytest.mark.parametrize(("given", "said"), [
    ([1, "a"], "prompt.1='a': "), (5, "prompt='5': allowed is str or list[int] or list[str] or list[list[int]]"),
])  # fmt: skip
def test_a_field_of_several_forms_says_which(server, given, said):
    text = ask(server[0], "/v1/completions", {"model": "tiny", "prompt": given})[2]
    assert json.loads(text)["error"]["message"].startswith(said)


def test_a_full_queue_is_429(server):
    port, engine = server
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "n": 8, "stream": True}
    connections = []
    for _ in range(5):  # one runs, four wait
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
        connections.append(connection)
        deadline = time.monotonic() + 20
        while len(engine.running) + len(engine.waiting) < len(connections):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    status, headers, text = ask(port, "/v1/completions", body)
    assert status == 429 and int(headers["Retry-After"]) >= 1, text
    for connection in connections:  # the clients go
        connection.close()


@pytest.mark.parametrize(("path", "asked"), [
    ("completions", {"prompt": "Hi"}), ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("responses", {"input": "Hi"}),
])  # fmt: skip
@pytest.mark.parametrize(("error", "said"), [(MemoryError(), 503), (ArithmeticError("secret"), 500), (Stopped(), 503)])
def test_a_stream_that_fails_before_its_first_token_has_a_status(server, monkeypatch, path, asked, error, said):
    monkeypatch.setattr(Engine, "_read_piece", mock.Mock(side_effect=error))
    status, _, text = ask(server[0], f"/v1/{path}", {"model": "tiny", "stream": True, **asked})
    assert status == said and json.loads(text)["error"]["type"] == "server_error" and "secret" not in text


def test_a_stream_that_fails_later_says_so_in_an_event(client, monkeypatch):
    read = threading.Event()

    def fail(*_: object) -> None:
        read.wait(60)  # else the failure may come before the first part is sent
        raise MemoryError

    monkeypatch.setattr(Batch, "step", fail)
    parts = client.completions.create(
        model="tiny", prompt="Hi", max_tokens=4, stream=True, temperature=0, extra_body={"ignore_eos": True}
    )  # a drawn token may be a part of a character, which is not sent
    assert next(parts).choices[0].text
    read.set()
    with pytest.raises(openai.APIError, match="out of memory"):
        next(parts)


def test_a_stream_that_waits_long_begins_with_pings(server, monkeypatch):
    monkeypatch.setattr(api, "PING", 0.2)
    read = Engine._read_piece
    monkeypatch.setattr(Engine, "_read_piece", lambda *args: (time.sleep(0.7), read(*args))[1])
    status, _, text = ask(
        server[0], "/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 2, "stream": True}
    )
    assert status == 200 and text.startswith(": ping") and text.endswith("data: [DONE]\n\n")


def test_a_client_that_goes_frees_its_rows(server):
    port, engine = server
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 590, "ignore_eos": True, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
        while not engine.running:
            time.sleep(0.01)
        connection.close()
        deadline = time.monotonic() + 10
        while engine.running:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_metrics_and_status_hold_no_prompt(server, client):
    client.completions.create(model="tiny:small", prompt="secret words", max_tokens=3)
    status, _, text = ask(server[0], "/metrics", None, "GET")
    assert status == 200 and 'nemotron_h_requests_total{budget="small",model="tiny",reason=' in text
    assert f'nemotron_h_image_bytes{{model="tiny"}} {float(server[1].budgets.image_bytes())}' in text
    assert "secret" not in text + ask(server[0], "/status", None, "GET")[2]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_streams(server):
    command = ["curl", "-sN", f"http://127.0.0.1:{server[0]}/v1/completions", "-H", f"Authorization: Bearer {KEY}",
               "-H", "Content-Type: application/json", "-d", json.dumps({"model": "tiny", "prompt": "Hi", "stream": True})]  # fmt: skip
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]" and all(line.startswith("data: ") for line in lines[:-1])
    assert json.loads(lines[0][6:])["object"] == "text_completion"


def test_the_page_is_one_file(server):
    status, headers, text = ask(server[0], "/", None, "GET", Authorization="")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text and "src=" not in text
