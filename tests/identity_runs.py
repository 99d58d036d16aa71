"""The runs of `make identity`: plain data that an older and a newer lowbit both understand.

A run is a dictionary:

* ``name``: unique; what ``--only`` looks for.
* ``model``: a key of :data:`MODELS`, or :data:`LINEAR` for one linear layer by itself (:func:`lowbit.quantize_linear`).
* ``recipe``: the data of a recipe file, or the name of a built-in recipe file. :func:`spelled` is the one place that knows
  how the lowbit under test spells it.
* ``windows``, ``tokens``: the calibration windows; ``windows`` None: a run without data.
* ``settings``: more arguments of :func:`lowbit.quantize`.
* ``interrupt``: the run is stopped once and then repeated; ``after``: so many blocks, or "blocks" for the first progress
  after the last block; ``by``: "exception" in the progress callback, or "kill" (SIGKILL).
* ``same_as``: the name of another run that must write the same bytes.

Options are chosen so that the work is done, and not only started: several epochs, grids of several values, more than
one group in every row, channels that stand out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

Run = dict[str, Any]

VOCABULARY = 128
LINEAR = "linear"
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = _COMMON | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _PLAIN | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT2 = _COMMON | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 64}
_GEMMA3 = _GROUPED | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_OPT = _PLAIN | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}

# model type of transformers, options of its config, dtype in which the weights are stored
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", _GROUPED, "float32"),
    "llama of 3 blocks": ("llama", _GROUPED | {"num_hidden_layers": 3}, "float32"),
    "llama tied bfloat16": ("llama", _GROUPED | {"tie_word_embeddings": True, "attention_bias": True}, "bfloat16"),
    "gpt2": ("gpt2", _GPT2, "float32"),
    "gpt2 float16": ("gpt2", _GPT2, "float16"),
    "gemma3": ("gemma3_text", _GEMMA3, "float32"),
    "opt": ("opt", _OPT, "float32"),
    "opt norm after": ("opt", _OPT | {"do_layer_norm_before": False}, "float32"),
    "mixtral": ("mixtral", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, "float32"),
    "mixtral bfloat16": ("mixtral", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, "bfloat16"),
    "qwen3_moe": ("qwen3_moe", _GROUPED | _EXPERTS, "float32"),
    "phi3": ("phi3", _GROUPED, "float32"),
    "bloom": ("bloom", _PLAIN, "float32"),
    "falcon": ("falcon", _PLAIN | {"new_decoder_architecture": True, "num_kv_heads": 2}, "float32"),
    "gpt_neox": ("gpt_neox", _PLAIN | {"intermediate_size": 96, "max_position_embeddings": 64}, "float32"),
}


def spelled(recipe: str | dict[str, Any], fields: Collection[str]) -> str | dict[str, Any]:
    """The recipe as the lowbit under test reads it.

    Args:
        recipe: as in :data:`RUNS`, spelled with ``steps`` and ``model_steps``.
        fields: names of the fields of ``lowbit.Recipe``; they tell one spelling from another.

    Raises:
        ValueError: ``lowbit.Recipe`` has neither of the spellings known here. When recipe files change their keys, say here
            how the new keys are filled from the old ones; the runs below stay as they are.
    """
    if isinstance(recipe, str) or "model_steps" in fields or not recipe.keys() & {"steps", "model_steps"}:
        return recipe
    if "stages" in fields:
        return _in_stages(dict(recipe))
    raise ValueError(
        f"lowbit.Recipe has the fields {sorted(fields)}, neither 'model_steps' nor 'stages': add the new spelling to spelled() in "
        "tests/identity_runs.py"
    )


def _in_stages(recipe: dict[str, Any]) -> dict[str, Any]:
    """``model_steps`` as stages: after a method's own, or after one of the ``steps``."""
    parts = {"what": {"type": "StoredFloats"}, "objective": {"type": "OriginalKL"}}
    later = [{**step, "type": "Train", **parts} for step in recipe.pop("model_steps", ())]
    if "method" in recipe:
        return recipe | {"then": later}
    feed = {"feed": recipe.pop("feed")} if "feed" in recipe else {}
    return recipe | {"stages": [{"type": "Blockwise", "steps": recipe.pop("steps"), **feed}, *later]}


