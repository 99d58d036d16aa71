"""Which model families work: found by running tiny random models of them, written into docs/families.md.

Every cell is a whole run at 8 bits: quantize with random token ids, save, load, compare the loaded model's logits with those of
transformers' full precision on other ids. A family works, or its weights alone can be quantized (methods that need no text), or
it is refused before any work; the page says why. `python tests/families.py` writes the page, and
`python tests/families.py NAME...` prints the lines of these families. tests/unit/test_families.py runs some of them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

import lowbit
from lowbit.architectures import auto_class

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
METHODS = ("rtn", "gptq", "awq")
LIMIT = 0.1  # error at 8 bits beyond which a result counts as wrong
LINE = 100  # columns

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TWO_KINDS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
STATES = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LLAMA4 = TEXT | {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 64,
    "attention_chunk_size": 16,
}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
GEMMA4 = TEXT | TWO_KINDS | PER_LAYER | {"global_head_dim": 8, "num_kv_shared_layers": 0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4 (text)": ("llama4_text", LLAMA4 | {"interleave_moe_layer_step": 2}),
    "llama4 (images)": (
        "llama4",
        {
            "text_config": LLAMA4,
            "vision_config": IMAGES
            | {
                "intermediate_size": 128,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        TEXT
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "qwen3_vl (images)": (
        "qwen3_vl",
        {
            "text_config": TEXT
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
            "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
            | {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            "image_token_id": 120,
            "video_token_id": 121,
            "vision_start_token_id": 122,
            "vision_end_token_id": 123,
        },
    ),
    "gemma3 (images)": (
        "gemma3",
        {
            "text_config": TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 8},
            "vision_config": IMAGES,
            "mm_tokens_per_image": 4,
            "image_token_index": 127,
            "boi_token_index": 126,
            "eoi_token_index": 125,
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        TEXT
        | PER_LAYER
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 8, "sliding_window": 16}
        | {"layer_types": TWO_KINDS["layer_types"] * 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    ),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4 (shared keys)": (
        "gemma4_text",
        GEMMA4 | {"num_hidden_layers": 4, "layer_types": TWO_KINDS["layer_types"] * 2, "num_kv_shared_layers": 2},
    ),
    "jamba": (
        "jamba",
        TEXT
        | {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    ),
    "bamba": ("bamba", TEXT | STATES | {"attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", TEXT | STATES | {"mamba_d_ssm": 64}),
    "nemotron_h": (
        "nemotron_h",
        TEXT
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "moe"], "mamba_num_heads": 4}
        | {"mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
    ),
    "zamba2": (
        "zamba2",
        TEXT
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 8}
        | {"n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 1, "adapter_rank": 8, "chunk_size": 8},
    ),
    "rwkv": (
        "rwkv",
        {"vocab_size": 128, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
        | {"num_hidden_layers": 7, "context_length": 256},
    ),
    "mamba2": (
        "mamba2",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16}
        | {"state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        TEXT | ROUTED | LATENT | {"n_routed_experts": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "glm4_moe": ("glm4_moe", TEXT | ROUTED | {"first_k_dense_replace": 1}),
    "gpt_oss": ("gpt_oss", TEXT | EXPERTS | TWO_KINDS),
    "minimax": ("minimax", TEXT | EXPERTS | {"layer_types": ["full_attention", "linear_attention"], "block_size": 16}),
    "exaone4": ("exaone4", TEXT | TWO_KINDS),
    "olmo2": ("olmo2", TEXT),
    "cohere2": ("cohere2", TEXT | {"sliding_window": 16}),
    "phi4_multimodal": (
        "phi4_multimodal",
        TEXT
        | {
            "vision_config": IMAGES | {"crop_size": 28},
            "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2}
            | {"ext_pw_out_channel": 32, "nemo_conv_channels": 32, "nemo_final_size": 32, "input_size": 16},
        },
    ),
    "mistral3 (images)": (
        "mistral3",
        {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": IMAGES | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": 127,
            "spatial_merge_size": 1,
        },
    ),
    "ernie4_5": ("ernie4_5", TEXT),
    "lfm2": ("lfm2", TEXT | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_multiple_of": 8}),
    "hunyuan": ("hunyuan_v1_dense", TEXT),
    "jetmoe": ("jetmoe", TEXT | {"num_local_experts": 4, "kv_channels": 8}),
}


def save_model(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Saves a random model of a family and returns it as transformers loads it in float32."""
    torch.manual_seed(0)
    kind, options = FAMILIES[family]
    config = AutoConfig.for_model(kind, **options)
    model = auto_class(config).from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "log" not in name:
                parameter.normal_(0, 0.7 * parameter.shape[-1] ** -0.5)  # enough for blocks to matter to the logits
    model.to(dtype).save_pretrained(directory)
    return auto_class(config).from_pretrained(directory, dtype=torch.float32).eval()


