"""What the codes of a model's first blocks cost, weights alone: GPTQ here beside llama.cpp's own encoder, in its types.

    python benchmarks/gguf_blocks.py smollm2-135m --calibration valid.txt --text test.txt --presets q4_k_m q2_k \
        --options '{}' '{"refits": 3, "damp": 0.1}' -o results.json

The first blocks get the types of a preset; everything else stays in float32, and so do inputs. Both encoders see the same calibration
text in the original model: GPTQ its Gram matrices, llama.cpp's (``ggml_quantize_chunk``) their diagonal as importance. The KL divergence from
the original is measured in torch on windows of the test text. It costs a tenth of a whole run (gguf_encoders.py), which counts
errors of all blocks and the rounding of inputs in llama.cpp as well.

Needs xllamacpp (``pip install --no-deps xllamacpp``).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gguf
import torch
from llama_cpp_library import encoded, token_windows, write_rows
from torch import Tensor, nn

import lowbit
from lowbit.checkpoints.formats.base import TensorRole
from lowbit.checkpoints.formats.gguf_presets import types_of
from lowbit.layouts.ggml import BlockType
from lowbit.numerics import ClipSearch, Gram, Tokens
from lowbit.solve import Gptq

ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def linears(model: Any, blocks: int) -> dict[str, nn.Linear]:
    """Those of the first blocks, by name."""
    named = ((name, module) for name, module in model.model.layers[:blocks].named_modules())
    return {name: module for name, module in named if isinstance(module, nn.Linear)}


@torch.no_grad()
def grams(model: Any, blocks: int, ids: Tensor) -> dict[str, Tensor]:
    """The Gram matrix of the input of each linear; those that read one input share one."""
    sums: dict[str, Tensor] = {}
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    layers, model.model.layers = model.model.layers, model.model.layers[:blocks]
    found = linears(model, blocks)

    def listen(name: str):
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x_TI = inputs[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x_TI.T @ x_TI

        return hook

    own = [name for name in found if name.rpartition(".")[2] not in first]
    hooks = [found[name].register_forward_pre_hook(listen(name)) for name in own]
    for window in ids:
        model.model(window[None])
    for hook in hooks:
        hook.remove()
    model.model.layers = layers
    shared = {name: name.replace(leaf, first[leaf]) for name in found if (leaf := name.rpartition(".")[2]) in first}
    return sums | {name: sums[other] for name, other in shared.items()}


def theirs(w: Tensor, kind: BlockType, importance: Tensor) -> Tensor:
    """``w`` ``[O, I]`` as llama.cpp's encoder restores it."""
    number = gguf.GGMLQuantizationType[kind.name]
    return torch.from_numpy(gguf.dequantize(encoded(w, number, importance), number))


def ours(w: Tensor, kind: BlockType, gram: Tensor, tokens: int, options: dict[str, Any]) -> Tensor:
    """``w`` as the method gptq with ``options`` restores it."""
    solver = Gptq(**({"fit": ClipSearch(), "order": "group"} | options))
    return solver.solve(w, kind.spec, {Gram(): gram, Tokens(): torch.tensor([tokens])}).q.dequantize()


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> list[Tensor]:
    return [model(window[None]).logits[0].log_softmax(-1) for window in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="of llama's names of modules, in full precision")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--presets", nargs="+", default=["q4_k_m"])
    parser.add_argument("--options", nargs="+", type=json.loads, default=[{}], help="of gptq's solver, as JSON")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=4, help="test windows of 256 tokens")
    parser.add_argument("--grams", type=Path, help="a file that keeps the Gram matrices for further calls")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer: Any = lowbit.load_tokenizer(arguments.model)

    model = lowbit.load(arguments.model, dtype=torch.float32)
    if arguments.grams is not None and arguments.grams.exists():
        gram = torch.load(arguments.grams)
    else:
        gram = grams(
            model,
            arguments.blocks,
            token_windows(tokenizer, arguments.calibration, "calibration", arguments.samples, 512),
        )
        if arguments.grams is not None:
            torch.save(gram, arguments.grams)
    ids, tokens = (
        token_windows(tokenizer, arguments.text, "evaluation", arguments.windows, 256),
        512 * arguments.samples,
    )
    wanted = log_probabilities(model, ids)
    originals = {name: linear.weight.data.clone() for name, linear in linears(model, arguments.blocks).items()}
    config, rows = model.config, []
    roles = [
        TensorRole(f"{block}.{name.partition('.')[2]}", ROLES[name.rpartition(".")[2]], block, w.shape[1])
        for block in range(config.num_hidden_layers)
        for name, w in originals.items()
        if name.startswith("0.")
    ]
    for preset in arguments.presets:
        types = types_of(preset, roles, config.num_attention_heads // config.num_key_value_heads, tied=True)
        base = None
        for options in (None, *arguments.options):
            started = time.process_time()
            for name, linear in linears(model, arguments.blocks).items():
                w, kind = originals[name], types[name]
                if options is None:
                    linear.weight.data = theirs(w, kind, gram[name].diagonal() / tokens)
                else:
                    linear.weight.data = ours(w, kind, gram[name], tokens, options)
            seconds, found = time.process_time() - started, log_probabilities(model, ids)
            kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(wanted, found, strict=True)]).mean().item()
            base = kl if base is None else base
            row = {"preset": preset, "encoder": "llama.cpp" if options is None else "gptq", "options": options or {}}
            rows.append(row | {"kl": kl, "ratio": kl / base, "processor seconds": round(seconds, 1)})
            print(json.dumps(rows[-1]), flush=True)
    write_rows(arguments.out, rows, blocks=arguments.blocks, samples=arguments.samples, windows=arguments.windows)


if __name__ == "__main__":
    main()
