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


RUN = "## How to run it"
_NATIVE = """```python
import lowbit

model, tokenizer = lowbit.load("."), lowbit.load_tokenizer(".")  # this directory; elsewhere, its path
prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(prompt, max_new_tokens=32)[0]))
```

* transformers: after `import lowbit`, `AutoModelForCausalLM.from_pretrained(".")` gives the packed model. Without that line it
  does not know the format and fails.
* A terminal: `lowbit generate . --prompt TEXT`, or `lowbit chat .` for a model that chats.
* A server with OpenAI's interface: `lowbit serve .`
* vLLM: `vllm serve .` where lowbit is installed beside it (`pip install --no-deps lowbit`). It says so if it cannot run a part.
* llama.cpp, and vLLM without lowbit: `lowbit export . --format gguf` (or `compressed-tensors`) writes what they read."""
_WITH = {
    "compressed-tensors": (
        "* vLLM: `vllm serve .`; on a CPU with other widths than 4 bits, where lowbit is installed beside it.\n"
        '* transformers, with `pip install compressed-tensors`: `AutoModelForCausalLM.from_pretrained(".")`; where there are zero '
        "points, with `quantization_config=CompressedTensorsConfig(dequantize=True)`."
    ),
    "gptq": '* transformers, with `pip install optimum gptqmodel`: `AutoModelForCausalLM.from_pretrained(".")`.',
    "awq": '* transformers, with `pip install gptqmodel`: `AutoModelForCausalLM.from_pretrained(".")`.',
}
"""How the files of other formats are run, by the format's name."""
_PACKED = '* lowbit, packed and on CPUs: `lowbit generate . --prompt TEXT`, `lowbit serve .`, or `lowbit.load(".")` in Python.'
_CACHE = (
    "`generate` packs keys and values, unless the call brings a cache or names one. A plain `model(ids, use_cache=True)` makes "
    "transformers' own cache, which is not packed; pass `lowbit.kv_cache(model, ...)` there."
)
_WORST = (
    "## Layers with the largest relative output error",
    "",
    "| layer | bits per weight | relative squared output error |",
    "|---|---|---|",
)
_NARROWED = "Tensors that are not quantized are stored in at most the width of "
_KEPT = ("license", "license_name", "license_link", "language")


def write_card(directory: Path, report: Mapping[str, Any], header: Mapping[str, Any], model: str, source: Path) -> None:
    """Writes ``README.md`` and ``lowbit-report.json`` into a checkpoint.

    Args:
        report: plain data of a run's report.
        header: what determines the result: versions, hashes of model and calibration, the recipe.
        model: what the original is called.
        source: the original's directory, whose own card and config say its licence and where it is from.
    """
    whole = {**report, "header": dict(header)}
    (directory / REPORT).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    (directory / "README.md").write_text(_card(report, header, model, source))


def rewrite_card(directory: Path, format_name: str) -> None:
    """Makes the card of a checkpoint that was exported say how files of this format are run.

    Args:
        directory: the exported files; without a card that lowbit wrote, nothing is done.
        format_name: of the file format.
    """
    card = directory / "README.md"
    if format_name not in _WITH or not card.is_file():
        return
    before, heading, after = card.read_text(encoding="utf-8").partition(f"{RUN}\n")
    _, rest, following = after.partition("\n## ")
    if heading and rest:
        said = f"{before}{heading}\n{_WITH[format_name]}\n{_PACKED}\n{rest}{following}"
        card.write_text(said.replace("\n- lowbit\n", f"\n- lowbit\n- {format_name}\n", 1), encoding="utf-8")


def _front(model: str, source: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a hub reads: kind, licence, origin and tags. An origin that is no hub id is left out, as a hub refuses it."""
    theirs = _front_of(source / "README.md")
    config = source / "config.json"
    named = json.loads(config.read_text()).get("_name_or_path") if config.is_file() else None
    origin = next((name for name in (model, theirs.get("base_model"), named) if _is_hub_id(name)), None)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {key: theirs[key] for key in _KEPT if key in theirs}
    if origin is not None:
        front |= {"base_model": origin, "base_model_relation": "quantized"}
    tags = ["lowbit", "quantized", *([f"{report['asked_bits']:.0f}-bit"] if report["layers"] else ())]
    chats = (source / "chat_template.jinja").is_file()
    return front | {"tags": [*tags, *(["conversational"] if chats else ())]}


def _front_of(card: Path) -> dict[str, Any]:
    """The front matter of a model card; empty where there is none that can be read."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _card(report: Mapping[str, Any], header: Mapping[str, Any], model: str, source: Path) -> str:
    kl, agreement = report["kl"], report["top1_agreement"]
    of_linears = [
        ("bits of a code, as the recipe asks", f"{report['asked_bits']:.4g}"),
        ("bits per weight of the quantized linears, everything stored counted", f"{report['bits_per_weight']:.4f}"),
    ]
    bits, written = report.get("cache_bits"), report.get("generated_text")
    of_cache = [("bits for each number of the cache of keys and values, everything stored counted", f"{bits or 0:.4g}")]
    rows = [
        *(of_linears if report["layers"] else ()),
        *(of_cache if bits is not None else ()),
        ("bits per weight of the whole model", f"{report['model_bits_per_weight']:.4f}"),
        ("bytes of the weight files", f"{report['bytes']:,}"),
        ("bytes of the original's weights", f"{report['source_bytes']:,}"),
        ("share of the blocks' linear weights that are quantized", f"{report['coverage']:.1%}"),
        ("mean KL divergence from the original, nats a token", "not measured" if kl is None else f"{kl:.4f}"),
        ("top-1 agreement with the original", "not measured" if agreement is None else f"{agreement:.1%}"),
    ]
    worst = sorted((x for x in report["layers"] if x["error"] is not None), key=lambda x: -x["error"])[:10]
    front = yaml.safe_dump(_front(model, source, report), sort_keys=False)
    lines = [
        f"---\n{front}---",
        f"# {model}, quantized with lowbit",
        "",
        *(["**Broken**: " + "; ".join(report["problems"]), ""] if report["problems"] else []),
        RUN,
        "",
        _NATIVE,
        "",
        *([_CACHE, ""] if bits is not None else []),
        "## What it costs",
        "",
        "| measured | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f"Divergence and agreement are measured on {report['measured_on']}: an early warning, not an evaluation.",
        "",
        "## Recipe",
        "",
        f"```yaml\n{yaml.safe_dump(header['recipe'], sort_keys=False)}```",
        "",
        *([f"Calibration text that a model wrote: {written['summary']}.", ""] if written else []),
        f"Calibration: {report['calibration']} (sha256 of the token ids {header['calibration']}). Original model: "
        f"fingerprint {header['model']}. Its products were in {header['products']} (`compute: float32` in a recipe makes them "
        f"exact). lowbit {header['lowbit']}, torch {header['torch']}.",
        "",
        *([] if header["keep_dtype"] == "auto" else [f"{_NARROWED}{header['keep_dtype']}.", ""]),
        *(_WORST if worst else ()),
        *(f"| {x['name']} | {x['bits_per_weight']:.3f} | {x['error']:.4g} |" for x in worst),
        *(["", "## Warnings", "", *(f"* {text}" for text in report["warnings"])] if report["warnings"] else []),
        "",
    ]
    return "\n".join(lines)