def ids(windows: int, tokens: int, seed: int) -> Tensor:
    """Random token ids, none of them special in any family."""
    return torch.randint(2, 118, (windows, tokens), generator=torch.Generator().manual_seed(seed))


def error_of(method: str, original: Any, model: Path, out: Path, text: bool = True) -> float:
    """The relative error of the logits after a whole run, the median over tokens: some choose other experts by a hair. Raises
    what the run raises before any work.

    text: false for methods that need none.
    """
    begun = False

    def progress(*_: Any) -> None:
        nonlocal begun
        begun = True

    options = {"bits": 8, "group_size": 16}
    try:
        recipe = lowbit.recipe(
            method, **{k: v for k, v in options.items() if k in lowbit.recipes.METHODS[method].options}
        )
        report = lowbit.quantize(model, recipe, ids(3, 24, 1) if text else None, out=out, progress=progress)
    except ValueError as error:
        assert not begun, f"{method}: refused after work had begun: {error}"
        raise
    assert report.coverage > 0.9 and report.layers, method
    x = ids(2, 24, 2)
    with torch.no_grad():
        wanted, found = original(input_ids=x).logits, lowbit.load(out, torch.float32)(input_ids=x).logits
    error = ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item()
    assert error < LIMIT, f"{method}: relative error {error:.3g}"
    return error


def outcome(family: str, methods: tuple[str, ...] = METHODS) -> str:
    """One line: ``works`` with the largest error, ``weights only`` with the reason and the error, ``refused``, or what
    transformers' own model fails with."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        original = save_model(family, root / "model")
        try:
            with torch.no_grad():
                original(input_ids=ids(1, 24, 1))
        except AttributeError as error:
            return f"transformers {transformers.__version__} cannot run it on text itself: {error}"
        try:
            errors = [error_of(method, original, root / "model", root / method) for method in methods]
            return f"works (error {max(errors):.1e})"
        except ValueError as error:
            reason = " ".join(str(error).replace(str(root), "").split())
        try:
            error = error_of("rtn", original, root / "model", root / "weights", text=False)
            return f"weights only (error {error:.1e}): {reason}"
        except ValueError as refusal:
            return f"refused: {' '.join(str(refusal).replace(str(root), '').split())}"


def line(family: str, found: str) -> str:
    """A line of the page, cut to its width."""
    whole = f"* {family}: {found}"
    return whole if len(whole) <= LINE else f"{whole[: LINE - 4].rpartition(' ')[0]} ..."


def page(found: dict[str, str]) -> str:
    return "\n".join(
        [
            "# Which model families work",
            "",
            "Written by `make docs` from whole runs on tiny random models: quantized by rtn, gptq and awq with",
            "text at 8 bits, saved, loaded, and compared with transformers in full precision. *Error* is the",
            "relative error of the logits, the median over tokens. *Weights only* means that methods without",
            "text work (`--calibration none`). *Refused* means before any work.",
            "",
            *(line(family, said) for family, said in found.items()),
            "",
        ]
    )


def main(wanted: list[str]) -> None:
    found = {}
    for family in FAMILIES:
        if not wanted or any(name in family for name in wanted):
            try:
                found[family] = outcome(family)
            except Exception as error:  # to be listed, whatever it is
                if not wanted:
                    raise
                found[family] = f"FAILED: {error!r}"
            print(
                line(family, found[family]) if not wanted else f"{family}: {found[family]}", file=sys.stderr, flush=True
            )
    if not wanted:
        PAGE.write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
