"""Seconds, processor time, peak memory and perplexity of quantizing a model, beside other tools, in turns in one run.

    python benchmarks/quantize.py [--model smollm2-135m] [--rows gptq rtn llm-compressor-bf16 ...]
        [--calibration FILE] [--evaluation FILE] [--rounds 1] [--busy] [--environments DIR]

Every row is a process of its own (quantize_child.py) and sees the same tokens. Another tool has an environment of its own,
made in DIR at its first row; where that cannot be, the row is left out with a message. --busy keeps one core at work meanwhile,
which is how most machines are. Results go to benchmarks/results/quantize.{json,md}.

    python benchmarks/quantize.py --growth

times two random blocks of the shapes of models with 135M, 360M and 1.7B parameters, and of 7B (six blocks), against what
`lowbit plan` foretells. Results go to benchmarks/results/quantize-growth.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.__main__ import SPINS
from lowbit.checkpoints.locate import locate
from lowbit.checkpoints.tokenizer import load_tokenizer
from lowbit.data import tokenize, windows
from lowbit.evaluation.machine import machine
from lowbit.plan import plan
from lowbit.recipes import recipe
from lowbit.tables import Table, markdown
from lowbit.texts import Split, load_text

RESULTS = Path(__file__).parent / "results"
CHILD = Path(__file__).with_name("quantize_child.py")
PLAIN = Path(__file__).parent / "recipes" / "w4-plain-tuned.yaml"
W4 = {"bits": 4, "group_size": 64}
RIVAL = W4 | {"symmetric": False}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("lowbit", {"method": "gptq"} | W4),
    "rtn": ("lowbit", {"method": "rtn"} | W4),
    "awq": ("lowbit", {"method": "awq"} | W4),
    "owq": ("lowbit", {"method": "owq"} | W4),
    "spqr": ("lowbit", {"method": "spqr"} | W4),
    "squeezellm": ("lowbit", {"method": "squeezellm", "bits": 4}),
    "quip": ("lowbit", {"method": "quip", "bits": 4}),
    "autoround": ("lowbit", {"method": "autoround", "steps": 100} | W4),
    "autoround-by-token": ("lowbit", {"method": "autoround", "steps": 100, "batch": 4, "by_token": True} | W4),
    "autoround-by-token-3-bits": (
        "lowbit",
        {"method": "autoround", "steps": 100, "batch": 4, "by_token": True} | W4 | {"bits": 3},
    ),
    "omniquant": ("lowbit", {"method": "omniquant"} | W4),
    "plain-tuned": ("lowbit", {"recipe": str(PLAIN), "format": "compressed-tensors"}),
    "llm-compressor-bf16": ("llm-compressor", RIVAL | {"dtype": "bfloat16"}),
    "llm-compressor-fp32": ("llm-compressor", RIVAL | {"dtype": "float32"}),
    "gptqmodel": ("gptqmodel", RIVAL | {"dtype": "bfloat16"}),
    "auto-round": ("auto-round", RIVAL | {"steps": 100, "batch": 8, "dtype": "bfloat16"}),
}
DEFAULT = ("gptq", "rtn", "llm-compressor-bf16", "llm-compressor-fp32")
PACKAGES = {"llm-compressor": "llmcompressor", "auto-round": "auto-round", "gptqmodel": "gptqmodel"}
SHAPES = {  # width, MLP, heads, key-value heads, blocks
    "135M": (576, 1536, 9, 3, 2),
    "360M": (960, 2560, 15, 5, 2),
    "1.7B": (2048, 8192, 32, 32, 2),
    "7B": (4096, 11008, 32, 32, 6),
}


def interpreter(tool: str, environments: Path) -> str | None:
    """An interpreter that has ``tool``; made where there is none. None, with a message, where it cannot be made."""
    if tool == "lowbit":
        return sys.executable
    place = environments / tool
    python = place / "bin" / "python"
    if not (place / "made").exists():
        shutil.rmtree(place, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(place)],
            *([str(python), "-m", "pip", "install", "--quiet", each] for each in ("torch==2.13.0", PACKAGES[tool])),
        ):
            if subprocess.run(command).returncode:
                Console().print(f"left out: {tool}, whose environment cannot be made ({' '.join(command)} failed)")
                return None
        (place / "made").touch()
    return str(python)


def measured(python: str, tool: str, options: dict[str, Any], model: str, ids: Path) -> dict[str, Any] | None:
    """One run; None, with a message, if it fails."""
    with tempfile.TemporaryDirectory() as place:
        command = [python, str(CHILD), tool, model, str(ids), f"{place}/out", "--options", json.dumps(options)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if tool == "lowbit":
            environment = {"GOMP_SPINCOUNT": SPINS} | environment  # as the command lowbit sets it
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        Console().print(f"left out: {tool} {options} failed:\n{run.stderr[-2000:]}", markup=False)
        return None
    return json.loads(run.stdout.strip().splitlines()[-1])


def token_ids(arguments: argparse.Namespace, path: Path) -> None:
    """Writes the windows that every tool sees."""
    tokenizer = load_tokenizer(arguments.model)

    def tokens(text: str, split: Split, samples: int, seq_len: int) -> torch.Tensor:
        return windows(tokenize(load_text(text, split).text, tokenizer), seq_len, samples)

    calibration = tokens(arguments.calibration, "calibration", arguments.samples, arguments.seq_len)
    save_file(
        {"calibration": calibration, "evaluation": tokens(arguments.evaluation, "evaluation", arguments.windows, 1024)},
        path,
    )


def compare(arguments: argparse.Namespace) -> None:
    """All rows in turns."""
    found: dict[str, list[dict[str, Any]]] = {}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as place:
        ids = Path(place) / "ids.safetensors"
        token_ids(arguments, ids)
        model = str(locate(arguments.model)[1])
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if arguments.busy else None
        try:
            for _ in range(arguments.rounds):
                for name in arguments.rows:
                    tool, options = ROWS[name]
                    python = interpreter(tool, arguments.environments)
                    result = None if python is None else measured(python, tool, options, model, ids)
                    if result is not None:
                        found.setdefault(name, []).append(result)
                        Console().print(f"{name}: {result['seconds']:.1f} s, perplexity {result['perplexity']:.3f}")
        finally:
            if busy is not None:
                busy.kill()
    rows = {
        name: {key: median(each[key] for each in runs) for key in runs[0] if key != "version"}
        | {"tool": f"{ROWS[name][0]} {runs[0]['version']}"}
        for name, runs in found.items()
    }
    base = next((rows[name]["seconds"] for name in rows if ROWS[name][0] == "llm-compressor"), None)
    cells = tuple(
        (
            name,
            row["tool"],
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / base:.2f}" if base else "",
            f"{row['processor_seconds']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['perplexity']:.3f}",
        )
        for name, row in rows.items()
    )
    lines = [
        f"# Quantizing {arguments.model}: 4 bits in groups of 64, {arguments.samples} windows of {arguments.seq_len} tokens",
        "",
        f"Written by `python benchmarks/quantize.py{' --busy' if arguments.busy else ''}`: medians of {arguments.rounds} rounds in "
        f"turns. Perplexity: {arguments.windows} windows of 1,024 tokens of {Path(arguments.evaluation).name}.",
        f"Seconds are of quantizing and saving alone. {'One core was kept busy. ' if arguments.busy else ''}Load average before "
        f"and after: {loads[0]:.1f} and {os.getloadavg()[0]:.1f}.",
        "",
        markdown(Table("", COMPARED, cells)),
    ]
    write("quantize-busy" if arguments.busy else "quantize", rows, lines)


COMPARED = ("", "tool", "seconds", "x llm-compressor", "processor seconds", "peak memory, GB", "perplexity")
GROWING = ("shape", "blocks", "seconds a block", "ns a weight", "peak memory, GB", "planned, GB")


def growth(arguments: argparse.Namespace) -> None:
    """Random models of growing shapes."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in arguments.shapes:
            width, mlp, heads, shared, blocks = SHAPES[name]
            config = LlamaConfig(
                vocab_size=1024,
                hidden_size=width,
                intermediate_size=mlp,
                num_attention_heads=heads,
                num_key_value_heads=shared,
                num_hidden_layers=blocks,
                tie_word_embeddings=True,
            )
            directory, ids = Path(place) / name, Path(place) / "ids.safetensors"
            torch.manual_seed(0)
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
            windows = torch.randint(0, 1024, (arguments.samples + 1, arguments.seq_len))
            save_file({"calibration": windows[1:].contiguous(), "evaluation": windows[:1].contiguous()}, ids)
            options = {"method": "gptq", "bits": 4, "group_size": 128}
            told = plan(
                str(directory),
                recipe("gptq", bits=4, group_size=128),
                samples=arguments.samples,
                seq_len=arguments.seq_len,
            )
            result = measured(sys.executable, "lowbit", options, str(directory), ids)
            if result is not None:
                weights = blocks * (2 * width * width + 2 * width * width * shared // heads + 3 * width * mlp)
                rows[name] = result | {"blocks": blocks, "weights": weights, "planned_bytes": told.peak_ram_bytes}
                Console().print(f"{name}: {result['seconds'] / blocks:.1f} s a block")
            shutil.rmtree(directory)
    cells = tuple(
        (
            name,
            str(row["blocks"]),
            f"{row['seconds'] / row['blocks']:.1f}",
            f"{1e9 * row['seconds'] / row['weights']:.0f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['planned_bytes'] / 1e9:.2f}",
        )
        for name, row in rows.items()
    )
    lines = [
        f"# GPTQ, 4 bits in groups of 128, {arguments.samples} windows of {arguments.seq_len} tokens: growth with the model",
        "",
        "Written by `python benchmarks/quantize.py --growth`: random weights in bfloat16, a vocabulary of 1,024.",
        "",
        markdown(Table("", GROWING, cells)),
    ]
    write("quantize-growth", rows, lines)


def write(name: str, rows: dict[str, dict[str, Any]], lines: list[str]) -> None:
    """The table, on the screen, as JSON and as Markdown."""
    about = machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [*lines, f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, commit {commit}"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"rows": rows, "machine": about, "commit": commit}, indent=1) + "\n"
    )
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    Console().print("\n".join(lines), markup=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=DEFAULT)
    parser.add_argument("--calibration", default="wikitext2", help="a text, as for lowbit quantize")
    parser.add_argument("--evaluation", default="wikitext2", help="likewise; another part of a text that has parts")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20, help="of the evaluation")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--environments", type=Path, default=Path("build/environments"))
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    growth(arguments) if arguments.growth else compare(arguments)


if __name__ == "__main__":
    main()
