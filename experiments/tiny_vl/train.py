"""Trains one tiny vision-language model on pictures.py's pictures, and says what it answers on held-out ones.

python pictures.py DATA
python train.py DATA OUT --variant tags --seed 0      goes on where it was stopped
python train.py DATA OUT --all                        every variant with every seed, one after the other

tags            the model: InternViT, tiles with tags, thumbnail, a hybrid language model
no_tags         the same without tile tags
no_thumbnail    the same without the whole picture after the tiles
blind           the same on grey pictures
attention       tags, with a language model of attention and MLP alone, of the same number of parameters
"""

import argparse
import io
import json
import random
import time
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

from nemotron_h_hf import (
    NemotronHVLConfig,
    NemotronHVLForConditionalGeneration,
    NemotronHVLImageProcessor,
    NemotronHVLProcessor,
)

VARIANTS = ("tags", "no_tags", "no_thumbnail", "blind", "attention")
SEEDS = (0, 1, 2)
ORDER = sorted(
    ((v, s) for s in SEEDS for v in VARIANTS),
    key=lambda run: (run[0] not in ("tags", "no_tags") and run[1] > 0, run[1]),
)
STEPS, BATCH, PEAK, SAVE_EVERY, TOWER_STEPS = 900, 32, 4e-3, 100, 1200
TILE = 32
WORDS = "digit in tile read all of how many shapes bar".split()
TEXT = {
    "hidden_size": 64, "hybrid_override_pattern": "M-*-M-", "intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1,
    "chunk_size": 16, "max_position_embeddings": 512, "initializer_range": 0.08,
}  # fmt: skip
ATTENTION = {"hybrid_override_pattern": "*-*-*-", "intermediate_size": 273}
TOWER = {
    "model_type": "internvl_vision", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 192, "image_size": TILE, "patch_size": 8, "layer_scale_init_value": 1.0, "initializer_range": 0.08,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = ORDER if options.all else [(options.variant, options.seed)]
    for variant, seed in runs:
        run(options.data, options.out / f"{variant}-{seed}", variant, seed, options.steps)


def run(data: Path, out: Path, variant: str, seed: int, steps: int) -> None:
    """Train unless it is done, then write OUT/result.json."""
    if (out / "result.json").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    processor = make_processor(variant)
    model = make_model(processor, variant, seed)
    model.model.vision_tower.load_state_dict(pretrained_tower(data, TOWER_STEPS * steps // STEPS))
    seconds = train(model, processor, samples(data, "train"), out, variant, seed, steps)
    accuracy = evaluate(model, processor, samples(data, "held_out"), variant)
    count = sum(weight.numel() for weight in model.parameters())
    result = {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "parameters": count,
        "accuracy": accuracy,
    }
    model.bfloat16().save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


def make_processor(variant: str) -> NemotronHVLProcessor:
    """A tokenizer of whole words, in which every tag has three tokens."""
    numbers = [f"{n:02d}" for n in range(1, 13)]
    pieces = ["<pad>", "<bos>", "<eos>", "<image>", "<Image>", "</Image>", "<tile_", ">", "global_thumbnail", "?", "\n"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*pieces, *numbers, *"0123456789", *WORDS])}))
    pattern = Regex(r"<tile_|global_thumbnail|</?Image>|\d\d|\d|[a-z]+|[?>\n]")
    words.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<image>"],
    )
    pixels = NemotronHVLImageProcessor(
        image_size=TILE, patch_size=8, max_tiles=6, use_thumbnail=variant != "no_thumbnail"
    )
    return NemotronHVLProcessor(
        pixels, tokenizer, use_tile_tags=variant != "no_tags", image_start="<Image>", image_end="</Image>"
    )


def make_model(processor: NemotronHVLProcessor, variant: str, seed: int) -> NemotronHVLForConditionalGeneration:
    torch.manual_seed(seed)
    ids = dict(zip(("pad_token_id", "bos_token_id", "eos_token_id"), range(3)))
    text = {**TEXT, **(ATTENTION if variant == "attention" else {}), **ids, "vocab_size": 64}
    config = NemotronHVLConfig(
        text_config=text, vision_config=TOWER, image_token_id=processor.image_token_id, image_size=TILE, max_tiles=6,
        projector_hidden_size=192, use_thumbnail=variant != "no_thumbnail", use_tile_tags=variant != "no_tags",
    )  # fmt: skip
    return NemotronHVLForConditionalGeneration(config)


def samples(data: Path, split: str) -> list[dict]:
    """Pictures as tiles (the thumbnail last) with their questions; made once and kept beside the pictures."""
    kept = data / f"{split}_tiles.pt"
    if not kept.is_file():
        pixels, made = make_processor("tags").image_processor, []
        for sample in torch.load(data / f"{split}.pt"):
            tiles = pixels(Image.open(io.BytesIO(sample["png"]))).pixel_values
            made.append({"tiles": tiles.half(), "questions": sample["questions"]})
        torch.save(made, kept)
    return torch.load(kept)


