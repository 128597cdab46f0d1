"""What is fuzzed: for each area a whole input, how it is damaged, how it is read, and what tells a right result.

An area prepares its input once in a folder. Each mutation gets a copy of it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from nemotron_h_hf.conversion.convert import convert  # noqa: E402
from tiny import tiny_model  # noqa: E402
from tiny_run import make_trainer, write_texts  # noqa: E402

from nemotron_h_hf import EMBEDDED_MODEL, HybridCache, NemotronHConfig, NemotronHForCausalLM  # noqa: E402
from nemotron_h_hf.data.bad_data import BadData  # noqa: E402
from nemotron_h_hf.data.readers import reader_of  # noqa: E402
from nemotron_h_hf.elastic.live.saving import write_manifest  # noqa: E402
from nemotron_h_hf.inputs import load_tokenizer  # noqa: E402
from nemotron_h_hf.model.configuration_nemotron_h import SYNONYMS  # noqa: E402

from . import mutations  # noqa: E402
from .judge import Refused, command  # noqa: E402

FIXTURES = Path(__file__).parent.parent / "fixtures" / "megatron" / "checkpoints"
TOKENS = torch.arange(3, 14)[None]
INDEX = "model.safetensors.index.json"


class Area:
    """One kind of input. `prepare` fills a folder; `damage` changes a copy of it and says how; `read` gives the result."""

    copies = True  # whether `damage` needs a copy of the prepared folder

    def prepare(self, folder: Path) -> None:
        raise NotImplementedError

    def damage(self, rng: random.Random, folder: Path) -> str:
        raise NotImplementedError

    def read(self, folder: Path) -> Any:
        raise NotImplementedError

    def expected(self, folder: Path, whole: Any) -> Any:
        """What reading the damaged folder should give if it gives anything; by default that of the whole one."""
        return whole

    def names(self, folder: Path, what: str) -> tuple[str, ...]:
        """What a clear error may name."""
        return (str(folder), what.split(":")[0], what.split(" ")[-1])


def logits(folder: Path, **options: Any) -> str:
    """A digest of a model's logits for a few tokens. By our class: AutoConfig reads config.json before we are asked."""
    model = NemotronHForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return digest(model(TOKENS).logits)


