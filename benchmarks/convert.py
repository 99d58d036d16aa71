"""Lines of the script that `lowbit compare` replaced (benchmarks/perplexity.py), as records of `lowbit compare`.

    python benchmarks/convert.py OLD.jsonl --calibration wikitext2.valid.raw --text wikitext2.test.raw \
        --grid benchmarks/weight_only.yaml --grid benchmarks/weight_activation.yaml

A line goes to `benchmarks/results/<grid>.jsonl`, as the row of that grid with the same recipe, whatever it was called. Every
figure is kept; KL and agreement on the evaluation text were not measured and stay empty. Lines that are there already
are left out, so the command can be repeated. The same command with `lowbit compare --grid` then measures the other rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lowbit import load_tokenizer
from lowbit.checkpoints.source import open_model
from lowbit.comparison import read_grid
from lowbit.comparison.results import Results
from lowbit.comparison.table import markdown
from lowbit.data import calibration_of
from lowbit.evaluation.perplexity import windows_sha256
from lowbit.evaluation.windows import cut
from lowbit.numerics import to_dict
from lowbit.report import MAX_KL
from lowbit.texts import load_text

RESULTS = Path(__file__).parent / "results"
MODEL, WINDOWS, SEQ_LEN, SAMPLES, CALIBRATION_LEN = "smollm2-135m", 20, 1024, 32, 512  # the old script's constants
KEPT = ("recipe", "perplexity", "bits_per_weight", "calibration_kl", "bytes", "quantize_seconds", "peak_rss_bytes")


def common_fields(calibration: str, text: str) -> dict[str, Any]:
    """What all lines have in common: model, protocol and calibration, with the hashes that `lowbit compare` asks for."""
    source, named = open_model(MODEL), load_text(text, "evaluation")
    pieces = cut(named.text, load_tokenizer(MODEL), "gptq", SEQ_LEN, WINDOWS)
    used = calibration_of(source, calibration, SAMPLES, CALIBRATION_LEN)
    protocol = {"name": "gptq", "text": named.name, "windows": WINDOWS, "seq_len": SEQ_LEN}
    return {
        "model": {"name": source.name, "sha256": source.fingerprint},
        "protocol": protocol | {"sha256": windows_sha256(pieces, SEQ_LEN)},
        "calibration": {"text": used.name, "windows": SAMPLES, "tokens": CALIBRATION_LEN, "sha256": used.sha256},
    }


def converted(line: dict[str, Any], label: str, common: dict[str, Any]) -> dict[str, Any]:
    used = common["calibration"]
    expected = f"{used['text']}, [{used['windows']}, {used['tokens']}]"
    if line["calibration"] != expected:
        raise SystemExit(f"{line['setting']}: calibrated on {line['calibration']}, and --calibration is {expected}")
    broken = line["calibration_kl"] is not None and not line["calibration_kl"] <= MAX_KL
    return {
        **common,
        **{key: line[key] for key in KEPT},
        "label": label,
        "perplexity_interval": line["interval"],
        "tokens": WINDOWS * (SEQ_LEN - 1),
        "problems": [f"KL over {MAX_KL:g} on the calibration text"] if broken else [],
        "machine": {"cpu": "a shared machine with 2 cores", "threads": line["threads"]},
        "versions": {"lowbit": line["lowbit"], "torch": line["torch"]},
        # Its peak of memory is of a process that may have made several rows before.
        "converted": {"from": "benchmarks/perplexity.py", "setting": line["setting"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="+", type=Path)
    parser.add_argument("--grid", required=True, action="append", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    arguments = parser.parse_args()
    grids = {path: read_grid(path) for path in arguments.grid}
    common = common_fields(arguments.calibration, arguments.text)
    records: dict[Path, list[dict[str, Any]]] = {path: [] for path in grids}
    for line in (json.loads(line) for path in arguments.old for line in path.read_text().splitlines()):
        found = [(path, row) for path, rows in grids.items() for row in rows if to_dict(row.recipe) == line["recipe"]]
        if not found:
            raise SystemExit(f"{line['setting']}: no row of the grids has this recipe; add one, nothing was written")
        path, row = found[0]
        records[path].append(converted(line, row.label, common))
    for path, new in records.items():
        results = Results(RESULTS / f"{path.stem}.jsonl")
        added = [results.add(record)["label"] for record in new if results.latest(record) is None]
        page = markdown(results.all_latest(), [row.label for row in grids[path]])
        results.path.with_suffix(".md").write_text(page, encoding="utf-8")
        print(f"{results.path}: {len(added)} added, {len(new) - len(added)} were there: {'; '.join(added)}")


if __name__ == "__main__":
    main()
