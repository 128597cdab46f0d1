"""What `generate()` needs of the language model: its caches, the masks of a step, and prompts that transformers cannot handle.

b batch, l length
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.masking_utils import create_causal_mask

from .arguments import CACHE_NAME, name_cache, one_cache
from .cache import HybridCache, adopt_cache, sequence_length
from .configuration_nemotron_h import NemotronHConfig
from .decode_graph import DecodeGraph, can_replay
from .padding import find_padding, mask_name, real_tokens, windows_of, within_window
from .speculation import check_drafting, generate_with_mtp

MIN_STATIC_STEP = 64  # tokens; the room of static caches is a multiple of this
# What transformers passes to models that make their own masks; a causal mask without positions needs none of it.
PASSED_FOR_MASKS = ("position_ids", "block_sequence_ids", "token_type_ids", "mm_token_type_ids", "is_first_iteration")
MODES_WITH_FIXED_ROWS = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # beams move rows to other memory


class NemotronHGenerationMixin(GenerationMixin):
    """transformers' `generate()` with `HybridCache`; static caches keep their memory from call to call."""

    _static_cache: HybridCache | None = None  # the last one that generate() made, for its next call
    _static_cache_use: tuple = ()  # what it can be used again for: rows, device, dtype, inference mode
    _previous_max_cache_length = 0  # of the longest static cache that generate() has made

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, num_mtp_tokens: int | None = None, **kwargs):
        """As transformers'; `num_mtp_tokens` are drafted by multi-token prediction for each pass of the model (speculation.py)."""
        if num_mtp_tokens is not None:
            check_drafting(self, num_mtp_tokens, kwargs)
            drafting = {"num_mtp_tokens": num_mtp_tokens, "streamer": kwargs.get("streamer")}
            kwargs["custom_generate"] = functools.partial(generate_with_mtp, **drafting)
        return super().generate(*args, **name_cache(kwargs))

    def _prepare_model_inputs(self, inputs: Tensor | None, bos_token_id: Tensor | None, model_kwargs: dict):
        """As transformers', which fails on a prompt without tokens; `generate()` with no prompt starts from bos."""
        prompt = model_kwargs.get("input_ids") if inputs is None else inputs
        if prompt is not None and prompt.numel() == 0 and "inputs_embeds" not in model_kwargs:
            raise ValueError(f"the prompt is empty: input has shape {tuple(prompt.shape)}")
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict) -> Tensor:
        """As transformers', which puts padding at 0: a token drafted after right padding would start a new document."""
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs).cummax(dim=-1).values

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        """As transformers', with `HybridCache` for its own dynamic and static caches, and a user's cache fitted to the model."""
        if max_cache_length >= 2**31:
            raise ValueError(f"max_length={max_cache_length}: allowed is less than 2**31 tokens")
        kind = generation_config.cache_implementation
        given = model_kwargs.get(CACHE_NAME)
        if given is not None:
            given = model_kwargs[CACHE_NAME] = adopt_cache(given, self.config.get_text_config())
            if generation_mode == GenerationMode.ASSISTED_GENERATION and int(sequence_length(given)):
                # transformers would feed the whole prompt, cached tokens included
                raise ValueError(f"{CACHE_NAME} is not empty: allowed in assisted generation is a new cache, or none")
            if generation_config.prefill_chunk_size is not None and int(sequence_length(given)):
                generation_config.prefill_chunk_size = None  # transformers 5.16 feeds cached tokens again in chunks
        elif kind not in (None, "dynamic", "dynamic_full", "offloaded", "static", "offloaded_static"):
            raise ValueError(f"cache_implementation={kind!r}: allowed are dynamic, offloaded, static, offloaded_static")
        elif generation_config.use_cache is not False:
            if kind == "static" and generation_mode in MODES_WITH_FIXED_ROWS and not generation_config.is_assistant:
                rows = batch_size * (generation_config.num_return_sequences or 1)
                cache = self._reusable_static_cache(rows, self._static_length(max_cache_length, generation_config))
            else:
                length = max_cache_length if kind in ("static", "offloaded_static") else None
                length = length and self._static_length(length, generation_config)
                cache = HybridCache(
                    self.config.get_text_config(), length, offloading=kind in ("offloaded", "offloaded_static")
                )
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs[CACHE_NAME] = cache
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config: GenerationConfig) -> bool:
        """As transformers', and wherever a step can be replayed from a CUDA graph (decode_graph.py): not for beams, which move
        rows to other memory, and not if `disable_compile` or a `compile_config` says otherwise."""
        asked = generation_config.disable_compile or generation_config.compile_config is not None
        beams = (generation_config.num_beams or 1) > 1
        if not asked and not beams and can_replay(self):
            return True
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """A `DecodeGraph` for this call of `generate()`; with a `compile_config`, or where there can be none, torch.compile."""
        if compile_config is None and can_replay(self):
            return DecodeGraph(self.__call__)
        return super().get_compiled_call(compile_config)

    def _static_length(self, needed: int, generation_config: GenerationConfig) -> int:
        """Room of a static cache: what was asked for, or what is needed. Where steps are compiled, that is rounded up by an
        eighth at most, for prompts of many lengths to share few sizes, and never less than before, for a compiled step to
        stay valid."""
        asked = generation_config.max_cache_len
        if not self._compiles(generation_config):
            return max(needed, asked or 0)
        step = max(MIN_STATIC_STEP, 1 << max(0, needed.bit_length() - 4))
        rounded = asked if asked is not None and asked >= needed else min(-(-needed // step) * step, 2**31 - 1)
        self._previous_max_cache_length = max(rounded, self._previous_max_cache_length)
        return self._previous_max_cache_length

    def _compiles(self, generation_config: GenerationConfig) -> bool:
        """Whether steps on a static cache run as a compiled or captured graph, by transformers' rule."""
        config = generation_config.compile_config
        everywhere = config is not None and config._compile_all_devices
        return not generation_config.disable_compile and (self.device.type != "cpu" or everywhere)

    def _reusable_static_cache(self, rows: int, length: int) -> HybridCache:
        """The static cache of the last `generate()`, emptied, if it fits and no caller holds it, else a new one.

        CUDA graphs are captured on the memory of one cache; another one's would have to be captured again.
        """
        use = (rows, self.device, self.dtype, torch.is_inference_mode_enabled())
        kept, self._static_cache = self._static_cache, None
        fits = kept is not None and kept.max_cache_len == length and self._static_cache_use == use
        held_here_alone = object()  # a caller may still have the cache, another thread may be generating with it
        if fits and sys.getrefcount(kept) == sys.getrefcount(held_here_alone):
            kept.reset()
        else:
            del kept  # before the new one takes memory
            kept = HybridCache(self.config.get_text_config(), length)
        self._static_cache, self._static_cache_use = kept, use
        return kept

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> dict:
        """As transformers', which feeds the whole prompt once more if the cache already holds all of it.

        Raises:
            ValueError: if there is no token beyond those in the cache.
        """
        if next_sequence_length is not None and next_sequence_length < 1:
            length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
            raise ValueError(
                f"{CACHE_NAME} holds {length - next_sequence_length} tokens, the prompt has {length}: allowed is a "
                "prompt of all cached tokens and at least one more"
            )
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **name_cache(kwargs)
        )

    @staticmethod
    def create_masks_for_generate(
        config: NemotronHConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> dict[str, Tensor | None]:
        """Both masks of a forward, made outside a compiled step; padding only where there is some.

        Raises:
            TypeError: for an argument that is not known: it might be the cache under a new name.
        """
        for name in kwargs:
            if name not in PASSED_FOR_MASKS:
                raise TypeError(f"create_masks_for_generate() got an unexpected keyword argument {name!r}")
        config = config.get_text_config()  # of a vision-language model, the language model\'s
        length = inputs_embeds.shape[1]
        # generate() adds real tokens only
        padded = length > 1 and find_padding(real_tokens(attention_mask), length) is not None
        cache = one_cache(cache, past_key_values)
        masks = {
            mask_name(window): create_causal_mask(
                config,
                inputs_embeds,
                attention_mask,
                cache,
                and_mask_function=within_window(window, real_tokens(attention_mask), cache),
            )
            for window in windows_of(config)
        }
        return {"full_attention": None, **masks, "linear_attention": attention_mask[:, -length:] if padded else None}