def digest(*tensors: torch.Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(
            f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        )
    return sha.hexdigest()


class Headers(Area):
    """The header of a safetensors file and the file's length; its data has no checksum, and is left alone."""

    def prepare(self, folder: Path) -> None:
        tiny_model("moe").save_pretrained(folder)

    def damage(self, rng: random.Random, folder: Path) -> str:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        kind = rng.choice(("json", "json", "json", "text", "length", "file"))
        head, rest, what = data[8 : 8 + length], data[8 + length :], "file"
        if kind == "json":
            text, what = mutations.mutate_json(rng, head.decode())
            data = struct.pack("<Q", len(text.encode("latin-1", "replace"))) + text.encode("latin-1", "replace") + rest
        elif kind == "text":
            head, what = mutations.mutate_bytes(rng, head)
            data = (data[:8] if rng.random() < 0.5 else struct.pack("<Q", len(head))) + head + rest
        elif kind == "length":
            first, what = mutations.mutate_bytes(rng, data[:8])
            data = (first + bytes(8))[:8] + data[8:]
        else:
            cut = rng.randrange(len(data))
            data, what = (
                (data[:cut], f"cut at {cut}") if rng.random() < 0.5 else (data + rng.randbytes(9), "9 bytes more")
            )
        path.write_bytes(data)
        return f"model.safetensors: {kind}: {what}"

    def read(self, folder: Path) -> str:
        return logits(folder)


class Index(Area):
    """The index of a sharded checkpoint."""

    def prepare(self, folder: Path) -> None:
        tiny_model().save_pretrained(folder, max_shard_size="60KB")

    def damage(self, rng: random.Random, folder: Path) -> str:
        return mutations.change_json(rng, folder / INDEX)

    def read(self, folder: Path) -> str:
        return logits(folder)


class Config(Area):
    """config.json. A value that the loaded configuration has as the file says it is another model, and right."""

    def prepare(self, folder: Path) -> None:
        tiny_model(**{"time_step_limit": [0.0, 1.0]}).save_pretrained(folder)

    def damage(self, rng: random.Random, folder: Path) -> str:
        return mutations.change_json(rng, folder / "config.json")

    def read(self, folder: Path) -> str:
        return logits(folder)

    def expected(self, folder: Path, whole: str) -> Any:
        return _SameOrHonoured(whole, folder)

    def names(self, folder: Path, what: str) -> tuple[str, ...]:
        field = what.removeprefix("config.json: ").split(" ")[0]
        return (*super().names(folder, what), "config", field, "time_step_limit", *NemotronHConfig().to_dict())


class _SameOrHonoured:
    """Equal to the logits of the whole model, and to any others if the configuration is what the file says."""

    def __init__(self, whole: str, folder: Path) -> None:
        self.whole, self.folder = whole, folder

    def __eq__(self, found: object) -> bool:
        return found == self.whole or self._is_honoured()

    def _is_honoured(self) -> bool:
        said, have = json.loads((self.folder / "config.json").read_text()), NemotronHConfig.from_pretrained(self.folder)
        known = have.to_dict()
        fields = {
            name for name in said if name in known and name not in SYNONYMS
        }  # a field wins over its other spellings
        return all(_same(known[name], said[name]) for name in fields if said[name] is not None)


def _same(have: Any, said: Any) -> bool:
    if isinstance(said, bool) != isinstance(have, bool):
        return False
    if isinstance(said, (list, tuple)) and isinstance(have, (list, tuple)):
        return len(said) == len(have) and all(map(_same, have, said))
    return have == said or str(have) == str(said)


class Manifest(Area):
    """A folder with a manifest: the manifest itself, and any byte of the weights."""

    def prepare(self, folder: Path) -> None:
        from nemotron_h_hf.manifest import checksum
        from nemotron_h_hf.model.loading import weight_files
        from nemotron_h_hf.model.weights import find_tensors

        tiny_model().save_pretrained(folder)
        stored = find_tensors(weight_files(folder))
        write_manifest(folder, {name: checksum(entry) for name, entry in stored.items()})

    def damage(self, rng: random.Random, folder: Path) -> str:
        if rng.random() < 0.5:
            return mutations.change_file(rng, folder / "model.safetensors")
        if rng.random() < 0.3:
            return mutations.change_file(rng, folder / "elastic_manifest.json")
        return mutations.change_json(rng, folder / "elastic_manifest.json")

    def read(self, folder: Path) -> str:
        return logits(folder)


class Megatron(Area):
    """Any file of checkpoints that megatron-core wrote, through `convert --verify`."""

    fixtures = ("super19_t1p1_torch_dist", "dense_t2p1_torch", "dense_nemo2")

    def prepare(self, folder: Path) -> None:
        for name in self.fixtures:
            shutil.copytree(FIXTURES / name, folder / name)

    def damage(self, rng: random.Random, folder: Path) -> str:
        name = rng.choice(self.fixtures)
        for other in set(self.fixtures) - {name}:
            shutil.rmtree(folder / other)
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
        path = rng.choice(files)
        if path.suffix == ".json" and rng.random() < 0.5:
            return mutations.change_json(rng, path)
        return mutations.change_file(rng, path)

    def read(self, folder: Path) -> dict[str, str]:
        found = {}
        for name in self.fixtures:
            if (folder / name).is_dir():
                target = folder / f"{name}.out"
                report = convert(folder / name, target, verify_output=True)
                for note in report.notes:  # a misspelt argument is no error: the report says what is taken for it
                    if "is not known, all" in note:
                        raise Refused(f"{folder / name}: {note}")
                found[name] = {name: line["sha256"] for name, line in report.tensors.items()}
        return found

    def expected(self, folder: Path, whole: dict) -> dict:
        return {name: value for name, value in whole.items() if (folder / name).is_dir()}


class Caches(Area):
    """Any byte of a saved cache, and a step from it."""

    def prepare(self, folder: Path) -> None:
        model = tiny_model()
        model.save_pretrained(folder / "model")
        with torch.no_grad():
            model(TOKENS, use_cache=True).past_key_values.save(folder / "cache.safetensors")

    def damage(self, rng: random.Random, folder: Path) -> str:
        return mutations.change_file(rng, folder / "cache.safetensors")

    def read(self, folder: Path) -> str:
        model = tiny_model()
        cache = HybridCache.load(folder / "cache.safetensors", model.config)
        with torch.no_grad():
            return digest(model(TOKENS[:, :1], past_key_values=cache, use_cache=True).logits)


class TrainerCheckpoint(Area):
    """Any file of a training checkpoint; the run resumes from it for two steps and its weights are compared."""

    def prepare(self, folder: Path) -> None:
        write_texts(folder.parent / "texts")  # by its path the run knows it again
        make_trainer(folder.parent / "texts", folder / "run", steps=4, save_steps=2).train()
        for later in folder.glob("run/checkpoint-4"):
            shutil.rmtree(later)

    def damage(self, rng: random.Random, folder: Path) -> str:
        files = sorted(path for path in (folder / "run" / "checkpoint-2").rglob("*") if path.is_file())
        path = rng.choice(files)
        if path.suffix == ".json" and rng.random() < 0.5:
            return mutations.change_json(rng, path)
        return mutations.change_file(rng, path)

    def read(self, folder: Path) -> str:
        trainer = make_trainer(folder.parent / "texts", folder / "run", steps=4, save_strategy="no", report_to=[])
        trainer.train(resume_from_checkpoint=True)
        return digest(*(weight.detach() for _, weight in sorted(trainer.model.named_parameters())))


class Data(Area):
    """Files of text: what is read must be what Python's own readers get, or an error that names the file."""

    files = {"a.jsonl": "jsonl", "b.txt": "text", "c.jsonl.gz": "jsonl", "d.lines": "lines"}

    def prepare(self, folder: Path) -> None:
        rows = "".join(json.dumps({"text": f"row {n} é 💥 " + "x" * n, "n": n}) + "\n" for n in range(30))
        (folder / "a.jsonl").write_text(rows, encoding="utf-8")
        (folder / "b.txt").write_text("ein Text, ünd noch einer\n" * 30, encoding="utf-8")
        (folder / "d.lines").write_text("ein Text, ünd noch einer\n\n" * 30, encoding="utf-8")
        (folder / "c.jsonl.gz").write_bytes(gzip.compress(rows.encode()))

    def damage(self, rng: random.Random, folder: Path) -> str:
        name = rng.choice(sorted(self.files))
        for other in set(self.files) - {name}:
            (folder / other).unlink()
        return mutations.change_file(rng, folder / name)

    def read(self, folder: Path) -> list[str]:
        found = []
        for path in sorted(folder.iterdir()):
            kind = self.files[path.name]
            bad = BadData("fuzz", "error")
            column = "text" if kind == "jsonl" else None
            found += [record.value for record, _ in reader_of(str(path), kind)(str(path), column, bad)]
        return found

    def expected(self, folder: Path, whole: list[str]) -> list[str]:
        """Read again, by means of the standard library alone."""
        found: list[Any] = []
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            with contextlib.suppress(Exception):
                text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
                if self.files[path.name] == "text":
                    found.append(text)
                else:
                    lines = [line for line in io.StringIO(text, newline="\n") if line.strip()]
                    found += [
                        json.loads(line)["text"] if path.name != "d.lines" else line.rstrip("\r\n") for line in lines
                    ]
        return found


class Tokenizers(Area):
    """Files of a tokenizer. Other tokens are another tokenizer, nothing tells which one is meant: only errors are judged."""

    def prepare(self, folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(Path(EMBEDDED_MODEL) / name, folder / name)

    def damage(self, rng: random.Random, folder: Path) -> str:
        path = folder / rng.choice(("tokenizer.json", "tokenizer_config.json", "tokenizer_config.json"))
        return mutations.change_file(rng, path) if rng.random() < 0.5 else mutations.change_json(rng, path)

    def read(self, folder: Path) -> bool:
        load_tokenizer(folder)
        return True


class CommandLines(Area):
    """Words of command lines; every failure is one line and status 1, or 2 for usage."""

    lines = (
        ["info", "{model}"], ["info", "nemotron-h-8b", "--json", "--context", "1000", "--memory-gib", "16"],
        ["generate", "--model", "{model}", "--prompt", "a b", "--max-new-tokens", "2", "--temperature", "0.7", "--top-p",
         "0.9", "--seed", "1", "--device", "cpu", "--dtype", "float32", "--cache", "static"],
        ["convert", "{model}", "{out}/mc", "--dry-run", "--max-shard-size", "5GB", "--tp", "1", "--format", "torch"],
        ["convert", "{megatron}", "{out}/hf", "--dry-run", "--dtype", "bfloat16", "--allow-unused", "x*"],
        ["push", "{model}", "owner/name", "--dry-run", "--license", "mit"],
        ["slice", "{model}", "{out}/s", "--budget", "hidden_size=8"],
        ["export", "{model}", "{out}/e", "--max-shard-gb", "5", "--dtype", "bfloat16"],
        ["merge", "{model}", "--base", "{model}", "--output", "{out}/m"],
        ["elasticize", "{model}", "{out}/p", "--budget", "s:hidden_size=128", "--rows", "0", "--device", "cpu"],
        ["blend", "--config", "{out}/nothing.yaml"],
        ["eval", "--model", "{model}", "--tasks", "nothing", "--limit", "1", "--device", "cpu"],
        ["pretrain", "--data", "{out}/nothing.txt", "--output_dir", "{out}/run", "--max_steps", "1", "--learning_rate",
         "1e-3", "--use_cpu", "--sequence_length", "64"],
        ["sft", "--data", "{out}/nothing.jsonl", "--output_dir", "{out}/sft", "--lora_rank", "4", "--max_steps", "1"],
        ["plot", "{out}/nothing", "--output", "{out}/p.png"],
    )  # fmt: skip

    def prepare(self, folder: Path) -> None:
        (folder / "words.json").write_text("[]")

    def damage(self, rng: random.Random, folder: Path) -> str:
        places = {"model": EMBEDDED_MODEL, "out": folder, "megatron": FIXTURES / "dense_t2p1_torch"}
        words = [word.format(**places) for word in rng.choice(self.lines)]
        words, what = mutations.mutate_words(rng, words)
        (folder / "words.json").write_text(json.dumps(words))
        return what

    def read(self, folder: Path) -> int:
        words = json.loads((folder / "words.json").read_text())
        with contextlib.chdir(folder) if sys.version_info >= (3, 11) else contextlib.nullcontext():
            return command(words) if words else 0


AREAS: dict[str, Callable[[], Area]] = {
    "headers": Headers, "index": Index, "config": Config, "manifest": Manifest, "megatron": Megatron, "caches": Caches,
    "trainer": TrainerCheckpoint, "data": Data, "tokenizers": Tokenizers, "commands": CommandLines,
}  # fmt: skip