RUNS: list[Run] = []


def _named(about: str, model: str) -> str:
    return f"{about} on {model}"


def _method(about: str, model: str, method: str, *, data: bool = True, **options: Any) -> None:
    """Adds the run of a method, or of a mix ``a+b``, with these options."""
    _recipe(about, model, {"method": method, "options": options}, data=data)


def _recipe(
    about: str, model: str, recipe: str | dict[str, Any], *, data: bool = True, windows: int = 6, **more: Any
) -> None:
    name = _named(about, model)
    RUNS.append(
        {"name": name, "model": model, "recipe": recipe, "windows": windows if data else None, "tokens": 32} | more
    )


def _again(about: str, model: str, how: str, **changes: Any) -> None:
    """Adds a run that was added before, executed otherwise: it must write the same bytes."""
    run = next(run for run in RUNS if run["name"] == _named(about, model))
    RUNS.append(run | changes | {"name": f"{run['name']}, {how}", "same_as": run["name"]})


def _stopped(about: str, model: str, after: int | str, by: str) -> None:
    """Adds a run that was added before, stopped once and repeated."""
    _again(about, model, "stopped", interrupt={"after": after, "by": by})


# Every method on the llama, which has grouped queries and no biases, with the options that make it work hardest.
_method("autoround", "llama", "autoround", bits=3, group_size=32, steps=30, batch=2, lr=0.08)
_method("autoround by token", "llama", "autoround", bits=3, group_size=32, steps=16, batch=4, by_token=True)
_method("awq", "llama", "awq", bits=3, group_size=32, grid=10)
_method("fp8 static", "llama", "fp8", activations="static")
_method("gptq by activation order", "llama", "gptq", bits=3, group_size=32, act_order=True, greedy_passes=2)
_method("hqq", "llama", "hqq", data=False, bits=3, group_size=32)
_method("llm-fp4", "llama", "llm-fp4", rounds=2, grid=5, tokens=64)
_method("llm-int8 with originals", "llama", "llm-int8", threshold=4.0, outlier_weight="original")
_method("lut-gemm", "llama", "lut-gemm", data=False, bits=3, group_size=32)
_method("mxfp4", "llama", "mxfp4", data=False, activation_bits=8)
_method("nf4", "llama", "nf4", data=False, double_quant=True)
_method("nvfp4", "llama", "nvfp4", data=False, activation_bits=4, mse=True)
_method("olive", "llama", "olive", tokens=64)
_method("omniquant", "llama", "omniquant", activation_bits=6, attention_bits=6, epochs=3, augment=True)
_method("outlier-suppression", "llama", "outlier-suppression", bits=6, activation_bits=6, attention_bits=6, epochs=2)
_method("outlier-suppression-plus", "llama", "outlier-suppression-plus", grid=12)
_method("owq stage by stage", "llama", "owq", true_sequential=True, kept_columns=3, greedy_passes=1)
_method("qllm", "llama", "qllm", threshold_steps=5, windows=2, epochs=3)
_method("quarot", "llama", "quarot")
_method("quip", "llama", "quip", bits=3, transform="kronecker", balance=True, greedy_passes=1)
_method("rptq", "llama", "rptq", activation_bits=6, attention_bits=6, clusters=8)
_method("rtn", "llama", "rtn", data=False, bits=3, group_size=32, mse=True)
_method("smoothquant static", "llama", "smoothquant", level="O3", attention_bits=8, skip_first=2)
_method("spqr", "llama", "spqr", bits=3, greedy_passes=1)
_method("squeezellm", "llama", "squeezellm", bits=3, sparsity=0.01, sensitive=0.005)
_method("zeroquant", "llama", "zeroquant", bits=4, lr=1e-3, steps=4, batch=4)

