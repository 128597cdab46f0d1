"""Nemotron-H for transformers: the stack of blocks (blocks.py) with embeddings, and the heads on it.

Modules and parameters are named as in transformers' own `nemotron_h`, so adapters and device maps are interchangeable.

    b batch, l length
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature, unwrap

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .arguments import (
    CACHE_NAME,
    CACHE_NAMES,
    PASSED_BY_CALLERS,
    PASSED_TO_ATTENTION,
    cache_of,
    one_cache,
    refuse_unknown,
)
from .blocks import NemotronHAttention, NemotronHBlock, NemotronHRMSNorm, run_blocks
from .cache import HybridCache, adopt_cache, check_cache, leave_inference_mode
from .configuration_nemotron_h import NemotronHConfig, NemotronHPuzzleConfig
from .forks import prepare_for_forks
from .generation import NemotronHGenerationMixin
from .kernels import check_implementation
from .linear import project
from .loading import (
    Loading,
    ReadWeights,
    check_files,
    check_folder,
    check_loaded,
    drop_absent_mtp,
    file_dtypes,
    loading,
    module_names,
    register_names,
    stored_dtypes,
    warn_of_fresh_head,
    warn_of_other_readers,
)
from .loss import next_token_loss, share_of_items
from .mamba2 import NemotronHMamba2Mixer
from .moe import NemotronHTopkRouter, init_experts, load_balancing_loss
from .mtp import NemotronHMTP
from .padding import Rows, check_mask, read_rows, real_tokens
from .peft_support import allow_adapters_on_out_proj
from .plain import is_watched
from .saving import save_whole
from .ssd import under_func
from .weights import FLOAT32, empty_tensors


class NemotronHPreTrainedModel(PreTrainedModel):
    """What all Nemotron-H models share: abilities, precision, fresh weights, loading and saving."""

    config_class = NemotronHConfig
    config: NemotronHConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NemotronHBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _is_stateful = False  # the cache can be rolled back, so assisted generation is possible
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": NemotronHBlock,
        "attentions": NemotronHAttention,
        "router_logits": OutputRecorder(NemotronHTopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = list(FLOAT32)
    _new_on_load: tuple[str, ...] = ()  # parameters that a checkpoint need not have

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, read_weights: ReadWeights | None = None, **kwargs
    ) -> "NemotronHPreTrainedModel":
        """As transformers', with every tensor in the dtype it is stored in unless `dtype` is given.

        Args:
            read_weights: called with the checkpoint's files; may check them and return the slices to load instead of everything.

        Raises:
            ValueError: for files that are cut short, weights that do not fit the config, NaN or infinity, pickled weights.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: allowed is safetensors alone, pickled weights can run code")
        if pretrained_model_name_or_path is not None:  # None comes with a configuration and a state_dict
            check_folder(pretrained_model_name_or_path, kwargs)
        explicit = kwargs.get("dtype", kwargs.get("torch_dtype"))
        with_info = kwargs.pop("output_loading_info", False)
        token = loading.set(Loading(explicit in (None, "auto"), read_weights))
        try:
            checked = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, **checked})
        finally:
            loading.reset(token)
        if str(kwargs.get("device_map")) == "meta":
            model.to("meta").tie_weights()  # transformers 5.17 makes zeros of it in some processes of FSDP
        if getattr(model, "hf_quantizer", None) is None:
            model._weight_conversions = None  # saving writes the released names, also where others were read
        drop_absent_mtp(model, info)
        ignore = model._keys_to_ignore_on_load_unexpected or []
        accepted = {**info, "mismatched_keys": set()} if kwargs.get("ignore_mismatched_sizes") else info
        new = (*cls._new_on_load, *warn_of_fresh_head(model, info))
        check_loaded(model, accepted, str(pretrained_model_name_or_path), new, ignore)
        return (model, info) if with_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        files = [file for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
        check_files(files, load_config.hf_quantizer is not None)
        wanted = loading.get()
        slices = None if wanted.read_weights is None else wanted.read_weights(files)
        if slices is not None:
            state_dict, checkpoint_files = slices, None
        elif files and load_config.device_map == {"": torch.device("meta")} and load_config.hf_quantizer is None:
            state_dict, checkpoint_files = empty_tensors(files), None
        if wanted.keep_dtypes and load_config.hf_quantizer is None:
            codes = file_dtypes(files) if slices is None else {name: it.get_dtype() for name, it in slices.items()}
            plan = {**stored_dtypes(codes, load_config.dtype), **load_config.dtype_plan}
            load_config = replace(load_config, dtype_plan=plan)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """As transformers', all or nothing: a reader always sees the old files or the new ones (saving.py)."""
        if push_to_hub:
            kwargs.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
        warn_of_other_readers(self.config.get_text_config())
        write = super().save_pretrained
        save_whole(save_directory, lambda folder: write(folder, push_to_hub=push_to_hub, **kwargs))

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """As torch's, also in the names that `save_pretrained` writes, with which transformers' Trainer resumes."""
        return super().load_state_dict(module_names(state_dict, self.state_dict()), strict, assign)

    def named_modules(self, *args, **kwargs):
        """As torch's. PEFT walks the modules before it checks what it may adapt, whenever it was imported."""
        allow_adapters_on_out_proj(NemotronHPreTrainedModel)
        return super().named_modules(*args, **kwargs)

    def set_mamba_implementation(self, implementation: str) -> None:
        """Choose the implementation of the Mamba ops: "auto", "torch", "kernels" or "triton" (ImportError if not installed)."""
        check_implementation(implementation)
        self.config.get_text_config().mamba_implementation = implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # `init` leaves alone every tensor that came from a checkpoint.
        super()._init_weights(module)
        config = self.config.get_text_config()
        init_experts(module, config.initializer_range)
        if isinstance(module, NemotronHMamba2Mixer):
            module.init_state_parameters()
            if config.rescale_prenorm_residual:  # the residual stream sums one output per layer (GPT-2)
                bound = 1 / math.sqrt(module.out_proj.in_features * config.num_hidden_layers)
                init.uniform_(module.out_proj.weight, -bound, bound)


class NemotronHModel(NemotronHPreTrainedModel):
    """Embeddings, the blocks, the final norm."""

    # A longer input without gradients runs through the layers in parts of this many tokens, with a cache: memory for
    # activations stops growing with the prompt. On a CPU small parts are also faster, as they reuse memory that is warm.
    tokens_per_pass = {"cpu": 1024, "cuda": 8192}
    _keys_to_ignore_on_load_unexpected = [r"^mtp\.", r"lm_head"]

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__(config)
        check_implementation(config.mamba_implementation)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            NemotronHBlock(config, index, kind) for index, kind in enumerate(config.layers_block_type)
        )
        self.norm_f = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()
        here = {re.sub(r"\.\d+", ".*", name) for name, _ in [*self.named_modules(), *self.named_parameters()]}
        self._tp_plan = {name: rule for name, rule in self._tp_plan.items() if name in here}

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Run the stack.

        Args:
            input_ids, inputs_embeds: (b, l) or (b, l, hidden); exactly one of them.
            attention_mask: (b, past + l), 0 for padding at any place; or the masks that `create_masks_for_generate` made.
            position_ids: (b, l); the model has no position embedding, they only tell packed documents apart (by restarting).
            cache, past_key_values: a `HybridCache`, or an empty transformers cache, which is fitted to this model; two names
                for one argument, the output has it under the one that the installed transformers uses.
            seq_idx: (b, l) document numbers of packed rows; wins over the next.
            cu_seq_lens_q, cu_seq_lens_k: (documents + 1) offsets of packed documents, as padding-free collators give them.
            max_length_q, max_length_k: their longest document (derived here; accepted from collators).

        Raises:
            TypeError: for an argument that neither this forward nor the blocks know (see arguments.py).
            ValueError: for inputs that do not fit the model, the cache or each other.
        """
        if not torch.compiler.is_compiling():
            prepare_for_forks()
        passed, cache = self._check_arguments(kwargs), one_cache(cache, past_key_values)
        source = self._check_input(input_ids, inputs_embeds)
        batch_size, length = source.shape[:2]
        if cu_seq_lens_k is not None and (cu_seq_lens_q is None or not torch.equal(cu_seq_lens_q, cu_seq_lens_k)):
            raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q: queries and keys must be the same documents")
        check_mask(attention_mask, batch_size, length, cache)
        rows = read_rows(attention_mask, source, position_ids, seq_idx, cu_seq_lens_q)
        cache = self._cache(cache, use_cache, batch_size, packed=rows.documents is not None)
        step = self.pass_length(batch_size, source.device)
        is_long = not torch.compiler.is_compiling() and length > step  # traced lengths are not compared
        if is_long and rows.can_split() and self._may_split(kwargs):
            hidden_states = self._run_in_parts(source, rows, cache, step, passed)
        else:
            embeds = self.embeddings(source) if inputs_embeds is None else source
            hidden_states = self._run(embeds, rows, cache, passed)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def _check_arguments(self, kwargs: dict) -> dict:
        """The further arguments of a forward that the blocks get; a subclass may name its own."""
        passed = {name: value for name, value in kwargs.items() if name not in PASSED_BY_CALLERS}
        if passed:
            refuse_unknown(self, passed, signature(self.layers[0].forward).parameters)
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal=False: allowed is True, a Mamba layer reads its input in one direction")
        return passed | {name: kwargs[name] for name in kwargs if name in PASSED_TO_ATTENTION}

    def pass_length(self, batch_size: int, device: torch.device) -> int:
        """How many tokens of each row run through the layers at once, where an input may run in parts."""
        return max(256, self.tokens_per_pass.get(device.type, 8192) // batch_size)

    def _run(self, hidden_states: Tensor, rows: Rows, cache: Cache | None, kwargs: dict) -> Tensor:
        """All layers over one stretch of tokens: (b, l, hidden) -> (b, l, hidden)."""
        hidden_states = run_blocks(self.layers, self.norm_f, self.config, hidden_states, rows, cache, **kwargs)
        return hidden_states.to(self.norm_f.weight.dtype) if self.config.residual_in_fp32 else hidden_states

    def _run_in_parts(self, source: Tensor, rows: Rows, cache: Cache | None, step: int, kwargs: dict) -> Tensor:
        """`_run` over a long input, `step` tokens at a time, each part continuing from the cache of those before."""
        length = source.shape[1]
        cache = HybridCache(self.config) if cache is None else cache
        hidden_states = None
        for start in range(0, length, step):
            end = min(start + step, length)
            embeds = source[:, start:end]
            embeds = self.embeddings(embeds) if embeds.dim() == 2 else embeds
            part = self._run(embeds, rows.part(start, end), cache, kwargs)
            if hidden_states is None:
                hidden_states = part.new_empty(part.shape[0], length, part.shape[2])
            hidden_states[:, start:end] = part
        return hidden_states

    def _cache(self, cache: Cache | None, use_cache: bool | None, batch_size: int, packed: bool) -> Cache | None:
        """The cache to use: the caller's, a new one if asked for (by default outside training), or none."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and self.layers[0].gradient_checkpointing:
            use_cache, cache = False, None
        if packed:  # later tokens would see all documents of the row
            if cache is not None:
                raise ValueError(
                    "packed rows (several documents in one row) cannot be cached: pass use_cache=False and no cache"
                )
            return None
        if cache is None:
            return HybridCache(self.config) if use_cache else None
        cache = adopt_cache(cache, self.config)
        if not torch.compiler.is_compiling():
            leave_inference_mode(cache)
            check_cache(cache, self.config, batch_size)
        return cache

    def _check_input(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The one of the two that is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        source = input_ids if inputs_embeds is None else inputs_embeds
        if source.dim() != (2 if inputs_embeds is None else 3):
            wanted = "input_ids (batch, length)" if inputs_embeds is None else "inputs_embeds (batch, length, hidden)"
            raise ValueError(f"{wanted} has shape {tuple(source.shape)}")
        if source.shape[1] == 0 or source.shape[0] == 0:
            raise ValueError(f"the prompt is empty: input has shape {tuple(source.shape)}")
        if inputs_embeds is not None and source.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds has width {source.shape[2]}: allowed is hidden_size={self.config.hidden_size}"
            )
        # Checking token ids would wait for the device at every step
        one_token_on_gpu = source.shape[1] == 1 and source.device.type != "cpu"
        unread = torch.compiler.is_compiling() or one_token_on_gpu or source.is_meta or under_func()
        if inputs_embeds is None and not unread:
            low, high = map(int, torch.aminmax(source))
            size = self.embeddings.weight.shape[0] if self.embeddings.weight.numel() else self.config.vocab_size
            if low < 0 or high >= size:
                raise ValueError(
                    f"input_ids has {low if low < 0 else high}: allowed are token ids from 0 to {size - 1}"
                )
        return source

    def _may_split(self, kwargs: dict) -> bool:
        """Whether a long input may run in parts: no gradients, no per-layer outputs asked for, no hooks."""
        wanted = (
            kwargs.get(f"output_{name}", getattr(self.config, f"output_{name}", False))
            for name in self._can_record_outputs
        )
        return not torch.is_grad_enabled() and not any(wanted) and not is_watched(self)


