"""Which method runs on which architecture, and which methods mix: found by running them, written into docs/matrix.md.

Every cell is a whole run on a random model of two blocks: quantize, save, load, compare the loaded model's logits. A cell
says that it works, or gives the reason with which it was refused before any work. `python tests/matrix.py` writes the
page; `--only METHOD...` runs the cells of these methods and keeps the others. tests/unit/methods/test_matrix.py checks every cell of the first table, and tests/unit/methods/test_mixes.py every mix, on one
architecture: that it is refused, or that work begins, and some run whole (see WHOLE_CELLS and WHOLE_MIXES; all of them in
`make exhaustive`). `python tests/matrix.py --everywhere [ARCHITECTURE]...` runs every mix on every architecture (hours)
and prints what is not as on the page.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection, Hashable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit.architectures import for_config
from lowbit.recipes import KV_FAMILY, METHODS

from helpers import sqnr_db
from laws.test_architectures import CASES
from pairwise import cases

QUANTIZERS = [name for name, method in METHODS.items() if method.family != KV_FAMILY]
"""Methods with steps. Those for caches have none, and go with every other: tests/unit/methods/test_caches.py."""
PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
WORKS = "works"
# What makes a run on a tiny model short and good enough to tell a result from noise; given to methods that have the option.
SMALL = {
    "bits": 4,
    "group_size": 16,
    "greedy_passes": 1,
    "epochs": 1,
    "steps": 2,
    "grid": 3,
    "windows": 1,
    "threshold_steps": 3,
    "batch": 2,
    "target_bits": 9.0,
    "mse": False,
    "ranges": "minmax",
    "rounds": 1,
    "tokens": 24,
}
OWN = {
    "smoothquant": {"bits": 8, "activation_bits": 8},
    "llm-int8": {"bits": 8},
    "omniquant": {"activation_bits": 8},
    "olive": {"activation_bits": 8},
    "onebit": {"normalize": False, "tokens": 0},
    "qllm": {"activation_bits": 8},
    "quarot": {"activation_bits": 8},
    "spinquant": {"activation_bits": 8},
}
PAIR_OPTIONS = {"clip": False}  # a searched clipping has its own cell, under the method itself
MIXED_ON = "llama grouped"
FLOORS = {"onebit": 1.0}  # 1 bit; least where the output of a block's parts is normalized before it is added
LOST = "quip+onebit", ("gemma2", "gemma3_text")
"""Signs of rotated random weights, and parts whose outputs are normalized: nothing of the logits is left (-0.1 dB; without the rotation
1.2). Elsewhere this mix has 12 dB."""
FLOOR = 6.0  # dB of the logits, at 4 bits on random weights; what does not work at all is below 3


def options_of(name: str) -> dict[str, Any]:
    """Options for a method or a mix ``a+b``; later methods decide."""
    parts = name.split("+")
    chosen = PAIR_OPTIONS if len(parts) > 1 else {}
    for part in parts:
        chosen = chosen | SMALL | OWN.get(part, {}) if part == parts[-1] else chosen | OWN.get(part, {})
    known = {key for part in parts for key in METHODS[part].options}
    return {key: value for key, value in chosen.items() if key in known}


def save_model(case: str, directory: Path) -> Any:
    """Saves a random model of the table ``case`` and returns it."""
    model_type, options = CASES[case]
    torch.manual_seed(0)
    if "moe_intermediate_size" in options:  # transformers' own expert kernels want rows of 16 bytes
        options = options | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    model.save_pretrained(directory)
    return model


class Begun(Exception):
    """All checks have passed and work begins, where no more is to be seen."""


def outcome(name: str, original: Any, model: Path, out: Path, whole: bool = True) -> str:
    """``works``, or the reason of the refusal. Anything but a ValueError before the first block is a failure.

    whole: false to stop where work begins, so that ``works`` only says that nothing refused it.
    """
    ids = torch.randint(3, 48, (4, 24), generator=torch.Generator().manual_seed(0))
    begun = False

    def progress(*_: Any) -> None:
        nonlocal begun
        begun = True
        if not whole:
            raise Begun

    try:
        recipe = lowbit.recipe(name, **options_of(name))
        report = lowbit.quantize(model, recipe, ids, out=out, max_kl=50, progress=progress)
    except Begun:
        return WORKS
    except ValueError as error:
        assert not begun, f"{name}: refused after work had begun: {error}"
        return str(error)
    assert report.coverage == 1.0 and report.layers, name
    with torch.no_grad():
        signal = sqnr_db(original(ids).logits, lowbit.load(out, torch.float32)(ids).logits)
    lost = name == LOST[0] and original.config.model_type in LOST[1]
    assert signal > (-0.5 if lost else FLOORS.get(name.split("+")[-1], FLOOR)), f"{name}: {signal:.1f} dB"
    return WORKS


@cache
def made_of(case: str) -> tuple[Hashable, ...]:
    """What the table of a case is made of: its linears, edges and norms, its residual stream, and how heads share keys."""
    model_type, options = CASES[case]
    table = for_config(AutoConfig.for_model(model_type, **options))
    assert table.heads is not None
    layout, edges = {linear.role: linear.layout for linear in table.linears}, {edge.name for edge in table.edges}
    return (
        *(layout.get(role) for role in ("qkv", "gate_up", "fc1", "expert_up", "shared_up")),
        ("norm_qkv" in edges, "norm_mlp" in edges),
        "q_k_unrotated" in edges,
        max(norm.gain_offset for norm in table.norms),
        table.residual.fixed,
        (table.heads.key_value == table.heads.query, table.heads.key_value == 1),
    )


@cache
def steps_of(name: str) -> tuple[Hashable, ...]:
    """What a method does: the kinds of its steps, and of its solver."""
    steps = lowbit.recipe(name, **options_of(name)).steps
    return *map(type, steps), *(type(step.solver) for step in steps if hasattr(step, "solver"))


def whole_cells() -> set[tuple[str, str]]:
    """Cells of the first table that run whole: every method with everything that tables are made of."""
    return set(cases(CASES, QUANTIZERS, traits=lambda case, name: (*made_of(case), name)))


def whole_mixes() -> set[str]:
    """Mixes that run whole: of those that work, all steps of one method with all steps of another."""
    mixed = read_page()[1]
    works = cases(
        QUANTIZERS,
        QUANTIZERS,
        where=lambda a, b: mixed.get(f"{a}+{b}") == WORKS,
        traits=lambda a, b: (steps_of(a), steps_of(b)),
    )
    return {f"{a}+{b}" for a, b in works}


def pairs() -> list[str]:
    return [f"{a}+{b}" for a in QUANTIZERS for b in QUANTIZERS if a != b]


def places() -> dict[str, list[str]]:
    """The mixes that the tests run on each architecture: every mix on one, every architecture with about twenty."""
    found: dict[str, list[str]] = {case: [] for case in CASES}
    for i, name in enumerate(pairs()):
        found[list(CASES)[i % len(CASES)]].append(name)
    return found


def differences(case: str, names: list[str], root: Path, whole: Collection[str]) -> list[str]:
    """What is not as on the page when the mixes ``names`` run on ``case``, those in ``whole`` to their end: a sentence each. A
    method that the page refuses on ``case`` is refused there in its mixes as well.
    """
    (alone, wanted), original, found = read_page(), save_model(case, root / "model"), []
    for name in names:
        with tempfile.TemporaryDirectory(dir=root) as out:
            try:
                said = generic(name, outcome(name, original, root / "model", Path(out) / "q", name in whole))
            except Exception as error:  # to be listed, whatever it is
                said = repr(error)
        of_one = {generic(name, alone[case][method]) for method in name.split("+")} - {WORKS}
        if said != wanted[name] and said not in of_one:
            found.append(f"{name} on {case}: {said}, and on {MIXED_ON}: {wanted[name]}")
    return found


def page(found: dict[str, dict[str, str]], mixed: dict[str, str]) -> str:
    """The page of all cells: of methods by architecture, and of mixes."""
    methods = QUANTIZERS
    reasons = [generic(name, said) for name, said in mixed.items() if said != WORKS]
    reasons += [said for row in found.values() for said in row.values() if said != WORKS]
    numbered = {reason: str(i + 1) for i, reason in enumerate(dict.fromkeys(reasons))}
    head = f"| | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}"
    rows = [f"| {case} | {' | '.join(numbered.get(row[m], row[m]) for m in methods)} |" for case, row in found.items()]

    def mark(a: str, b: str) -> str:
        said = "" if a == b else mixed[f"{a}+{b}"]
        return said if said in ("", WORKS) else numbered[generic(f"{a}+{b}", said)]

    mixes = [f"| {a} | {' | '.join(mark(a, b) for b in methods)} |" for a in methods]
    return "\n".join(
        [
            "# What runs on what, and what mixes with what",
            "",
            "Written by `make docs` from whole runs on random models of two blocks: quantized, saved, loaded, compared. "
            "`make exhaustive` runs every cell again, mixes on an architecture each; `make test` checks for every cell whether "
            "it is refused, and runs enough of them for every method to meet every kind of block, and every kind of step "
            "every other. A number is the reason of a refusal, below.",
            "",
            "## Methods by architecture",
            "",
            head,
            *rows,
            "",
            "## Mixes",
            "",
            f"`a+b` (row a, column b): the steps of a, then those of b, solved as b solves; on {MIXED_ON}.",
            "",
            head,
            *mixes,
            "",
            "## Reasons",
            "",
            *(f"{number}. {reason}" for reason, number in numbered.items()),
            "",
        ]
    )


def read_page() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The cells of the committed page: by case and method, and by mix; reasons spelled out, those of mixes as generic."""
    lines = PAGE.read_text().splitlines()
    reasons = dict(line.split(". ", 1) for line in lines[lines.index("## Reasons") :] if line[:1].isdigit())
    tables: list[dict[str, dict[str, str]]] = []
    for i, line in enumerate(lines):
        if line.startswith("| | "):
            columns, rows = [c.strip() for c in line.split("|")[2:-1]], {}
            for row in lines[i + 2 :]:
                if not row.startswith("| "):
                    break
                name, *cells = [cell.strip() for cell in row.split("|")[1:-1]]
                rows[name] = {c: reasons.get(cell, cell) for c, cell in zip(columns, cells, strict=True)}
            tables.append(rows)
    by_case, by_pair = tables
    return by_case, {f"{a}+{b}": cell for a, row in by_pair.items() for b, cell in row.items() if a != b}


