"""Self-speculation: multi-token prediction drafts, the model verifies. `generate(..., num_mtp_tokens=k)`.

One pass of the model reads a row's last token and k drafts, and gives its own choice after each of them. Drafts are kept
up to the first that differs, and one more token is the model's (arXiv 2211.17192). Greedy text is therefore what the model
writes alone. Where it samples, a draft of probability q is kept with probability p / q, and what replaces it is drawn from
the rest of p: tokens have the model's distribution p.

Each depth's cache is filled with the verified tokens and the model's hidden states for them. Beyond the first draft, what
the depth before made stands for a hidden state, as in vLLM.

Rows keep different numbers of drafts. What all of them reject is removed from the cache, the rest becomes padding there.

    r rows still being written, l new columns of the cache, k drafts
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import StaticCache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from .arguments import CACHE_NAME
from .cache import RECORDED_TOKENS
from .linear import project
from .padding import read_rows

COLUMNS_AT_ONCE = 1024  # of a prompt, that a depth reads
OTHER_LOOPS = ("assistant_model", "custom_generate", "synced_gpus")
NOT_GIVEN_BACK = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., num_mtp_tokens=k, return_dict_in_generate=True)` returns; the cache only for a single row.

    acceptance_by_depth: k shares, of the steps in which the draft of each depth was kept.
    acceptance_rate: the share of all drafts that was kept.
    tokens_per_step: tokens that a row gains by one pass of the model over it, 1 to k + 1.
    tokens_per_second: of all rows together; the pass over the prompt does not count.
    """

    acceptance_by_depth: tuple[float, ...] | None = None
    acceptance_rate: float | None = None
    tokens_per_step: float | None = None
    tokens_per_second: float | None = None


def check_drafting(model: PreTrainedModel, num_mtp_tokens: int, arguments: Mapping) -> None:
    """Refuse what drafting cannot do, before anything runs.

    Raises:
        ValueError: for a number below 1, a model without multi-token prediction, or another kind of drafting as well.
    """
    is_number = isinstance(num_mtp_tokens, int) and not isinstance(num_mtp_tokens, bool)
    if not is_number or not 1 <= num_mtp_tokens < RECORDED_TOKENS:  # what the cache can take back
        raise ValueError(
            f"num_mtp_tokens={num_mtp_tokens!r}: allowed is 1 to {RECORDED_TOKENS - 1}, or None for plain generation"
        )
    if not model.config.get_text_config().num_nextn_predict_layers:
        raise ValueError(
            f"num_mtp_tokens={num_mtp_tokens}: allowed is None, the model has no multi-token prediction "
            "(num_nextn_predict_layers=0)"
        )
    for name in OTHER_LOOPS:
        if arguments.get(name):
            raise ValueError(f"{name} together with num_mtp_tokens={num_mtp_tokens}: allowed is one of them")