# Every method once more, elsewhere and otherwise.
_method(
    "autoround symmetric", "gemma3", "autoround", group_size=32, symmetric=True, activation_bits=8, steps=18, amp=False
)
_method("awq without clipping", "opt", "awq", group_size=32, clip=False, windows=2, activation_bits=8)
_method("fp8", "gpt2", "fp8", data=False, group_size=32, weight_format="E5M2")
_method("gptq stage by stage", "gpt2", "gptq", group_size=32, true_sequential=True, greedy_passes=1)
_method("gptq with static groups", "mixtral", "gptq", bits=3, group_size=32, static_groups=True, activation_bits=8)
_method("gptq asymmetric", "gemma3", "gptq", bits=3, group_size=32, asymmetric=0.5, mse=False)
_method("gptq with refits", "llama", "gptq", bits=3, group_size=32, refits=2)
_method("hqq rounded", "qwen3_moe", "hqq", data=False, group_size=16, real_zero=False)
_method("llm-fp4 attention", "opt", "llm-fp4", group_size=32, attention_bits=4, rounds=1, grid=5, tokens=64)
_method("llm-int8", "mixtral", "llm-int8", data=False, threshold=4.0)
_method("lut-gemm with offset", "gemma3", "lut-gemm", data=False, group_size=32, offset=True, activation_bits=8)
_method("mxfp4 searched", "opt", "mxfp4", data=False, mse=True)
_method("nf4 floating", "gpt2", "nf4", data=False, levels="fp4", block=32)
_method("nvfp4", "qwen3_moe", "nvfp4", data=False)
_method("olive nearest", "gpt2", "olive", bits=8, activation_bits=8, normal="int", keep="nearest", tokens=64)
_method("omniquant", "opt", "omniquant", bits=3, activation_bits=8, epochs=2, batch=2, amp=True)
_method("outlier-suppression", "opt", "outlier-suppression", epochs=2, windows=3)
_method(
    "outlier-suppression-plus static", "opt", "osplus", per="tensor", static=True, symmetric=True, grid=12, by="linears"
)
_method("owq", "mixtral", "owq", group_size=32, order="act", greedy_passes=0)
_method("qllm folded", "opt", "qllm", assembly="prune", attention_output=True, fold=True, threshold_steps=4, epochs=2)
_method("quarot by heads", "gemma3", "quarot", group_size=32, solver="nearest", heads="folded", activation_clip=1.0)
_method("quarot", "gpt2", "quarot", symmetric=False, activation_symmetric=False)
_method("quip by groups", "opt", "quip", bits=4, group_size=32, order="group", activation_bits=8)
_method("rptq by moving averages", "opt", "rptq", bits=8, activation_bits=8, attention_bits=8, ranges="ema", clusters=8)
_method("rtn by channels", "gemma3", "rtn", data=False, group_size=None, symmetric=True, activation_bits=8)
_method("smoothquant searched", "falcon", "smoothquant", alpha="search", grid=5, all_edges=True)
_method("smoothquant attention", "phi3", "smoothquant", alpha=0.8, attention_bits=8)
_method("spqr simplified", "gpt2", "spqr", order="group", simplified=True, threshold=0.3, greedy_passes=0)
_method("squeezellm by groups", "mixtral", "squeezellm", bits=2, group_size=32)
_method("zeroquant by bands", "gpt2", "zeroquant", groups=4, ffn_bits=4, lr=1e-3, steps=3, batch=2)

