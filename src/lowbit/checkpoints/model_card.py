"""The model card and the machine-readable report of a checkpoint: what it is, how it was made, what was measured.

Nothing in them depends on when or how fast a run was, so that a continued run writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

REPORT = "lowbit-report.json"


def write_card(directory: Path, report: Mapping[str, Any], header: Mapping[str, Any], model: str) -> None:
    """Writes ``README.md`` and ``lowbit-report.json`` into a checkpoint.

    Args:
        report: plain data of a run's report.
        header: what determines the result: versions, hashes of model and calibration, the recipe.
        model: what the original is called.
    """
    whole = {**report, "header": dict(header)}
    (directory / REPORT).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    (directory / "README.md").write_text(_card(report, header, model))


def _card(report: Mapping[str, Any], header: Mapping[str, Any], model: str) -> str:
    kl, agreement = report["kl"], report["top1_agreement"]
    rows = [
        ("bits per weight of the quantized linears, everything stored counted", f"{report['bits_per_weight']:.4f}"),
        ("bits per weight of the whole model", f"{report['model_bits_per_weight']:.4f}"),
        ("bytes of the weight files", f"{report['bytes']:,}"),
        ("bytes of the original's weights", f"{report['source_bytes']:,}"),
        ("share of the blocks' linear weights that are quantized", f"{report['coverage']:.1%}"),
        ("mean KL divergence from the original, nats a token", "not measured" if kl is None else f"{kl:.4f}"),
        ("top-1 agreement with the original", "not measured" if agreement is None else f"{agreement:.1%}"),
    ]
    worst = sorted((x for x in report["layers"] if x["error"] is not None), key=lambda x: -x["error"])[:10]
    front = yaml.safe_dump({"library_name": "transformers", "base_model": model, "tags": ["lowbit", "quantized"]})
    lines = [
        f"---\n{front}---",
        f"# {model}, quantized with lowbit",
        "",
        "Load it with `lowbit.load(DIR)`, or with transformers' `AutoModelForCausalLM.from_pretrained(DIR)` after "
        "`import lowbit`.",
        "",
        *(["**Broken**: " + "; ".join(report["problems"]), ""] if report["problems"] else []),
        "| measured | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "Divergence and agreement are over the first windows of the calibration text, while quantizing: an early warning, "
        "not an evaluation. `lowbit evaluate` measures on held-out text.",
        "",
        "## Recipe",
        "",
        f"```yaml\n{yaml.safe_dump(header['recipe'], sort_keys=False)}```",
        "",
        f"Calibration: {report['calibration']} (sha256 of the token ids {header['calibration']}). Original model: "
        f"fingerprint {header['model']}. lowbit {header['lowbit']}, torch {header['torch']}.",
        "",
        "## Layers with the largest relative output error",
        "",
        "| layer | bits per weight | relative squared output error |",
        "|---|---|---|",
        *(f"| {x['name']} | {x['bits_per_weight']:.3f} | {x['error']:.4g} |" for x in worst),
        *(["", "## Warnings", "", *(f"* {text}" for text in report["warnings"])] if report["warnings"] else []),
        "",
    ]
    return "\n".join(lines)