def pretrained_tower(data: Path, steps: int) -> dict:
    """The tower after it has learnt to tell digits in single tiles, as InternViT comes trained; made once for all runs."""
    kept = data / "tower.pt"
    if kept.is_file():
        return torch.load(kept)
    torch.manual_seed(0)
    pairs = [pair for row in samples(data, "train") for pair in digits_of(row)]
    tower = AutoModel.from_config(make_model(make_processor("tags"), "tags", 0).config.vision_config)
    head = torch.nn.Linear(tower.config.hidden_size, 10)
    weights = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        picked = random.Random(step).sample(pairs, 128)
        patches = tower(torch.stack([tile for tile, _ in picked]).float()).last_hidden_state[:, 1:]
        loss = torch.nn.functional.cross_entropy(head(patches.mean(1)), torch.tensor([digit for _, digit in picked]))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print("tower", step, round(loss.item(), 3), flush=True)
    torch.save(tower.state_dict(), kept)
    return tower.state_dict()


def digits_of(row: dict) -> list[tuple[torch.Tensor, int]]:
    """The tiles of a canvas of digits, each with what it shows."""
    told = [answer.split() for question, answer in row["questions"] if question == "read all ?"]
    return list(zip(row["tiles"], map(int, told[0]))) if told else []


def train(model, processor, rows: list[dict], out: Path, variant: str, seed: int, steps: int) -> float:
    """AdamW, warm-up and cosine; the order of samples follows from the seed and the step alone. Seconds of all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.05, betas=(0.9, 0.98))
    done, seconds, state = 0, 0.0, out / "state.pt"
    if state.is_file():
        kept = torch.load(state)
        done, seconds = kept["step"], kept["seconds"]
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
    for step in range(done, steps):
        begin = time.perf_counter()
        rng = random.Random(f"{seed}-{step}")
        factor = (
            min(1.0, (step + 1) / 100) * (0.5 + 0.5 * torch.cos(torch.tensor(step / steps * 3.14159)).item()) + 0.01
        )
        for group in optimizer.param_groups:
            group["lr"] = PEAK * factor
        batch = collate(processor, rng.sample(rows, BATCH), variant, rng)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - begin
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(seconds, 1)}
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
        if (step + 1) % SAVE_EVERY == 0:
            kept = {
                "step": step + 1,
                "seconds": seconds,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(kept, state.with_suffix(".part"))
            state.with_suffix(".part").rename(state)
    return round(seconds, 1)


def collate(processor, rows: list[dict], variant: str, rng: random.Random | None = None) -> dict:
    """A batch: picture, then its questions in any order with their answers, of which alone the loss is taken."""
    tiles = [shown(row["tiles"], variant) for row in rows]
    lines, marks = [], []
    for row, own in zip(rows, tiles):
        picture = processor.replace_image_token({"num_tiles": [len(own)]}, 0)
        questions = rng.sample(row["questions"], len(row["questions"])) if rng else row["questions"]
        ids, labels = encode(processor, f"<bos>{picture}"), []
        labels = [-100] * len(ids)
        for question, answer in questions:
            asked, told = encode(processor, question), encode(processor, f"{answer}\n") if rng else []
            ids, labels = ids + asked + told, labels + [-100] * len(asked) + told
        lines.append(ids)
        marks.append(labels)
    width = max(map(len, lines))
    pad = [width - len(line) for line in lines]
    batch = {
        "input_ids": torch.tensor([line + [0] * n for line, n in zip(lines, pad)]),
        "attention_mask": torch.tensor([[1] * len(line) + [0] * n for line, n in zip(lines, pad)]),
        "pixel_values": torch.cat(tiles).float() * (variant != "blind"),
    }
    return {**batch, "labels": torch.tensor([mark + [-100] * n for mark, n in zip(marks, pad)])} if rng else batch


def shown(tiles: torch.Tensor, variant: str) -> torch.Tensor:
    """What the variant sees of the tiles."""
    return tiles[:-1] if variant == "no_thumbnail" and len(tiles) > 1 else tiles


def encode(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def evaluate(model, processor, rows: list[dict], variant: str) -> dict[str, float]:
    """Share of right answers per kind of question; each is asked alone, and answers of one token are read off the logits."""
    model.eval()
    right: dict[str, list[bool]] = {}
    asked = [{**row, "questions": [(q, a)]} for row in rows for q, a in row["questions"] if " " not in a]
    for start in range(0, len(asked), 100):
        part = asked[start : start + 100]
        batch = collate(processor, part, variant)
        last = batch["attention_mask"].sum(1) - 1
        best = model(**batch).logits[torch.arange(len(part)), last].argmax(-1)
        for row, token in zip(part, best.tolist()):
            (question, answer) = row["questions"][0]
            kind = " ".join(word for word in question.split() if word.isalpha())
            right.setdefault(kind, []).append(encode(processor, answer) == [token])
    return {kind: round(sum(found) / len(found), 4) for kind, found in right.items()}


if __name__ == "__main__":
    main()