# Every method on the other four kinds of architecture that it has not met by now, in short.
FIVE = ("llama", "gpt2", "gemma3", "opt", "mixtral")
_SHORT: dict[str, dict[str, Any]] = {
    "autoround": {"group_size": 32, "steps": 6, "batch": 3},
    "awq": {"group_size": 32, "grid": 4, "windows": 2},
    "bitdistiller": {"group_size": 32, "tokens": 96, "lr": 1e-4, "measures": 2},
    "efficientqat": {"group_size": 32, "tokens": 96, "epochs": 1, "measures": 2},
    "fp8": {},
    "gptq": {"group_size": 32},
    "hqq": {"group_size": 32},
    "kivi": {"bits": 4, "recent": 32},
    "kv-fp8": {},
    "kv-int": {},
    "kv-oscar": {"recent": 16, "sink": 4},
    "kv-rotated": {},
    "kv-turbo": {"exempt": 0},
    "llm-fp4": {"rounds": 1, "grid": 3, "tokens": 48},
    "llm-int8": {"threshold": 4.0},
    "llm-qat": {"tokens": 96, "lr": 1e-4, "measures": 2},
    "lut-gemm": {"bits": 2, "group_size": 32},
    "mxfp4": {"activation_bits": 6},
    "nf4": {},
    "nvfp4": {},
    "olive": {"normal": "int", "tokens": 48},
    "omniquant": {"activation_bits": 8, "epochs": 1, "batch": 2},
    "onebit": {"tokens": 96, "lr": 1e-2, "measures": 2},
    "outlier-suppression": {"epochs": 1, "windows": 2},
    "outlier-suppression-plus": {"grid": 6},
    "owq": {"greedy_passes": 0},
    "paretoq": {"tokens": 96, "lr": 1e-4, "measures": 2},
    "qllm": {"threshold_steps": 3, "windows": 1, "epochs": 1},
    "qlora": {"tokens": 96, "rank": 4, "lr": 1e-3, "measures": 2},
    "quarot": {},
    "quip": {"bits": 4},
    "rptq": {"clusters": 4, "activation_bits": 6},
    "rtn": {"group_size": 32},
    "smoothquant": {},
    "spinquant": {"tokens": 96, "measures": 2, "kv_bits": 4},
    "spqr": {"greedy_passes": 0},
    "squeezellm": {"bits": 2},
    "wkvquant": {"group_size": 32, "epochs": 1, "ahead": 1},
    "zeroquant": {"lr": 1e-3, "steps": 2, "batch": 2},
}


def _met(method: str, model: str) -> bool:
    return any(run["model"] == model and run["recipe"]["method"] == method for run in RUNS)


for _name, _options in _SHORT.items():
    for _model in FIVE:
        if not _met(_name, _model):
            _recipe(_name, _model, {"method": _name, "options": _options}, windows=3)

# Mixes.
_method("smoothquant+gptq", "llama", "smoothquant+gptq", bits=4, activation_bits=8, group_size=32)
_method("quarot+gptq", "llama", "quarot+gptq", bits=4, activation_bits=4, group_size=32, order="act")
_method("awq+gptq", "gemma3", "awq+gptq", bits=3, group_size=32, grid=8, clip=False)
_method("awq+quip", "llama", "awq+quip", bits=3, grid=8, clip=False)
_method("outlier-suppression-plus+gptq", "opt", "outlier-suppression-plus+gptq", bits=4, group_size=32, grid=12)
_method("rptq+llm-fp4", "llama", "rptq+llm-fp4", clusters=8, rounds=1, grid=5, tokens=64)
_method("omniquant+gptq", "gpt2", "omniquant+gptq", bits=4, activation_bits=8, group_size=32, epochs=2, mse=False)
_method("qllm+gptq", "llama", "qllm+gptq", bits=4, activation_bits=4, group_size=None, threshold_steps=4, epochs=2)
_method("awq+spqr", "phi3", "awq+spqr", bits=3, group_size=16, grid=6, clip=False, greedy_passes=0)
_method("smoothquant+llm-int8", "bloom", "smoothquant+llm-int8", threshold=3.0)
_method("smoothquant+awq+gptq", "gpt_neox", "smoothquant+awq+gptq", group_size=32, grid=6, clip=False)
_method("zeroquant+owq", "falcon", "zeroquant+owq", lr=1e-3, steps=3, batch=2, greedy_passes=0)

