"""Ours against the authors' own code on real layers: `make fidelity`.

    python benchmarks/fidelity.py [--only METHOD]... [--data DIRECTORY]

The official records (official.json, protocol in OFFICIAL.md beside it) hold what each repository's own code reached on
layers 2 and 14 of SmolLM2-135M. Every record of a method that lowbit has is repeated through the public
`lowbit.quantize_linear` with the recipe that a user would name (`RECIPES`), on the same calibration inputs, and judged on the
same evaluation inputs. Ours has to lose at most 1.02 times as much output at the same or fewer bits, or have its reason in
`REASONS`; otherwise the exit code is 1. Results go to benchmarks/results/fidelity.{jsonl,md}.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Screen
from torch import Tensor, nn

import lowbit
from lowbit.tables import Table, markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
import blocks
import gradients
import layers

RESULTS = Path(__file__).parent / "results"
LIMIT = 1.02


def _group(setting: str) -> int | None:
    found = re.search(r"\bg(\d+)", setting)
    return int(found[1]) if found else None


def _gptq(setting: str, record: dict) -> dict[str, Any]:
    return {"bits": int(setting[1]), "group_size": _group(setting), "act_order": "actorder" in setting}


def _owq(setting: str, record: dict) -> dict[str, Any]:
    options: dict[str, Any] = {"bits": 3, "mse": "minmax" not in setting}
    kept = re.search(r"k=(\d+)", setting)
    return options | ({"kept_columns": int(kept[1])} if kept else {"target_bits": record["bits_per_weight"]})


def _spqr(setting: str, record: dict) -> dict[str, Any]:
    options: dict[str, Any] = {"bits": 3, "group_size": 16}
    if "thr inf" in setting:
        options["threshold"] = float("inf")
    elif "damp.01" in setting:  # the defaults are chosen for the authors' script, which keeps fewer outliers than this
        options |= {"threshold": 0.215, "damp": 0.03}
    return options | ({} if "act_order" in setting else {"order": "none"})


def _rtn(setting: str, record: dict) -> dict[str, Any]:
    return {"bits": int(setting[1]), "group_size": _group(setting), "mse": "mse" in setting}


def _quip(setting: str, record: dict) -> dict[str, Any]:
    bits = {"bits": int(setting[1])}
    # Without rotations its code is LDLQ on a grid of the extremes of each channel, which is what gptq is.
    return bits | {"method": "gptq", "group_size": None} if "no-incoh" in setting else bits


def _olive(setting: str, record: dict) -> dict[str, Any] | None:
    if not setting.startswith("W"):  # activations alone, the weights as they are
        return None
    return {"activation_bits": 4 if setting == "W4A4" else None, "outliers": record["method"] == "OliVe"}


def _both(setting: str) -> dict[str, Any]:
    return {"bits": int(setting[1]), "activation_bits": int(setting[1])}


def _int8(setting: str, record: dict) -> dict[str, Any]:
    if "row-wise only" in setting:  # of the weight; its input is not quantized
        return {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}
    return {"bits": 8, "threshold": float(setting.split("threshold ")[1].split()[0])}


def _llm_fp4(setting: str, record: dict) -> dict[str, Any]:
    # Ranges are searched here. At the extremes these formats lose more than the record, whose classes place the largest
    # magnitude one number beyond the format: 17 values for 4 bits (tests/golden/test_official_floats.py repeats them).
    (bits, split), (act_bits, act_split) = re.findall(r"[WA](\d)\((\w+)\)", setting)
    formats = {"weight_format": split, "activation_format": act_split, "channel_bias": False}
    return {"bits": int(bits), "activation_bits": int(act_bits)} | formats


def _osplus(setting: str, record: dict) -> dict[str, Any]:
    # As it was driven: every site on the inputs of the unquantized model, qkv as plain linears.
    search = {"by": "linears", "in_turn": False, "scale": "scale search" in setting}
    return _both(setting) | search


def _qllm(setting: str, record: dict) -> dict[str, Any]:
    # Its code was driven with the input of the output projection among those that are reassembled.
    ratio = float(setting.rpartition("ratio")[2]) if "ratio" in setting else 0.0
    return _both(setting) | {"channel_ratio": ratio, "attention_output": True, "rank": 0}


def _zeroquant(setting: str, record: dict) -> dict[str, Any] | None:
    if not setting.startswith("W"):
        return None  # ternary and binary
    return {
        "bits": int(setting[1]),
        "activation_bits": 8 if "A8" in setting else None,
        "group_size": _group(setting),
        "symmetric": "Asym" not in setting,
        "distil": False,
    }


def _rptq(setting: str, record: dict) -> dict[str, Any] | None:
    found = re.search(r"A(\d) static (\d+) clusters (ema_)?minmax", setting)
    if found is None:
        return None
    return {
        "activation_bits": int(found[1]),
        "clusters": int(found[2]),
        "ranges": "search" if found[3] else "minmax",  # each side's default, and the extremes of all tokens
        "solver": "nearest",
    }


# Official method -> (ours, options from the setting, or None where lowbit has nothing like it).
RECIPES: dict[str, tuple[str, Callable[[str, dict], dict[str, Any] | None]]] = {
    "RTN": ("rtn", _rtn),
    "GPTQ": ("gptq", _gptq),
    "bitsandbytes": (
        "nf4",
        lambda s, _: {"double_quant": "double" in s, "levels": s[:3].lower()} if s[:3] in ("NF4", "FP4") else None,
    ),
    "BCQ": (
        "lut-gemm",
        lambda s, _: {"bits": int(s[0]), "group_size": _group(s), "rounds": 15 if "rounds15" in s else 0},
    ),
    "OWQ": ("owq", _owq),
    "SpQR": ("spqr", _spqr),
    "QuIP": ("quip", _quip),
    "SqueezeLLM": ("squeezellm", lambda s, _: {"bits": 3, "sparsity": 0.0, "sensitive": 0.0}),
    "AWQ": ("awq", lambda s, _: {"bits": int(s[1]), "group_size": _group(s), "clip": "auto_clip" in s}),
    "AWQ-RTN": ("rtn", _rtn),
    "RTN W/A": ("rtn", lambda s, _: _both(s) | {"group_size": None, "symmetric": True}),
    "SmoothQuant": ("smoothquant", lambda s, _: _both(s) | {"alpha": 0.5}),
    "LLM.int8": ("llm-int8", _int8),
    "OliVe": ("olive", _olive),
    "ANT(no_outlier)": ("olive", _olive),
    "LLM-FP4 MinMax": ("llm-fp4", _llm_fp4),
    "OS+": ("outlier-suppression-plus", _osplus),
    "QLLM": ("qllm", _qllm),
    "ZeroQuant(DS)": ("zeroquant", _zeroquant),
    "RPTQ": ("rptq", _rptq),
}
# These act on a whole block, or on what its linears read: they run on the block, and not on one linear by itself (but for
# settings that leave activations as they are).
IN_BLOCKS = (
    "AWQ",
    "RTN W/A",
    "SmoothQuant",
    "LLM.int8",
    "OliVe",
    "ANT(no_outlier)",
    "LLM-FP4 MinMax",
    "OS+",
    "QLLM",
    "ZeroQuant(DS)",
)
# Of these the records have rounded inputs and weights as they were.
INPUTS_ONLY = ("RPTQ",)
# (official method, pattern of "setting layer") -> why ours may lose more there, or take more bits.
_NOMINAL = "the official bits are nominal, with no scale counted; the format is the same"
REASONS: dict[tuple[str, str], str] = {
    ("RTN W/A", ""): _NOMINAL,
    ("SmoothQuant", ""): _NOMINAL,
    ("LLM-FP4 MinMax", r"A8.* model\.layers\.14\.mlp\.down_proj"): (
        "the authors' MinMax classes have 17 values, which 4 bits cannot hold (tests/golden/test_official_floats.py repeats the "
        "record with them); with 16, no range of a row reaches it here, judged by the Gram matrix of all calibration tokens"
    ),
    ("ZeroQuant(DS)", r"W4 Asym per-channel"): (
        "asymmetric grids here reach both ends of the range, with a step of (max - min) / 15; the authors' step is a sixteenth of it "
        "and the top is clipped, which at 4 bits and in long rows loses up to an eighth less (their dialect on these weights gives their error of weights to four digits). With zero points no wider than "
        "codes, ours stores fewer bits. The method's own default, symmetric, has their step here too"
    ),
    ("RPTQ", r"A8 static 32 clusters minmax .*\.2\.mlp"): (
        "the luck of k-means' start: over three seeds ours is 0.00084 to 0.00087 with either dialect of the step"
    ),
    ("RPTQ", r"A8 static (1 clusters ema_minmax .*\.2|4 clusters ema_minmax .*\.14)\.mlp"): (
        "each side by its default, here ranges searched on sampled calibration tokens: at 8 bits and with few clusters up to 5 % "
        "behind a moving average on other text, with 32 clusters or at 4 bits a tenth to a half of its error (one cluster: 0.98)"
    ),
    ("RPTQ", r"A4 static (32|4) clusters minmax .*\.14\.mlp"): (
        "the authors' step is a sixteenth of the range, not a fifteenth, and the top is clipped; on our clusters their dialect "
        "gives their figure (0.142 with 32, 0.281 with 4). On layer 2 the same clipping makes their error 6 to 8 times ours"
    ),
    ("SpQR", r"thr\.2 damp\.01 act_order"): (
        "at most 1.02 times the error; the order of columns (32 bits an input channel) and the row offsets of outliers are stored "
        "and counted, which the formula leaves out"
    ),
    ("GPTQ", r" g64 actorder"): (
        "the error is lower; the order of columns is stored and counted (32 bits an input channel, as the authors' g_idx), which "
        "the formula leaves out. The default order='group' stores none and its error is lower still"
    ),
    ("BCQ", r"[34]b .*rounds15 .*\.2\.mlp\.down_proj"): (
        "the method minimizes the error of the weights, and there ours is 16 to 37 % lower; this layer's output hangs on a "
        "few input channels a thousand times the others, whose weights a method without data cannot favour"
    ),
}


def records(data: Path, only: list[str]) -> list[dict]:
    """Records of methods that are covered, seeds of one setting and layer averaged into one."""
    grouped: dict[tuple, list[dict]] = {}
    for record in json.loads((data / "official.json").read_text()):
        if record["method"] in RECIPES and (not only or RECIPES[record["method"]][0] in only):
            grouped.setdefault((record["method"], record["setting"], record["layer"]), []).append(record)
    return [
        each[0]
        | {key: statistics.mean(r[key] for r in each) for key in ("rel_out", "bits_per_weight")}
        | {"seeds": len(each)}
        for each in grouped.values()
    ]


def calibration_inputs() -> dict[str, Tensor]:
    """``[tokens, in]`` float32 of each recorded layer, of the unquantized model."""
    model, tokenizer = layers.model_and_tokenizer()
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers.LAYERS}
    for layer in layers.LAYERS:
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: found[layer].append(args[0].flatten(0, -2).clone())
        )
    with torch.inference_mode():
        for window in layers.windows_of("calibration", tokenizer):
            model.model(window[None], use_cache=False)
    return {layer: torch.cat(parts).clone() for layer, parts in found.items()}


def measure(
    record: dict, tensors: dict[str, Tensor], inputs: dict[str, Tensor], fisher: dict[str, Tensor]
) -> dict | None:
    """Our line for one record; None where the setting has no counterpart."""
    name, options_of = RECIPES[record["method"]]
    options = options_of(record["setting"], record)
    if options is None:
        return None
    name, layer = options.pop("method", name), record["layer"]
    if record["method"] in INPUTS_ONLY:
        block, path = blocks.place_of(record)
        lost = blocks.input_errors_of(name, block, **options)[path]
        return _line(record, name, options, lost, record["bits_per_weight"])
    if record["method"] in IN_BLOCKS and options.get("activation_bits", 16) is not None:
        block, path = blocks.place_of(record)
        options |= {"tokens_a_call": layers.WINDOW} if "per window" in record["setting"] else {}
        errors, bits = blocks.errors_of(name, block, **options), blocks.bits_of(name, block, **options)
        return _line(record, name, options, errors[path], bits[path])
    w_OI, unseen = tensors[f"{layer}.weight"], tensors[f"{layer}.evaluation"]
    linear = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False)
    linear.load_state_dict({"weight": w_OI})
    recipe = lowbit.recipe(name, **options)
    needs = {"fisher": fisher[layer]} if recipe.needs_fisher else {}
    x = inputs[layer] if recipe.needs_calibration and not needs else None
    q = lowbit.quantize_linear(linear, x, recipe, **needs)
    lost = layers.output_energy(w_OI - q.effective_weight(), unseen) / layers.output_energy(w_OI, unseen)
    return _line(record, name, options, lost, q.bits_per_weight)


def _line(record: dict, name: str, options: dict[str, Any], lost: float, bits: float) -> dict:
    layer, ratio = record["layer"], lost / record["rel_out"]
    where = f"{record['setting']} {layer}"
    reason = next((r for (m, p), r in REASONS.items() if m == record["method"] and re.search(p, where)), "")
    more = bits > record["bits_per_weight"] + 0.01
    verdict = "ok" if ratio <= LIMIT and not more else ("MORE BITS" if more else "WORSE") if not reason else "reason"
    return {
        "method": record["method"],
        "setting": record["setting"],
        "layer": layer,
        "ours": name,
        "options": options,
        "official_rel_out": record["rel_out"],
        "rel_out": lost,
        "ratio": ratio,
        "official_bits": record["bits_per_weight"],
        "bits": bits,
        "seeds": record["seeds"],
        "verdict": verdict,
        "reason": "" if verdict == "ok" else reason,
    }


COLUMNS = ("method", "setting", "layer", "official", "ours", "ratio", "official bits", "our bits", "")


def write_markdown(lines: list[dict], not_covered: list[str]) -> None:
    cells = (
        (
            x["method"],
            x["setting"],
            x["layer"].removeprefix("model.layers."),
            f"{x['official_rel_out']:.5f}",
            f"{x['rel_out']:.5f}",
            f"{x['ratio']:.3f}",
            f"{x['official_bits']:.3f}",
            f"{x['bits']:.3f}",
            "" if x["verdict"] == "ok" else x["verdict"],
        )
        for x in lines
    )
    rows = [
        "# Fidelity: output error on real layers, ours over the authors' own code",
        "",
        "Written by `make fidelity`. SmolLM2-135M, layers 2 and 14; calibrated on 32 windows of 512 tokens of WikiText-2 "
        "validation, judged on 16 of test. Below 1 is better than the official figure. Official bits follow each paper's "
        "formula; ours count every stored byte.",
        "",
        markdown(Table("", COLUMNS, tuple(cells))),
    ]
    reasons = dict.fromkeys(f"* {x['method']}: {x['reason']}." for x in lines if x["reason"])
    rows += ["## Reasons", "", *reasons, ""] if reasons else []
    rows += ["## Not covered", "", *not_covered, ""]
    (RESULTS / "fidelity.md").write_text("\n".join(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="a method of lowbit; may be repeated")
    parser.add_argument("--data", type=Path, default=layers.DATA, help="where official.json and text/ are")
    arguments = parser.parse_args()
    layers.DATA = arguments.data
    console = Console()
    if why := layers.missing():
        console.print(f"cannot compare: {why}; pass --data DIRECTORY with official.json, OFFICIAL.md and text/")
        return 2
    wanted = records(arguments.data, arguments.only)
    console.print("gathering the inputs of the recorded layers")
    alone = any(record["method"] not in IN_BLOCKS for record in wanted)
    tensors, inputs = layers.gather(), calibration_inputs() if alone else {}
    fisher = gradients.gather() if any(r["method"] == "SqueezeLLM" for r in wanted) else {}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "fidelity.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() and arguments.only else []
    lines, skipped = [line for line in kept if line["ours"] not in arguments.only], set()
    for i, record in enumerate(wanted):
        line = measure(record, tensors, inputs, fisher)
        if line is None:
            skipped.add(f"* {record['method']} {record['setting']}: no method of lowbit makes this format yet.")
            continue
        lines.append(line)
        console.print(
            f"{i + 1}/{len(wanted)} {line['method']} {line['setting']} {line['layer']}: {line['ratio']:.3f} {line['verdict']}"
        )
    everything = {r["method"] for r in json.loads((arguments.data / "official.json").read_text())}
    skipped |= {f"* {name}: not compared here." for name in everything - set(RECIPES)}
    file.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    write_markdown(lines, sorted(skipped))
    table = Screen("method", "setting", "records", "median ratio", "worst ratio", "verdicts")
    for key in dict.fromkeys((x["method"], x["setting"]) for x in lines):
        rows = [x for x in lines if (x["method"], x["setting"]) == key]
        ratios = [x["ratio"] for x in rows]
        verdicts = ", ".join(sorted({x["verdict"] for x in rows}))
        table.add_row(*key, str(len(rows)), f"{statistics.median(ratios):.3f}", f"{max(ratios):.3f}", verdicts)
    console.print(table)
    return 1 if any(x["verdict"] not in ("ok", "reason") for x in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
