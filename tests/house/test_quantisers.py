"""bitsandbytes and Model-Optimizer on a CPU: layers counted, memory, training on four bits, merging. `make test-tools`."""

import copy

import pytest
import torch
from test_sft import write
from tiny import prompt, tiny_model
from tiny_run import read_metrics
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.scripts import merge, sft
from nemotron_h_hf.training.adapters import check_four_bit, four_bit_loading


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_quantises_all_but_lm_head(bits):
    bnb = pytest.importorskip("bitsandbytes")
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    options = four_bit_loading(use_cpu=True) if bits == 4 else {
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": torch.device("cpu")}
    }  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.bfloat16)
    packed = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.bfloat16, **options)
    linears = {name for name, module in plain.named_modules() if type(module) is nn.Linear}
    assert {name for name, module in packed.named_modules() if isinstance(module, kind)} == linears - {"lm_head"}
    assert packed.get_memory_footprint() < (0.55 if bits == 4 else 0.75) * plain.get_memory_footprint()
    ids = torch.arange(3, 40)[None]
    # In evaluation bitsandbytes' CPU kernel wants outputs in multiples of 32, which the embedded model lacks
    with torch.no_grad():
        packed.train()
        exact, rounded = plain(ids).logits.float(), packed(ids).logits.float()
    assert 1e-3 < (exact - rounded).square().mean().sqrt() / exact.std() < 0.5


@pytest.mark.filterwarnings("ignore")
def test_qlora_trains_saves_and_merges(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    flags = [
        "--model", EMBEDDED_MODEL, "--data", write(tmp_path / "data.jsonl", "text", 64), "--lora_rank", "8", "--load_in_4bit",
        "--use_cpu", "true", "--bf16", "true", "--sequence_length", "256", "--per_device_train_batch_size", "1",
        "--max_steps", "12", "--logging_steps", "1", "--learning_rate", "3e-3", "--warmup_tokens", "0",
        "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert sft.main(flags) == 0
    assert "16 of 17 Linear layers are in 4 bits" in capsys.readouterr().err
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]
    assert merge.main([str(tmp_path / "run" / "adapter"), "--output", str(tmp_path / "m")]) == 0
    model, base = (NemotronHForCausalLM.from_pretrained(folder) for folder in (tmp_path / "m", EMBEDDED_MODEL))
    ids = torch.arange(3, 40)[None]
    assert (model(ids).logits - base(ids).logits).abs().max() > 1e-2


def test_a_base_without_layers_in_four_bits_is_an_error():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="load_in_4bit.*none of its"):
        check_four_bit(tiny_model())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", ["dense", "moe", "latent"])
@pytest.mark.parametrize("recipe", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
def test_model_optimizer_quantises_every_linear(recipe, shape):
    mtq = pytest.importorskip("modelopt.torch.quantization")
    model, ids = tiny_model(shape), prompt(2, 21)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        exact = model(ids).logits
    quantised = mtq.quantize(model, copy.deepcopy(getattr(mtq, recipe)), forward_loop=lambda m: m(ids))
    for name in linears:
        layer = quantised.get_submodule(name)
        assert "Quant" in type(layer).__name__, name
        if name != "lm_head":
            assert layer.weight_quantizer.is_enabled and layer.input_quantizer.amax is not None, name
    with torch.no_grad():
        error = (quantised(ids).logits - exact).square().mean().sqrt() / exact.std()
        assert 1e-4 < error < 0.3
        steps = quantised.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert steps.shape == (2, 24)
