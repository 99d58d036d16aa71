"""Makes the native checkpoints in this folder, and what is expected of them. README.md says which code made which.

    PYTHONPATH=SOURCE/src python tests/data/make_native.py NAME DIRECTORY

writes ``DIRECTORY/NAME``, ``NAME.expected.safetensors`` and ``NAME.expected.json`` with the lowbit in SOURCE, which is a
checkout of the commit that README.md names, or any later one. Only names that the named commit has are used for each
checkpoint. What is computed differs from commit to commit, so only the named one gives the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["LOWBIT_KERNELS"] = "reference"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import lowbit

try:
    from lowbit.checkpoints.native import save
except ImportError:  # the commits that wrote the older data
    from lowbit.formats.native import save
from lowbit.modules import ActSpec
from lowbit.numerics import NF4, Block, Float, Int, PerChannel, PerGroup, PerTensor, Spec, to_dict

from digests import model_digests

VOCABULARY = 96
Recipe = Mapping[str, Any]


def method(name: str, **options: Any) -> Recipe:
    return {"method": name, "options": options}


def spelled_out(recipe: Any) -> Recipe:
    """With rules, steps and feed at the top, as every version reads them."""
    if hasattr(recipe, "to_dict"):  # the commits before recipes were dataclasses
        return recipe.to_dict()
    attention = recipe.scheme.attention
    return {
        "name": recipe.name,
        "scheme": to_dict(recipe.scheme.rules),
        "steps": to_dict(recipe.steps),
        "feed": recipe.feed,
        "seed": recipe.seed,
        **({} if attention is None else {"attention": to_dict(attention)}),
    }


def nearest(weight: Spec, activation: ActSpec | None = None) -> Recipe:
    """Round to nearest in a format that no method of the time has."""
    rule = {"match": "*", "weight": to_dict(weight)}
    steps = [{"type": "Solve", "solver": {"type": "Nearest"}}]
    if activation is not None:
        rule["activation"] = to_dict(activation)
        steps = [{"type": "SetActivationRange"}, *steps] if activation.static else steps
    return {"name": "nearest", "scheme": [rule], "steps": steps}


# The models


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose norms have outlier channels, whose biases are not zero, and whose blocks matter to the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "bias" in name:
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
                parameter[::16] *= 8
            elif "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.mul_(3)
    return model.to(dtype)


def random_ids(windows: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (windows, tokens), generator=torch.Generator().manual_seed(seed))


def pack(model: PreTrainedModel, recipes: Mapping[str, Recipe]) -> PreTrainedModel:
    """Puts a packed layer in the place of each named linear, quantized alone for its input in the original model."""
    linears = {name: model.get_submodule(name) for name in recipes}
    inputs: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].detach().flatten(0, -2)})
        )
        for name, linear in linears.items()
    ]
    ids = random_ids(8, 32, seed=1)
    model(ids, labels=ids).loss.backward()
    for hook in hooks:
        hook.remove()
    for name, recipe in recipes.items():
        old = linears[name]
        conv = type(old).__name__ == "Conv1D"  # holds [in, out]
        weight, gradient = (t.T if conv else t for t in (old.weight.detach(), old.weight.grad))
        linear = nn.Linear(*reversed(weight.shape), bias=old.bias is not None)
        linear.load_state_dict({"weight": weight} | ({} if old.bias is None else {"bias": old.bias.detach()}))
        fisher = (gradient.square(),) if recipe.get("method") == "squeezellm" else ()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, lowbit.quantize_linear(linear, inputs[name], recipe, *fisher))
    return model


def names(pattern: str, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """``recipes`` with full names: ``0.mlp.up_proj`` becomes ``pattern`` with its first part and the rest."""
    return {pattern.format(*short.split(".", 1)): recipe for short, recipe in recipes.items()}


# The checkpoints


def native_v1(directory: Path) -> None:
    """Plain layers; entries of transforms are shapes alone."""
    model = random_model(Qwen2Config(**SIZES, tie_word_embeddings=True))
    affine, zeros = Spec(Int(8), PerGroup(16)), Spec(Int(3, zero="real"), PerGroup(16), Spec(Int(4), PerGroup(16)))
    static = ActSpec(Spec(Int(8), PerTensor(), scale_dtype="float32"), static=True)
    recipes = {
        "0.self_attn.q_proj": method("gptq", bits=4, group_size=16, act_order=True),  # gathers its input
        "0.self_attn.k_proj": method("rtn", bits=4, group_size=16),
        "0.self_attn.v_proj": method("rtn", bits=3, group_size=12),  # the last group of a row is shorter
        "0.self_attn.o_proj": method("smoothquant", level="O3"),  # scales its input; one static range
        "0.mlp.gate_proj": nearest(Spec(NF4, PerGroup(16), affine)),  # quantized scales
        "0.mlp.up_proj": method("omniquant", bits=4, activation_bits=8, epochs=2),  # shifts, and gains a bias
        "0.mlp.down_proj": method("awq", bits=4, group_size=16),
        "1.self_attn.q_proj": method("rtn", bits=8, group_size=None, symmetric=True, activation_bits=8),
        "1.self_attn.k_proj": nearest(Spec(Float(4, 3, "fn"), PerChannel(), scale_dtype="bfloat16")),
        "1.self_attn.v_proj": method("rtn", bits=2, group_size=8, symmetric=True, mse=True),
        "1.self_attn.o_proj": nearest(Spec(Int(5), Block(8, 12), scale_dtype="float32")),
        "1.mlp.gate_proj": nearest(zeros),  # scales and zero points quantized
        "1.mlp.up_proj": nearest(Spec(Int(6, zero="real"), PerGroup(32)), static),
        "1.mlp.down_proj": method("rtn", bits=1, group_size=16),
    }
    save(pack(model, names("model.layers.{}.{}", recipes)), directory)


def native_v1_formats(directory: Path) -> None:
    """What came into version 1 later, in a model of another dtype whose linears hold [in, out]."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_inner": 48, "n_layer": 4, "n_head": 4, "n_positions": 64}
    model = random_model(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    recipes = {
        "0.attn.c_attn": method("nf4", block=64, double_quant=True),  # across rows; scales centred
        "0.attn.c_proj": method("mxfp4", activation_bits=4),  # scales are powers of two
        "0.mlp.c_fc": method("nvfp4", activation_bits=4),
        "0.mlp.c_proj": method("llm-fp4", activation_bits=8),  # static, a scale for each input channel
        "1.attn.c_attn": method("olive"),  # pairs of outlier and victim
        "1.attn.c_proj": method("zeroquant", bits=4, groups=6, distil=False),  # bands of rows, every code used
        "1.mlp.c_fc": method("llm-int8", threshold=3.0),
        "1.mlp.c_proj": method("hqq", bits=4, group_size=16),
        "2.attn.c_attn": method("fp8", activations="static"),
        "2.attn.c_proj": method("lut-gemm", bits=2, group_size=16, offset=True),
        "2.mlp.c_fc": method("squeezellm", bits=3, sparsity=0, sensitive=0),
        "2.mlp.c_proj": method("rptq", bits=4, activation_bits=8, clusters=4),  # static, a range for each cluster
        "3.attn.c_attn": method("quip", bits=4, transform="none", balance=True),  # scales its input, in float16
        "3.attn.c_proj": method("quarot", bits=4, activation_bits=8, solver="nearest"),  # rotates its input
        "3.mlp.c_fc": method("mxfp4", activation_bits=None),
        "3.mlp.c_proj": method("outlier-suppression-plus", bits=6, activation_bits=8),
    }
    save(pack(model, names("transformer.h.{}.{}", recipes)).to(torch.bfloat16), directory)


def native_v2(directory: Path) -> None:
    """Side terms and transforms of the output, in a mixture of experts."""
    from lowbit.architectures.experts import unfuse_experts

    model = random_model(MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1))
    unfuse_experts(model)
    recipes = {
        "0.self_attn.q_proj": method("spqr", bits=3, group_size=8),  # an order of columns, and single weights
        "0.self_attn.k_proj": method("spqr", bits=3, group_size=8, order="group", simplified=True),
        "0.self_attn.v_proj": method("owq", bits=3, kept_columns=2),
        "0.self_attn.o_proj": method("owq", bits=3, group_size=16, kept_columns=1),
        "0.mlp.experts.0.gate_proj": method("squeezellm", bits=3),
        "0.mlp.experts.0.up_proj": method("squeezellm", bits=2, group_size=16, sparsity=0.01),
        "0.mlp.experts.0.down_proj": method("lut-gemm", bits=3, group_size=16),
        "0.mlp.experts.1.gate_proj": method("quip", bits=2),
        "0.mlp.experts.1.up_proj": method("quip", bits=3, transform="kronecker", balance=True),
        "0.mlp.experts.1.down_proj": method("quip", bits=2, group_size=16),
        "1.self_attn.q_proj": method("awq+quip", bits=3, group_size=16),  # scales, then rotates
        "1.self_attn.k_proj": method("nf4", block=16),
        "1.self_attn.v_proj": method("hqq", bits=4, group_size=16),
        "1.self_attn.o_proj": method("awq+owq", bits=3, kept_columns=3),
        "1.mlp.experts.0.gate_proj": method("awq+spqr", bits=3, group_size=16, clip=False),
        "1.mlp.experts.0.up_proj": method("gptq", bits=4, group_size=16, act_order=True),
        "1.mlp.experts.0.down_proj": method("lut-gemm", bits=2, group_size=None, offset=True),
        "1.mlp.experts.1.gate_proj": method("quip", bits=4, transform="kronecker"),
        # The other two linears of this expert stay as they are.
    }
    save(pack(model, names("model.layers.{}.{}", recipes)), directory)