def generic(name: str, reason: str) -> str:
    """The reason with the names of the two methods taken out, so that equal reasons are one."""
    a, b = name.split("+")
    return reason.replace(repr(name), "the mix").replace(f"{name}: ", "").replace(repr(a), "a").replace(repr(b), "b")


def main(only: Collection[str] = ()) -> None:
    """Writes the page; with ``only``, cells without one of these methods stay as they are on it."""
    names = set(only or QUANTIZERS)
    kept, kept_mixes = read_page() if only else ({}, {})
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        found: dict[str, dict[str, str]] = {}
        for case in CASES:
            original, row = save_model(case, root / case), dict(kept.get(case, {}))
            row |= {
                name: outcome(name, original, root / case, root / f"{case}-{name}")
                for name in QUANTIZERS
                if name in names
            }
            found[case] = row
            print(case, row, file=sys.stderr, flush=True)
        original = save_model(MIXED_ON, root / "mixed")
        mixed = dict(kept_mixes)
        for name in pairs():
            if names.intersection(name.split("+")):
                mixed[name] = outcome(name, original, root / "mixed", root / name)
                print(name, mixed[name], file=sys.stderr, flush=True)
    PAGE.write_text(page(found, mixed))


def everywhere(cases: list[str]) -> None:
    for case in cases or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            found = differences(case, pairs(), Path(scratch), pairs())
        print(f"{case}: {len(pairs())} mixes, {len(found)} not as on the page", *found, sep="\n  ", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--everywhere"]:
        everywhere(sys.argv[2:])
    elif sys.argv[1:2] in ([], ["--only"]):
        main(sys.argv[2:])
    else:
        sys.exit(f"expected --only METHOD..., --everywhere [ARCHITECTURE]... or nothing, found {sys.argv[1]}")
