"""What one range for all tokens costs each linear of SmolLM2-135M: SmoothQuant's levels O1 to O3, input by input.

    python benchmarks/input_ranges.py --text wikitext2.valid.raw

Inputs are those of the unquantized model, in 8 bits, behind SmoothQuant's smoothing (alpha 0.5, inputs behind norms); weights stay
as they are. The error is that of the linear's output, over windows of the text behind the calibration windows. Results go to
benchmarks/results/input-ranges.{json,md}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_text
from lowbit.tables import Table, markdown

MODEL, LENGTH, CALIBRATION, HELD, STRIDE = "smollm2-135m", 512, 4, 2, 8
"""The output error is measured at every eighth token of each window, the first by itself."""
RESULTS = Path(__file__).parent / "results"
LEVELS = ("per token (O1)", "per tensor (O2)", "static (O3)", "static, first token apart")
SMOOTHED = ("q_proj", "gate_proj")
"""Inputs behind norms, by the first linear that reads them, with those that read them too."""
READERS = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
QMAX = 127


def rounded(x_TI: Tensor, peak: Tensor) -> Tensor:
    """``x`` in 8 bits whose range ends at ``peak``, which clips."""
    step = peak.clamp(min=1e-12) / QMAX
    return (x_TI / step).round().clamp(-QMAX, QMAX) * step


def inputs_of(model: nn.Module, ids_NT: Tensor, see: Callable[[str, Tensor], None]) -> None:
    """Calls ``see(name, x [T, I])`` for each input of a linear in the blocks, of each window; inputs that several read once."""
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("q_proj", "o_proj", "gate_proj", "down_proj"):
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0][0])))
    with torch.no_grad():
        for ids_T in ids_NT:
            model(ids_T[None])
    for hook in hooks:
        hook.remove()


def measure(model: Any, ids_NT: Tensor) -> list[dict[str, Any]]:
    peaks: dict[str, list[Tensor]] = {}
    inputs_of(model, ids_NT[:CALIBRATION], lambda name, x: peaks.setdefault(name, []).append(_peaks(x)))
    known = {name: torch.stack(each).amax(0) for name, each in peaks.items()}  # [2, I]: all tokens; without the first
    lost = {name: torch.zeros(2, len(LEVELS) + 1, dtype=torch.float64) for name in known}  # first tokens, other tokens

    def see(name: str, x_TI: Tensor) -> None:
        weight_OI, smooth_I = _weight(model, name, known[name][0])
        x_TI, (whole_I, rest_I) = x_TI / smooth_I, known[name] / smooth_I
        own = x_TI.abs()
        ranges = (own.amax(1, keepdim=True), own.amax(), whole_I.amax(), rest_I.amax())
        at = slice(None, None, STRIDE)
        outputs = [*((rounded(x_TI, peak) - x_TI)[at] @ weight_OI.T for peak in ranges), x_TI[at] @ weight_OI.T]
        for number, output_SO in enumerate(outputs):
            lost_S = output_SO.double().square().sum(1)
            lost[name][:, number] += torch.stack([lost_S[0], lost_S[1:].sum()])

    inputs_of(model, ids_NT[CALIBRATION:], see)
    return [
        {
            "input": name.removeprefix("model.layers."),
            "peak": known[name][0].amax().item(),
            "peak without first tokens": known[name][1].amax().item(),
            **{level: (lost[name][1, i] / lost[name][1, -1]).item() for i, level in enumerate(LEVELS)},
            **{
                f"{level}, first tokens": (lost[name][0, i] / lost[name][0, -1]).item()
                for i, level in enumerate(LEVELS)
            },
        }
        for name in known
    ]


def _peaks(x_TI: Tensor) -> Tensor:
    return torch.stack([x_TI.abs().amax(0), x_TI[1:].abs().amax(0)])


def _weight(model: Any, name: str, peak_I: Tensor) -> tuple[Tensor, Tensor]:
    """The weights ``[O, I]`` that read an input, smoothed, and what the input is divided by ``[I]``."""
    parent, _, own = name.rpartition(".")
    weights = [model.get_submodule(f"{parent}.{each}").weight for each in READERS.get(own, (own,))]
    weight_OI = torch.cat([weight.detach() for weight in weights])
    if own not in SMOOTHED:
        return weight_OI, torch.ones_like(peak_I)
    smooth_I = (peak_I / weight_OI.abs().amax(0).clamp(min=1e-5)).sqrt().clamp(min=1e-5)
    return weight_OI * smooth_I, smooth_I


def page(rows: list[dict[str, Any]], text: str) -> str:
    worst = sorted(rows, key=lambda row: -row[LEVELS[1]])
    kinds = {
        kind: [row for row in rows if row["input"].endswith(kind)]
        for kind in ("q_proj", "o_proj", "gate_proj", "down_proj")
    }
    medians = tuple(
        (kind, *(f"{_median(each, level):.2g}, {max(row[level] for row in each):.2g}" for level in LEVELS))
        for kind, each in kinds.items()
    )
    columns = ("input", "largest value", "without first tokens", *LEVELS, f"{LEVELS[-1]}: the first token")
    largest = tuple(
        (
            row["input"],
            f"{row['peak']:.4g}",
            f"{row['peak without first tokens']:.4g}",
            *(f"{row[level]:.2g}" for level in (*LEVELS, f"{LEVELS[-1]}, first tokens")),
        )
        for row in worst[:12]
    )
    lines = [
        "# What one range for all tokens costs each linear: SmolLM2-135M, inputs in 8 bits",
        "",
        f"Written by `python benchmarks/input_ranges.py` on {text}: calibrated on {CALIBRATION} windows of {LENGTH} tokens, measured on the "
        f"{HELD} behind them. Inputs behind norms are smoothed (alpha 0.5); weights stay as they are. Figures are relative squared errors "
        "of the linears' outputs at all tokens of a window but its first.",
        "",
        "Median of the 30 blocks, and the largest:",
        "",
        markdown(Table("", ("input of", *LEVELS), medians)),
        "The twelve inputs that lose most with one range for a window:",
        "",
        markdown(Table("", columns, largest)),
    ]
    return "\n".join(lines)


def _median(rows: list[dict[str, Any]], level: str) -> float:
    return torch.tensor([row[level] for row in rows]).median().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    named = load_text(parser.parse_args().text, "calibration")
    tokenizer = lowbit.load_tokenizer(MODEL)
    ids = tokenizer(named.text[:80_000], return_tensors="pt")["input_ids"][0]
    count = CALIBRATION + HELD
    rows = measure(lowbit.load(MODEL, dtype=torch.float32), ids[: count * LENGTH].reshape(count, LENGTH))
    (RESULTS / "input-ranges.json").write_text(
        json.dumps({"text": named.name, "inputs": rows}, indent=1) + "\n", encoding="utf-8"
    )
    (RESULTS / "input-ranges.md").write_text(page(rows, named.name), encoding="utf-8")


if __name__ == "__main__":
    main()