def run(directory: Path, config: PretrainedConfig, recipe: Recipe) -> None:
    """A whole run, as a user makes one; its card and report are no part of the format."""
    with TemporaryDirectory() as original:
        random_model(config).save_pretrained(original)
        lowbit.quantize(original, recipe, random_ids(8, 32, seed=1), out=directory)
    for name in ("README.md", "lowbit-report.json"):
        (directory / name).unlink()
    config_json = json.loads((directory / "config.json").read_text())
    config_json.pop("_name_or_path", None)  # of the temporary directory
    (directory / "config.json").write_text(json.dumps(config_json, indent=2, sort_keys=True) + "\n")


def native_v2_low_rank(directory: Path) -> None:
    """Channels split and merged, and corrections of rank 2, whose sums of two products are exact."""
    recipe = method("qllm", bits=4, activation_bits=8, group_size=16, rank=2, epochs=4, lr=0.02)
    run(directory, LlamaConfig(**SIZES, tie_word_embeddings=True), recipe)


def native_v3(directory: Path) -> None:
    """A rotated residual stream, and attention's operands quantized for each token."""
    recipe = spelled_out(lowbit.recipe("quarot", bits=4, activation_bits=8, group_size=16))
    attention = {"type": "AttentionSpec", "bits": 8, "probability_bits": 8}
    run(directory, LlamaConfig(**SIZES, tie_word_embeddings=False), {**recipe, "attention": attention})


