"""Where a method is worse than rounding to nearest: every linear of SmolLM2-135M by every weight-only method.

    python benchmarks/outliers.py [--blocks 0 14] [--methods gptq awq] [--data DIRECTORY]

For each linear of each block, the output error of a method over that of RTN with the same bits and groups, both through the
public `lowbit.quantize_linear`. Inputs are those of the unquantized model: calibration and evaluation text as in
tests/golden/layers.py. A ratio above 1.0 is a finding, which the table names. Lines are written as they are measured; a repeated
call goes on where the last one stopped. Results go to benchmarks/results/outliers.{jsonl,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.tables import Table, markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
import gradients
import layers

RESULTS = Path(__file__).parent / "results"
FOUR: dict[str, Any] = {"bits": 4, "group_size": 64}
THREE: dict[str, Any] = {"bits": 3, "group_size": "channel"}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptq": (FOUR, FOUR),
    "awq": (FOUR, FOUR),
    "autoround": (FOUR, FOUR),
    "hqq": (FOUR, FOUR),
    "lut-gemm": (FOUR, FOUR),
    "nf4": ({"block": 64}, FOUR),
    "spqr": ({"bits": 3, "group_size": 16}, {"bits": 3, "group_size": 16}),
    "owq": ({"bits": 3}, THREE),
    "quip": ({"bits": 3}, THREE),
    "squeezellm": ({"bits": 3}, THREE),
}
"""Options of each method, and of the RTN that it is compared with."""


class _Entered(Exception):
    """The first block was reached."""


def blocks_of(
    model: Any, numbers: list[int], splits: dict[str, Tensor]
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Each block of ``numbers`` with the inputs ``[tokens, in]`` of its linears, by split and path. One block is run at a time."""
    calls: list[dict[str, Any]] = []
    hidden: dict[str, Tensor] = {}

    def note(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append({"x": args[0] if args else kwargs["hidden_states"]} | kwargs)
        raise _Entered

    hook = model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    for split, ids in splits.items():
        begun = len(calls)
        for window in ids:
            try:
                model.model(window[None], use_cache=False)
            except _Entered:
                continue
        hidden[split] = torch.cat([call["x"] for call in calls[begun:]])
    hook.remove()
    kwargs = {key: value for key, value in calls[0].items() if key not in ("x", "hidden_states")}
    calls.clear()
    for number, block in enumerate(model.model.layers[: max(numbers) + 1]):
        inputs: dict[str, dict[str, Tensor]] = {}
        for split, windows in hidden.items():
            parts: dict[str, list[Tensor]] = {}
            linears = (
                [name for name, m in block.named_modules() if isinstance(m, nn.Linear)] if number in numbers else []
            )
            hooks = [
                block.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, kept=parts.setdefault(name, []): kept.append(args[0][0].clone())
                )
                for name in linears
            ]
            for i in range(len(windows)):
                output = block(windows[i : i + 1], **kwargs)
                windows[i : i + 1] = output[0] if isinstance(output, tuple) else output
            for each in hooks:
                each.remove()
            inputs[split] = {name: torch.cat(kept) for name, kept in parts.items()}
        if number in numbers:
            yield number, inputs


def error(
    linear: nn.Linear, x: Tensor, unseen: Tensor, name: str, options: dict[str, Any], fisher: Tensor | None
) -> float:
    """Relative squared output error on ``unseen``."""
    recipe = lowbit.recipe(name, **options)
    needs = {"fisher": fisher} if recipe.needs_fisher else {}
    text = x if recipe.needs_calibration and not needs else None
    with torch.enable_grad():
        q = lowbit.quantize_linear(linear, text, recipe, **needs)
    lost = linear(unseen) - nn.functional.linear(unseen, q.effective_weight().to(unseen.dtype), linear.bias)
    return (lost.double().square().sum() / linear(unseen).double().square().sum()).item()


def write_table(lines: list[dict[str, Any]]) -> None:
    """The page: a row for each method, then every finding."""
    rows = []
    for method, (options, plain) in METHODS.items():
        own = sorted((line for line in lines if line["method"] == method), key=lambda line: line["ratio"])
        if own:
            above = sum(line["ratio"] > 1 for line in own)
            middle = statistics.median(line["ratio"] for line in own)
            worst = own[-1]["ratio"]
            given = _words(options), _words(plain)
            rows.append((method, *given, str(len(own)), f"{middle:.3f}", f"{worst:.3f}", str(above)))
    found = sorted((line for line in lines if line["ratio"] > 1), key=lambda line: -line["ratio"])
    worse = tuple((x["method"], x["layer"], f"{x['ratio']:.3f}", f"{x['error']:.4g}", f"{x['rtn']:.4g}") for x in found)
    columns = ("method", "options", "RTN's options", "linears", "median ratio", "worst", "above 1.0")
    head = "# Output errors against rounding to nearest\n\nMade by `python benchmarks/outliers.py`.\n"
    tables = Table("", columns, tuple(rows)), Table("", ("worse than RTN", "layer", "ratio", "error", "RTN's"), worse)
    (RESULTS / "outliers.md").write_text("\n".join([head, *map(markdown, tables)]))


def _words(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="*", default=list(range(30)), help="default: all thirty")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--data", type=Path, default=layers.DATA, help="directory with text/")
    options = parser.parse_args()
    layers.DATA = options.data
    file = RESULTS / "outliers.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    model, tokenizer = layers.model_and_tokenizer()
    splits = {split: layers.windows_of(split, tokenizer) for split in layers.SPLITS}
    linears = {name: module for name, module in model.model.layers[0].named_modules() if isinstance(module, nn.Linear)}
    fisher: dict[str, Tensor] = {}
    if any(lowbit.recipe(name, **METHODS[name][0]).needs_fisher for name in options.methods):
        wanted = [f"model.layers.{number}.{name}" for number in options.blocks for name in linears]
        with torch.enable_grad():
            fisher = gradients.of_layers(wanted)
    for number, inputs in blocks_of(model, options.blocks, splits):
        for name in linears:
            layer = f"model.layers.{number}.{name}"
            linear, x, unseen = model.get_submodule(layer), inputs["calibration"][name], inputs["evaluation"][name]
            plain: dict[str, float] = {}
            for method in options.methods:
                if any((line["layer"], line["method"]) == (layer, method) for line in lines):
                    continue
                own, rtn = METHODS[method]
                if str(rtn) not in plain:
                    plain[str(rtn)] = error(linear, x, unseen, "rtn", rtn, None)
                lost = error(linear, x, unseen, method, own, fisher.get(layer))
                line = {"layer": layer, "method": method, "error": lost, "rtn": plain[str(rtn)]}
                lines.append(line | {"ratio": lost / plain[str(rtn)]})
                with file.open("a") as stream:
                    stream.write(json.dumps(lines[-1]) + "\n")
                print(
                    f"{layer} {method} {lines[-1]['ratio']:.3f}{'  WORSE' if lines[-1]['ratio'] > 1 else ''}",
                    flush=True,
                )
    write_table(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