def generate_with_mtp(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_mtp_tokens: int = 1,
    streamer: BaseStreamer | None = None,
    tokenizer: object = None,
    **model_kwargs,
) -> MTPGenerateOutput | Tensor:
    """The loop that `generate` calls in place of its own, after it has prepared everything."""
    _check_settings(generation_config, model_kwargs, len(input_ids))
    run = SelfSpeculation(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    verified = run.read_prompt(input_ids, model_kwargs)
    began, num_read = time.perf_counter(), sum(map(len, run.texts))
    while run.rows:
        drafts, probabilities = run.draft(*verified, num_mtp_tokens)
        verified = run.verify(drafts, probabilities)
    seconds, num_written = time.perf_counter() - began, sum(map(len, run.texts)) - num_read
    if streamer is not None:
        streamer.end()
    sequences = torch.nn.utils.rnn.pad_sequence(run.texts, batch_first=True, padding_value=run.pad)
    if not generation_config.return_dict_in_generate:
        return sequences
    kept = [sum(number > depth for number in run.num_kept) for depth in range(num_mtp_tokens)]
    steps = max(1, len(run.num_kept))
    return MTPGenerateOutput(
        sequences=sequences,
        acceptance_by_depth=tuple(number / steps for number in kept),
        acceptance_rate=sum(kept) / max(1, run.num_drafts),
        tokens_per_step=num_written / steps,
        tokens_per_second=num_written / max(seconds, 1e-9),
        **{CACHE_NAME: run.cache if len(input_ids) == 1 else None},
    )


def _check_settings(config: GenerationConfig, model_kwargs: Mapping, num_rows: int) -> None:
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"num_mtp_tokens with {config.get_generation_mode().value}: allowed are greedy search and sampling, without "
            "beams and without another kind of drafting"
        )
    for name in NOT_GIVEN_BACK:
        if getattr(config, name):
            raise ValueError(f"{name}=True with num_mtp_tokens: allowed is False")
    cache = model_kwargs.get(CACHE_NAME)
    if cache is None or isinstance(cache, StaticCache):
        raise ValueError("num_mtp_tokens needs a cache that grows: allowed is use_cache=True without a static cache")
    if num_rows > 1 and int(cache.get_seq_length()):
        raise ValueError(f"num_mtp_tokens with a {CACHE_NAME} that is not empty: allowed is one row, not {num_rows}")