def native_v3_static(directory: Path) -> None:
    """A rotated residual stream, and static ranges of clusters for attention's operands and for inputs."""
    recipe = spelled_out(
        lowbit.recipe("rptq", bits=4, activation_bits=8, clusters=4, attention_bits=8, head_clusters=3)
    )
    steps = [{"type": "RotateResidual"}, *recipe["steps"]]
    run(directory, LlamaConfig(**SIZES, tie_word_embeddings=True), {**recipe, "name": "rotated rptq", "steps": steps})


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "native-v1": native_v1,
    "native-v1-formats": native_v1_formats,
    "native-v2": native_v2,
    "native-v2-low-rank": native_v2_low_rank,
    "native-v3": native_v3,
    "native-v3-static": native_v3_static,
}


# What is expected of them


@torch.no_grad()
def steady_ids(model: PreTrainedModel) -> Tensor:
    """Ids under which no rounding of an input and no choice of an expert is near a tie.

    The order of a float32 sum differs from processor to processor. Where an input lies near the middle of two codes, that
    flips a code and moves the logits by much more than the sum's error. With these ids, embeddings that are off by a
    millionth, which is more than such errors are, move no logit by more than a hundred-thousandth of the largest.
    """
    for seed in range(1000):
        ids = random_ids(2, 8, seed)
        logits = model(ids).logits
        moved = max(float((disturbed(model, ids, i) - logits).abs().max()) for i in range(20))
        if moved < 1e-5 * float(logits.abs().max()):
            print(f"ids of seed {seed}: logits of up to {float(logits.abs().max()):.3g} move by {moved:.2g}")
            return ids
    raise SystemExit("every sequence tried has a rounding near a tie")


def disturbed(model: PreTrainedModel, ids: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def noise(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return embedded * (1 + 1e-6 * torch.randn(embedded.shape, generator=generator))

    hook = model.get_input_embeddings().register_forward_hook(noise)
    try:
        return model(ids).logits
    finally:
        hook.remove()


@torch.no_grad()
def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with torch.enable_grad():
        CHECKPOINTS[name](folder / name)
    model = lowbit.load(folder / name, torch.float32)
    ids = steady_ids(model)
    save_file({"ids": ids, "logits": model(ids).logits.contiguous()}, folder / f"{name}.expected.safetensors")
    (folder / f"{name}.expected.json").write_text(json.dumps(model_digests(model), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
