"""One token on a CPU beside llama.cpp on the same weights: fp32, bf16 and int8, one thread and two, short and long contexts.

    python experiments/int8/write_gguf.py write FOLDER                  # the weights, once
    python experiments/int8/write_gguf.py convert FOLDER --source S     # f32.gguf, bf16.gguf, q8_0.gguf
    python experiments/cpu_tokens/peers.py FOLDER                       # docs/results/cpu_tokens/peers.json, peers.md
    python experiments/cpu_tokens/peers.py FOLDER --kinds q8_0          # one kind again; the others stay

Needs llama-cpp-python and a machine without other work; about five minutes a kind. Both read the same prompt, and their next
logits are compared before anything is timed. Then they take turns: a round is STEPS tokens of one, STEPS tokens of the other.
llama.cpp holds keys and values in fp16, ours in the type of the activations. Eight rows are eight copies of one prompt, each with a
cache of its own.
"""

import argparse
import copy
import ctypes
import json
import os
import time
from pathlib import Path
from statistics import median

import llama_cpp
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemotron_h_hf import HybridCache, NemotronHForCausalLM
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.whole_files import write_json, write_text

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "cpu_tokens"
OURS = {"f32": "fp32", "bf16": "bf16", "q8_0": "int8"}  # kind of file -> our weights
CONTEXTS, ROWS, THREADS = (1024, 16384), (1, 8), (1, 2)
STEPS, PART = 16, 512
# largest difference of a logit over the deviation of all, that still is the same model: fp16 keys; rounded weights
ALLOWED = {"f32": 0.02, "bf16": 0.1, "q8_0": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with hf/ and KIND.gguf")
    parser.add_argument("--kinds", nargs="+", choices=tuple(OURS), default=list(OURS), help="of weights (all)")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens (1024 16384)")
    parser.add_argument("--rounds", type=int, default=7, help="of every case (7)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if missing := [name for kind in arguments.kinds if not (name := arguments.folder / f"{kind}.gguf").is_file()]:
        parser.error(f"{missing[0]} is missing: experiments/int8/write_gguf.py writes it")
    path = arguments.output / "peers.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else []
    for kind in arguments.kinds:
        found = measure(arguments, kind)
        cases = [case for case in cases if case["kind"] != kind] + found
        content = {"command": "python experiments/cpu_tokens/peers.py FOLDER", "unit": "milliseconds of a token of all rows",
                   "machine": machine(), "versions": {**versions(), "llama-cpp-python": llama_cpp.__version__},
                   "steps": STEPS, "cases": cases}  # fmt: skip
        write_json(path, content)
    write_text(arguments.output / "peers.md", table(cases))
    print(table(cases))


@torch.no_grad()
def measure(arguments: argparse.Namespace, kind: str) -> list[dict]:
    """The cases of one kind of weights."""
    torch.set_num_threads(max(THREADS))
    model = ours(arguments.folder / "hf", kind)
    room = max(arguments.contexts) + 2048
    peer = {rows: Peer(arguments.folder / f"{kind}.gguf", rows, room) for rows in ROWS}
    ids = torch.randint(
        3, model.config.vocab_size, (1, max(arguments.contexts)), generator=torch.Generator().manual_seed(0)
    )
    cache, read, found = HybridCache(model.config), 0, []
    for context in sorted(arguments.contexts):
        logits = model(ids[:, read:context], past_key_values=cache, logits_to_keep=1).logits[0, -1]
        difference = compare(kind, logits, peer[1].read(ids[0, read:context].tolist()))
        print(f"{kind}, {context:,} tokens: logits differ by {difference:.1e} of their deviation", flush=True)
        for rows in ROWS:
            if rows > 1:
                peer[rows].read(ids[0, read:context].tolist())
            state = peer[rows].state()
            peer[rows].restore(state, context)
            own = repeated(cache, rows)
            for threads in THREADS:
                times = in_turns(model, own, peer[rows], rows, threads, arguments.rounds)
                found.append(
                    {
                        "kind": kind,
                        "context": context,
                        "rows": rows,
                        "threads": threads,
                        "rounds": arguments.rounds,
                        "logits": difference,
                        **times,
                    }
                )
                print(json.dumps(found[-1]), flush=True)
            peer[rows].restore(state, context)  # without the tokens that were timed
        read = context
    return found


def ours(folder: Path, kind: str) -> NemotronHForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if kind == "bf16" else torch.float32
    ).eval()
    if kind == "q8_0":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    return model


def repeated(cache: HybridCache, rows: int) -> HybridCache:
    """A copy with the one row `rows` times."""
    many = copy.deepcopy(cache)
    many.batch_repeat_interleave(rows)
    return many


def compare(kind: str, a: Tensor, b: Tensor) -> float:
    """The largest difference over the deviation.

    Raises:
        ValueError: if it is more than what the kinds of numbers explain.
    """
    difference = float((a.double() - b.double()).abs().max() / a.double().std())
    if not difference < ALLOWED[kind]:
        raise ValueError(f"{kind}: logits differ by {difference:.2g} of their deviation, allowed is {ALLOWED[kind]}")
    return difference


def in_turns(
    model: NemotronHForCausalLM, cache: HybridCache, peer: "Peer", rows: int, threads: int, rounds: int
) -> dict[str, dict]:
    """Milliseconds of a token: median, least and most of the rounds' medians."""
    torch.set_num_threads(threads)
    peer.set_threads(threads)
    token = torch.full((rows, 1), 3)
    ways = {"ours": lambda: model(token, past_key_values=cache, logits_to_keep=1), "llama.cpp": peer.step}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            taken = []
            for _ in range(STEPS):
                start = time.perf_counter()
                way()
                taken.append(1e3 * (time.perf_counter() - start))
            samples[name] += [median(taken)] if round_ else []  # the first warms up
    ratios = [peer_time / own for own, peer_time in zip(samples["ours"], samples["llama.cpp"], strict=True)]
    return {
        **{name: {key: round(of(taken), 2) for key, of in (("median", median), ("least", min), ("most", max))}
           for name, taken in samples.items()},
        "times llama.cpp's speed": {key: round(of(ratios), 3) for key, of in (("median", median), ("least", min), ("most", max))},
    }  # fmt: skip


class Peer:
    """A model of llama.cpp with `rows` sequences of up to `room` tokens, each with memory of its own."""

    def __init__(self, path: Path, rows: int, room: int) -> None:
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = rows * room, rows, False
        parameters.n_batch = parameters.n_ubatch = PART
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise ValueError(f"{path}: llama.cpp refused {rows} sequences of {room} tokens")
        self.rows, self.place = rows, 0
        self.batch = llama_cpp.llama_batch_init(max(PART, rows), 0, 1)
        self.set_threads(max(THREADS))

    def set_threads(self, count: int) -> None:
        llama_cpp.llama_set_n_threads(self.context, count, count)

    def read(self, ids: list[int]) -> Tensor:
        """Go on with sequence 0; the logits after the last token."""
        for start in range(0, len(ids), PART):
            part = ids[start : start + PART]
            self._decode([(token, self.place + number, 0) for number, token in enumerate(part)], last_only=True)
            self.place += len(part)
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return torch.from_numpy(
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (vocab,)).copy()
        )

    def step(self) -> None:
        """A token of every sequence."""
        self._decode([(3, self.place, row) for row in range(self.rows)], last_only=False)
        self.place += 1

    def state(self) -> bytes:
        """Of sequence 0."""
        size = llama_cpp.llama_state_seq_get_size(self.context, 0)
        held = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self.context, held, size, 0)
        return bytes(held)

    def restore(self, state: bytes, place: int) -> None:
        """Into every sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        held = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        for row in range(self.rows):
            if not llama_cpp.llama_state_seq_set_data(self.context, held, len(state), row):
                raise ValueError(f"llama.cpp refused a state of {len(state)} bytes for sequence {row}")
        self.place = place

    def _decode(self, tokens: list[tuple[int, int, int]], last_only: bool) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for number, (token, place, row) in enumerate(tokens):
            batch.token[number], batch.pos[number], batch.n_seq_id[number] = token, place, 1
            batch.seq_id[number][0] = row
            batch.logits[number] = not last_only or number == len(tokens) - 1
        if status := llama_cpp.llama_decode(self.context, batch):
            raise ValueError(f"llama_decode failed with {status} at {tokens[0][1]:,} tokens")


SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


def table(cases: list[dict]) -> str:
    lines = [
        "| weights | threads | rows | context | ours, tokens/s | llama.cpp, tokens/s | ours / llama.cpp (range of rounds) |"
    ]
    lines.append("|---" * 7 + "|")
    for case in cases:
        kind, ratio = case["kind"], case["times llama.cpp's speed"]
        cells = [f"{OURS[kind]}, {kind.upper()}", case["threads"], case["rows"], f"{case['context']:,}"]
        cells += [f"{1e3 * case['rows'] / case[name]['median']:.1f}" for name in ("ours", "llama.cpp")]
        cells.append(f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