# Recipes that spell out scheme and steps, and overrides.
_recipe("w4-explicit", "llama", "w4-explicit")
_recipe(
    "sparse outliers on levels of a table",
    "phi3",
    {
        "name": "outliers in NF4",
        "scheme": [
            {"match": "*", "weight": {"type": "Spec", "grid": {"type": "Normal", "bits": 3}, "granularity": {"type": "PerGroup", "size": 32}}},
            {"match": "down", "skip": True},
        ],
        "steps": [{"type": "Solve", "solver": {"type": "Gptq", "order": "group", "outliers": {"type": "LeaveOneOut", "threshold": 0.2}}}],
        "seed": 5,
    },
)  # fmt: skip
_recipe(
    "sparse outliers and kept columns",
    "gpt_neox",
    {
        "name": "outliers and columns",
        "feed": "fp",
        "scheme": [{"match": "*", "weight": {"type": "Spec", "grid": {"type": "Int", "bits": 4}, "granularity": {"type": "PerChannel"}}}],
        "steps": [{"type": "Solve", "solver": {"type": "Gptq", "outliers": [{"type": "WeakColumns", "count": 2}, {"type": "LeaveOneOut", "threshold": 0.5}]}}],
    },
)  # fmt: skip
_recipe(
    "gptq with overrides",
    "llama",
    {
        "method": "gptq",
        "options": {"bits": 3, "group_size": 32},
        "overrides": [
            {"match": "down", "bits": 8, "group_size": "channel"},
            {"match": "v", "skip": True},
            {"match": "re:layers\\.1\\.self_attn\\.q_proj", "bits": 5, "symmetric": True, "activation_bits": 8},
        ],
    },
)
_recipe(
    "smoothquant with overrides",
    "mixtral",
    {
        "method": "smoothquant",
        "options": {"alpha": 0.7},
        "overrides": [{"match": "mlp", "bits": 4, "group_size": 32, "activation_bits": 6}],
        "feed": "quant",
        "seed": 3,
    },
)

# Recipes that tune the whole packed model.
_TUNED = {"method": "gptq", "options": {"bits": 3, "group_size": 32}}
_recipe("gptq, tuned", "llama of 3 blocks", _TUNED | {"model_steps": [{"type": "Tune", "epochs": 3, "lr": 5e-3}]})
_recipe("w3-normal-tuned", "llama", "w3-normal-tuned")
_recipe("w8a8-rotated-tuned", "gpt2", "w8a8-rotated-tuned", windows=4)
_recipe(
    "squeezellm, tuned",
    "opt",
    {"method": "squeezellm", "options": {"bits": 3}, "model_steps": [{"type": "Tune", "epochs": 2, "batch": 3}]},
)

# Models stored in half precision, with tied embeddings, with norms on the stream.
_method("awq+gptq", "llama tied bfloat16", "awq+gptq", bits=4, group_size=32, grid=6, clip=False)
_method("quarot", "llama tied bfloat16", "quarot", bits=8, activation_bits=8)
_method("rtn", "llama tied bfloat16", "rtn", data=False, bits=4, group_size=32)
_method("smoothquant", "mixtral bfloat16", "smoothquant", bits=4)
_method("omniquant", "gpt2 float16", "omniquant", group_size=32, activation_bits=8, epochs=2)
_method("spqr", "gpt2 float16", "spqr", bits=4, greedy_passes=0)
_method("smoothquant+gptq", "opt norm after", "smoothquant+gptq", bits=8, activation_bits=8, group_size=None)

# Runs that are stopped and repeated.
_method("quarot", "llama of 3 blocks", "quarot")
_method("squeezellm", "llama of 3 blocks", "squeezellm", bits=2)
_stopped("quarot", "llama of 3 blocks", 2, "exception")
_stopped("squeezellm", "llama of 3 blocks", 1, "exception")
_stopped("gptq, tuned", "llama of 3 blocks", "blocks", "exception")
_stopped("smoothquant", "mixtral bfloat16", 1, "kill")
_stopped("w3-normal-tuned", "llama", 1, "kill")
_again("omniquant", "llama", "activations in files", settings={"ram_limit": 0})

# One linear by itself. Data is what quantize_linear is given as inputs; squeezellm wants Fisher information as well.
_method("rtn", LINEAR, "rtn", data=False, bits=3, group_size=32)
_method("hqq", LINEAR, "hqq", data=False, group_size=32)
_method("nf4", LINEAR, "nf4", data=False)
_method("gptq", LINEAR, "gptq", bits=3, group_size=32, act_order=True, greedy_passes=1)
_method("awq", LINEAR, "awq", bits=3, group_size=32, grid=8)
_method("smoothquant static", LINEAR, "smoothquant", level="O3", all_edges=True)
_method("omniquant", LINEAR, "omniquant", activation_bits=8, epochs=2)
_method("quip", LINEAR, "quip", bits=3, transform="kronecker")
_method("spqr", LINEAR, "spqr")
_method("olive", LINEAR, "olive", tokens=64)
_method("squeezellm", LINEAR, "squeezellm", bits=3)