@dataclass
class NemotronHCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output, with the loss of multi-token prediction: mean over its tokens and depths, without gradient."""

    mtp_loss: Tensor | None = None


class NemotronHForCausalLM(NemotronHPreTrainedModel, NemotronHGenerationMixin):
    """The language model: stack, lm_head, loss, generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    skip_logits = False  # what `skip_logits` of a forward is by default; True saves memory where only the loss is read

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__(config)
        self.model = NemotronHModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.num_nextn_predict_layers:
            self.mtp = NemotronHMTP(config)
        self.post_init()

    def post_init(self) -> None:
        """As transformers'; heads of multi-token prediction that the configuration does not name are refused, not ignored."""
        super().post_init()
        ignored = self._keys_to_ignore_on_load_unexpected or ()
        self._keys_to_ignore_on_load_unexpected = {rule for rule in ignored if not rule.startswith("^mtp")}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_from_hidden: Callable[[Tensor, nn.Module], Tensor] | None = None,
        mtp_loss_weight: float = 0.0,
        mtp_steps: int | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> NemotronHCausalLMOutput:
        """Logits, and the next-token loss if there are labels. Arguments not listed are those of `NemotronHModel.forward`.

        Args:
            labels: (b, l) token ids, -100 for no label; shifted here.
            logits_to_keep: make logits for the last n positions only (0: all), or for the positions in this tensor.
            skip_logits: with a loss, compute that alone, without ever holding the logits of the whole batch; the output
                then has none (`output.logits` is None). Default: `model.skip_logits`, which is False.
            num_items_in_batch: divisor of the summed loss, as transformers' Trainer passes it.
            loss_from_hidden: called with (hidden states (b, l, hidden), lm_head), makes a scalar that replaces the
                next-token loss. It runs inside this forward because only here a sharded lm_head has its weight.
            mtp_loss_weight: with labels, add so much of the loss of multi-token prediction (mtp.py), which sees the data's
                labels whatever makes the main loss; the output has it as `mtp_loss`.
            mtp_steps: depths in it; those beyond the ones with weights repeat the last. Default: those with weights.
            shift_labels (in kwargs): (b, l) labels already shifted (sequence parallelism). Trainer would expect every
                argument whose name has "label" in each batch that it evaluates.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = aux_loss = None
        has_labels = labels is not None or shift_labels is not None
        has_loss = has_labels or loss_from_hidden is not None
        logits = None
        if not (has_loss and (self.skip_logits if skip_logits is None else skip_logits)):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = project(self.lm_head, hidden_states[:, kept])
        if loss_from_hidden is not None:
            loss = loss_from_hidden(hidden_states, self.lm_head)
        elif has_labels:
            every = logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
            given, head = (logits, nn.Identity()) if every else (hidden_states, self.lm_head)
            size = self.config.get_text_config().vocab_size
            loss = next_token_loss(given, head, size, labels, num_items_in_batch, shift_labels)
        if outputs.router_logits:
            config = self.config.get_text_config()
            real = real_tokens(attention_mask)
            real = None if real is None else real[:, -hidden_states.shape[1] :].flatten().bool()
            top_k = [config.size("num_experts_per_tok", layer) for layer in config.layers_with("moe")]
            aux_loss = load_balancing_loss(outputs.router_logits, top_k[: len(outputs.router_logits)], real)
            if has_loss:
                share = share_of_items(num_items_in_batch, labels, shift_labels)
                share = share.to(aux_loss.device) if isinstance(share, Tensor) else share
                loss = loss + (config.router_aux_loss_coef * share * aux_loss).to(loss.device)
        mtp_loss = None
        if mtp_loss_weight:
            documents = {name: kwargs.get(name) for name in ("seq_idx", "cu_seq_lens_q")}
            more, mtp_loss = self._mtp_loss(
                hidden_states,
                input_ids,
                labels,
                mtp_steps,
                num_items_in_batch,
                attention_mask,
                position_ids,
                **documents,
            )
            loss = loss + mtp_loss_weight * more
        return NemotronHCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            mtp_loss=mtp_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE_NAME: cache_of(outputs)},
        )

    def _mtp_loss(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        labels: Tensor | None,
        num_steps: int | None,
        num_items: Tensor | int | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        cu_seq_lens_q: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if not self.config.num_nextn_predict_layers:
            raise ValueError("mtp_loss_weight: allowed is 0, the model has no multi-token prediction (add_mtp adds it)")
        if input_ids is None or labels is None:
            raise ValueError(
                "mtp_loss_weight: allowed with input_ids and labels, not with embeddings or shift_labels alone"
            )
        rows = read_rows(attention_mask, hidden_states, position_ids, seq_idx, cu_seq_lens_q)
        embeds, labels = self.model.embeddings(input_ids), labels.to(hidden_states.device)
        return self.mtp.loss(hidden_states, embeds, self.lm_head, labels, rows, num_steps, num_items)


class NemotronHForSequenceClassification(GenericForSequenceClassification, NemotronHPreTrainedModel):
    """The stack with a classification head on the last token that is not padding."""

    _keys_to_ignore_on_load_unexpected = [r"^mtp\.", r"lm_head"]
    _new_on_load = ("score.weight",)

    def __init__(self, config: NemotronHConfig) -> None:
        NemotronHPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = NemotronHModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """As transformers', under both names of the cache; `labels` are (b) classes. Other arguments as `NemotronHModel`'s."""
        named = {CACHE_NAME: one_cache(cache, past_key_values), "labels": labels, "use_cache": use_cache, **kwargs}
        classify = unwrap(GenericForSequenceClassification.forward)  # wrapped, it cannot ask the stack for names
        named |= {"inputs_embeds": inputs_embeds, "return_dict": True}
        return classify(self, input_ids, attention_mask, position_ids, **named)


class NemotronHPuzzleModel(NemotronHModel):
    """NemotronHModel, for files with `block_configs`."""

    config_class = NemotronHPuzzleConfig


class NemotronHPuzzleForCausalLM(NemotronHForCausalLM):
    """NemotronHForCausalLM, for files with `block_configs`."""

    config_class = NemotronHPuzzleConfig


class NemotronHPuzzleForSequenceClassification(NemotronHForSequenceClassification):
    """NemotronHForSequenceClassification, for files with `block_configs`."""

    config_class = NemotronHPuzzleConfig


# transformers asks whether the words `@use_experts_implementation` are in this file; the decorated class is in moe.py.
register_names()

__all__ = [
    "NemotronHForCausalLM",
    "NemotronHForSequenceClassification",
    "NemotronHModel",
    "NemotronHPreTrainedModel",
    "NemotronHPuzzleForCausalLM",
    "NemotronHPuzzleForSequenceClassification",
    "NemotronHPuzzleModel",
]