class SelfSpeculation:
    """The state of one `generate`: texts, caches, which rows go on, how often drafts were kept."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        self.model, self.mtp, self.streamer = model, model.mtp, streamer
        self.process, self.stops, self.samples = logits_processor, stopping_criteria, generation_config.do_sample
        self.max_length = generation_config.max_length
        pad = generation_config.pad_token_id
        self.pad = 0 if pad is None else pad  # without an end there is nothing to pad
        self.texts = list(input_ids.to(model.device))  # of all rows, prompts included
        self.rows = list(range(len(input_ids)))  # those that go on, by number; all tensors below have a row for each
        self.mask: Tensor | None = None  # (r, columns of the cache), 0 for padding; None for a single row without any
        self.depth_caches = [self.mtp.new_cache() for _ in range(self.mtp.num_depths)]
        self.num_kept: list[int] = []  # drafts, by step and row
        self.num_drafts = 0

    # A step

    def read_prompt(self, input_ids: Tensor, model_kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
        """The first token of each row; returns what `draft` reads."""
        self.cache, prompt = model_kwargs[CACHE_NAME], model_kwargs.get("inputs_embeds")
        self.skipped = int(self.cache.get_seq_length())  # columns that no depth has seen
        length = (input_ids if prompt is None else prompt).shape[1]
        inputs = self.model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=length - self.skipped if self.skipped else None,
            is_first_iteration=True,
            **model_kwargs,
        )
        for name in ("logits_to_keep", "mm_token_type_ids"):
            inputs.pop(name, None)
        hidden = self.model.model(**inputs).last_hidden_state
        self.mask = model_kwargs.get("attention_mask")
        if self.mask is None and len(self.rows) > 1:
            self.mask = torch.ones(
                len(self.rows), self.skipped + hidden.shape[1], dtype=torch.long, device=hidden.device
            )
        none = hidden.new_empty(len(hidden), 0, dtype=torch.long)
        tokens, _ = self._pick(hidden[:, -1:], none)
        embeds = inputs.get("inputs_embeds")
        embeds = self._embed(inputs["input_ids"]) if embeds is None else embeds
        embeds = torch.cat([embeds[:, 1:], self._embed(tokens)], dim=1)
        last = torch.full((len(self.rows),), hidden.shape[1] - 1, device=hidden.device)
        going = self._write([[token] for token in tokens.flatten().tolist()])
        for cache in (self.cache, *self.depth_caches):
            cache.activate_past_recording()
        self._keep(going)
        return hidden[going], embeds[going], last[going]

    def draft(self, hidden: Tensor, embeds: Tensor, last: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Drafts (r, k) and, where tokens are sampled, the probabilities (r, k, vocab) they were drawn by.

        Args:
            hidden, embeds: (r, l, hidden) of the model for columns new to the cache, and of the tokens that follow them.
            last: (r) the column of each row's last verified token.
            most: k, which is less near the end of the longest text that is allowed.
        """
        before = self._fill(hidden, embeds).gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))
        room = self.max_length - min(len(self.texts[row]) for row in self.rows)
        count, removed = min(most, room - 1), [0] * len(self.depth_caches)
        drafts, probabilities = embeds.new_empty(len(self.rows), 0, dtype=torch.long), []
        for depth in range(count):
            tokens, drawn_by = self._pick(before, drafts)
            drafts, probabilities = torch.cat([drafts, tokens], dim=1), [*probabilities, drawn_by]
            if depth + 1 < count:
                own = min(depth + 1, len(removed) - 1)
                removed[own] += 1
                before = self._run_depth(before, self._embed(tokens), own, removed[own])
        for cache, number in zip(self.depth_caches, removed):
            if int(cache.get_seq_length()):  # MLPs and experts keep nothing
                cache.crop(-number)
        return drafts, torch.cat(probabilities, 1) if count else hidden.new_empty(len(drafts), 0, 1)

    def verify(self, drafts: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write what the model accepts and its own next token; returns what `draft` reads."""
        count, newest = drafts.shape[1], torch.stack([self.texts[row][-1:] for row in self.rows])
        mask = None if self.mask is None else F.pad(self.mask, (0, count + 1), value=1)
        given = {"attention_mask": mask, CACHE_NAME: self.cache, "use_cache": True}
        embeds = self._embed(torch.cat([newest, drafts], dim=1))  # of ids a vision model would ask for their images
        hidden = self.model.model(inputs_embeds=embeds, **given).last_hidden_state
        scores = self._scores(project(self.model.lm_head, hidden), drafts)
        kept, tokens = accept(scores, drafts, probabilities if self.samples else None)
        following = F.pad(drafts, (0, 1)).scatter(1, kept[:, None], tokens)  # (r, k + 1)
        self.num_kept += kept.tolist()
        self.num_drafts += drafts.numel()
        lengths = [len(self.texts[row]) for row in self.rows]
        going = self._write([row[: n + 1] for row, n in zip(following.tolist(), kept.tolist())])
        written = torch.tensor([len(self.texts[row]) - length for row, length in zip(self.rows, lengths)])
        columns = int(written.max())
        self.cache.crop_rows(count + 1 - written)
        if self.mask is not None:
            real = torch.arange(columns) < written[:, None]
            self.mask = torch.cat([self.mask, real.to(self.mask)], dim=1)
        self._keep(going)
        return hidden[going, :columns], self._embed(following[going, :columns]), kept[going]

    # Parts of a step

    def _scores(self, logits: Tensor, drafts: Tensor) -> Tensor:
        """Logits (r, n, vocab) after each of the last n - 1 drafts (r, k) and before them, as `generate` changes them."""
        scores = logits.float()
        if not self.process:
            return scores
        by_length: dict[int, list[int]] = {}  # one call for all rows of a length
        for place, row in enumerate(self.rows):
            by_length.setdefault(len(self.texts[row]), []).append(place)
        first = drafts.shape[1] - scores.shape[1] + 1
        for places in by_length.values():
            rows = [self.rows[place] for place in places]
            texts = torch.cat([torch.stack([self.texts[row] for row in rows]), drafts[places]], dim=1)
            # A processor may know something of every row: it always sees as many as at the start
            copies = torch.zeros(len(self.texts), dtype=torch.long)
            copies[rows] = torch.arange(len(rows))
            for column in range(scores.shape[1]):
                seen = texts[copies, : texts.shape[1] - drafts.shape[1] + first + column]
                scores[places, column] = self.process(seen, scores[places, column][copies])[rows]
        return scores

    def _pick(self, hidden: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """A token (r, 1) after the text and drafts, from hidden states (r, 1, hidden), and the probabilities (r, 1, vocab)."""
        scores = self._scores(project(self.model.lm_head, hidden), drafts)
        if not self.samples:
            return scores.argmax(-1), scores
        probabilities = scores.softmax(-1)
        return torch.multinomial(probabilities[:, 0], 1), probabilities

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.model.get_input_embeddings()
        return table(tokens.clamp(max=table.num_embeddings - 1))  # the token that stands for an image may be past it

    def _fill(self, hidden: Tensor, embeds: Tensor) -> Tensor:
        """Let every depth read verified columns; what the first one makes of them."""
        made = []
        for start in range(0, hidden.shape[1], COLUMNS_AT_ONCE):
            part = slice(start, start + COLUMNS_AT_ONCE)
            hidden_part, embeds_part = hidden[:, part], embeds[:, part]
            hidden_of = [self._run_depth(hidden_part, embeds_part, d, start + hidden_part.shape[1] - hidden.shape[1])
                         for d in range(len(self.depth_caches))]  # fmt: skip
            made.append(hidden_of[0])
        for cache in self.depth_caches:
            cache.crop(0)
        return torch.cat(made, dim=1)

    def _run_depth(self, hidden: Tensor, embeds: Tensor, depth: int, beyond: int) -> Tensor:
        """One depth over columns that end `beyond` the mask (before its end if negative)."""
        mask = None if self.mask is None else F.pad(self.mask[:, self.skipped :], (0, beyond), value=1)
        return self.mtp(hidden, embeds, read_rows(mask, embeds), depth, self.depth_caches[depth])

    def _write(self, new: list[list[int]]) -> list[int]:
        """Add tokens to each row, up to one at which it stops; the rows that go on, by place among `rows`."""
        going = []
        for place, (row, tokens) in enumerate(zip(self.rows, new)):
            length, done = len(self.texts[row]), False
            text = torch.cat([self.texts[row], self.texts[row].new_tensor(tokens)])
            for end in range(length + 1, len(text) + 1):
                done = bool(self.stops(text[None, :end], None))
                if done:
                    break
            self.texts[row] = text[:end]
            if self.streamer is not None:
                self.streamer.put(text[length:end].cpu())
            going += [] if done else [place]
        return going

    def _keep(self, going: list[int]) -> None:
        """Go on with these rows alone."""
        if len(going) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in going]
        if not going:
            return
        self.mask = self.mask[going]
        self.cache.crop(0)
        self.cache.keep(going)
        for cache in self.depth_caches:
            if int(cache.get_seq_length()):
                cache.keep(going)


def accept(scores: Tensor, drafts: Tensor, probabilities: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many drafts (r) a row keeps, and the token (r, 1) after them.

    Args:
        scores: (r, k + 1, vocab) the model's after the text and each draft.
        drafts: (r, k).
        probabilities: (r, k, vocab) that they were drawn by; None for greedy search.
    """
    if probabilities is None:
        chosen = scores.argmax(-1)
        kept = (chosen[:, :-1] == drafts).long().cumprod(1).sum(1)
        return kept, chosen.gather(1, kept[:, None])
    wanted = scores.softmax(-1)
    p, q = (of[:, : drafts.shape[1]].gather(2, drafts[..., None])[..., 0] for of in (wanted, probabilities))
    kept = (torch.rand_like(p) * q < p).long().cumprod(1).sum(1)
    place = kept[:, None, None].expand(-1, 1, scores.shape[2])
    wanted = wanted.gather(1, place)[:, 0]
    drawn = F.pad(probabilities, (0, wanted.shape[-1] - probabilities.shape[-1], 0, 1)).gather(1, place)[:, 0]
    rest = (wanted - drawn).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, wanted)  # equal but for rounding
    return kept, torch.multinomial(rest, 1)
