"""QLoRA beside LoRA in full precision: held-out loss, memory and speed on Python's own documentation.

    python benchmarks/qlora.py [--only LABEL]... [--tokens N] [--memory] [--table]

Every row trains in a process of its own, on one thread, on the same windows in the same order, with the same rank, alpha, learning
rate, schedule and limit of the gradient. LoRA is peft's, on transformers' model; QLoRA is ``lowbit.train`` on a checkpoint that
``lowbit.quantize`` packed in another process. Both measure, train, and write what they trained. The training text is one part of
Python's documentation, the held-out text the other; they share no paragraph. Rows with ``memory`` take a few steps only, and those
named wide train a random Llama of width 2048, whose weights outweigh its activations.

Memory is the resident set of the process at its peak above what it held after its imports. glibc keeps freed tensors up to 32 MB for
later, in pieces that larger ones do not fit in; ``MALLOC_MMAP_THRESHOLD_`` gives those of half a megabyte and more back at once, in
every row. Results go to benchmarks/results/qlora.{json,md}; rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, SCRATCH = HERE / "results", HERE.parent / "build" / "qlora"
MODEL, WIDE = "smollm2-135m", "wide"
SEQ_LEN, HELD_OUT, RANK, ALPHA, LR, ACCUMULATE, CLIP = 512, 4, 16, 16.0, 1e-3, 1, 0.3
FEW = 2 * SEQ_LEN  # tokens of a row that measures memory alone
COLUMNS = (
    *("row", "loss before", "after", "tokens/s", "processor s"),
    *("weights, MB", "peak, MB", "of float32's", "of bfloat16's"),
)
GPTQ: dict[str, Any] = {"base": "gptq", "bits": 4, "group_size": 64}
BASES: dict[str, dict[str, Any]] = {
    "nf4": {},
    "gptq": GPTQ,
    "gptq-calibrated": GPTQ | {"start": "calibrated"},
    "owq": GPTQ | {"base": "owq"},
}


def _row(label: str, how: str, **more: Any) -> dict[str, Any]:
    return {"label": label, "how": how, "model": MODEL, "recompute": True, "memory": False} | more


ROWS = [
    _row("LoRA, float32", "lora", dtype="float32"),
    _row("QLoRA, NF4", "qlora", base="nf4"),
    _row("QLoRA, GPTQ 4 bits", "qlora", base="gptq"),
    _row("QLoRA, GPTQ 4 bits, calibrated start", "qlora", base="gptq-calibrated"),
    _row("QLoRA, OWQ 4 bits", "qlora", base="owq"),
    _row("LoRA, bfloat16", "lora", dtype="bfloat16"),
    _row("LoRA, float32, activations kept", "lora", dtype="float32", recompute=False, memory=True),
    _row("QLoRA, NF4, activations kept", "qlora", base="nf4", recompute=False, memory=True),
    _row("wide: LoRA, float32", "lora", dtype="float32", model=WIDE, memory=True),
    _row("wide: LoRA, bfloat16", "lora", dtype="bfloat16", model=WIDE, memory=True),
    _row("wide: QLoRA, NF4", "qlora", base="nf4", model=WIDE, memory=True),
]


# In processes of their own


class Memory:
    """Peaks of the resident set by phase, in bytes above what the process held when this was made, and when each phase began."""

    def __init__(self, phase: str):
        import psutil

        from lowbit.evaluation import reset_peak_rss

        assert reset_peak_rss(), "this system does not tell peaks of parts of a run"
        self.held, self.phase, self.peaks = psutil.Process().memory_info().rss, phase, dict[str, int]()

    def enter(self, phase: str) -> None:
        """Ends the phase at hand."""
        from lowbit.evaluation import peak_rss, reset_peak_rss

        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), peak_rss() - self.held)
        if phase != self.phase:
            reset_peak_rss()
        self.phase = phase


def pack(row: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    """A packed checkpoint with terms that are not trained."""
    import lowbit

    recipe = lowbit.recipe("qlora", **BASES[row["base"]], rank=RANK, alpha=ALPHA, tokens=0, measures=0)
    lowbit.quantize(original(row), recipe, ids["calibration"], out=packed(row), allow_broken=True, max_kl=1e9)
    return {}


def qlora(row: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    import torch

    import lowbit
    import lowbit.retraining
    from lowbit.data import Calibration, ids_sha256
    from lowbit.evaluation import model_bytes

    recipe = lowbit.recipe(
        "qlora", **BASES[row["base"]], rank=RANK, alpha=ALPHA, tokens=ids["train"].numel(), seq_len=SEQ_LEN, lr=LR,
        accumulate=ACCUMULATE, recompute=row["recompute"], measures=0,
    )  # fmt: skip
    text = Calibration(
        ids["calibration"], "python-docs", ids_sha256(ids["train"]), held_out=ids["held_out"], further=ids["train"]
    )
    memory, times = Memory("loading"), []

    def progress(done: int, total: int, text: str) -> None:
        memory.enter(text.split(",")[0])
        if text.startswith("training"):
            times.append((time.perf_counter(), time.process_time()))

    out = SCRATCH / f"{packed(row).name}-trained"
    subprocess.run(["rm", "-rf", str(out)], check=True)
    report = lowbit.train(packed(row), recipe, text, out=out, progress=progress, restart=True)
    memory.enter("end")
    weights = model_bytes(lowbit.load(packed(row), dtype=torch.float32))  # as it is trained
    return _result(memory, report.loss_before, report.loss, times, weights)


def lora(row: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401  (an import is not what is measured)

    import lowbit
    from lowbit.evaluation import model_bytes
    from lowbit.recipes import Train
    from lowbit.stages.descent import step_windows
    from lowbit.training import Group

    stage = next(each for each in lowbit.recipe("qlora", tokens=ids["train"].numel(), lr=LR, accumulate=ACCUMULATE).stages
                 if isinstance(each, Train))  # fmt: skip
    memory, times = Memory("loading"), []
    model: Any = AutoModelForCausalLM.from_pretrained(original(row), dtype=getattr(torch, row["dtype"])).eval()
    weights = model_bytes(model)
    before = _loss(model, ids["held_out"])
    memory.enter("training")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    if row["recompute"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    leaves = [each for each in model.parameters() if each.requires_grad]
    steps = step_windows(stage, len(ids["train"]), SEQ_LEN, 0)
    optimizer = stage.optimizer.make([Group(leaves)], LR)
    schedule = stage.schedule.make(optimizer, len(steps))
    times.append((time.perf_counter(), time.process_time()))
    for windows in steps:
        optimizer.zero_grad()
        for w in windows:
            some = ids["train"][w : w + 1]
            (model(input_ids=some, labels=some, use_cache=False).loss / len(windows)).backward()
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        schedule.step()
        times.append((time.perf_counter(), time.process_time()))
    memory.enter("measuring")
    model.save_pretrained(SCRATCH / "lora")
    after = _loss(model.eval(), ids["held_out"])
    memory.enter("end")
    return _result(memory, before, after, times, weights) | {"trained": sum(leaf.numel() for leaf in leaves)}


def _loss(model: Any, ids_NT: Any) -> float:
    import torch

    with torch.no_grad():
        logits = (model(input_ids=ids[None], use_cache=False).logits[0, :-1].float() for ids in ids_NT)
        losses = [torch.nn.functional.cross_entropy(y, ids[1:]) for y, ids in zip(logits, ids_NT, strict=True)]
    return torch.stack(losses).mean().item()


def _result(
    memory: Memory, before: float, after: float, times: list[tuple[float, float]], weights: int
) -> dict[str, Any]:
    wall, processor = (times[-1][i] - times[0][i] for i in (0, 1))
    return {
        "loss_before": before,
        "loss": after,
        "seconds": wall,
        "processor_seconds": processor,
        "weights_bytes": weights,
        "peaks": memory.peaks,
        "peak_bytes": max(memory.peaks.values()),
    }


# Around them


def original(row: dict[str, Any]) -> str:
    """The directory of the model, which is made where it is the random one."""
    from lowbit.checkpoints.source import open_model

    if row["model"] == MODEL:
        return str(open_model(MODEL).path)
    place = SCRATCH / WIDE
    if not (place / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16}
        LlamaForCausalLM(LlamaConfig(vocab_size=4096, **shape)).save_pretrained(place)
    return str(place)


def packed(row: dict[str, Any]) -> Path:
    return SCRATCH / f"{row['model']}-{row['base']}"


def windows_of(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Windows ``[N, SEQ_LEN]`` to calibrate, to measure and to train on."""
    import torch

    from lowbit.checkpoints.source import open_model
    from lowbit.data import bos_token, tokenize, windows
    from lowbit.texts import load_text

    count = (FEW if row["memory"] else tokens) // SEQ_LEN
    if row["model"] == WIDE:
        cut = torch.randint(4096, (3 + count, SEQ_LEN), generator=torch.Generator().manual_seed(0))
        return {"calibration": cut[:1], "held_out": cut[1:3], "train": cut[3:]}
    tokenizer = open_model(MODEL).tokenizer()
    own, other = (tokenize(load_text("python-docs", part).text, tokenizer) for part in ("calibration", "evaluation"))
    bos = bos_token(tokenizer, "auto")
    cut = windows(own, SEQ_LEN, 8 + count, bos=bos)
    held_out = windows(other, SEQ_LEN, 2 if row["memory"] else HELD_OUT, bos=bos)
    return {"calibration": cut[:8], "held_out": held_out, "train": cut[8:]}


def child(what: str, row: dict[str, Any], tokens: int) -> None:
    import torch

    torch.set_num_threads(1)
    work: Callable[..., dict[str, Any]] = {"pack": pack, "lora": lora, "qlora": qlora}[what]
    print(json.dumps(work(row, windows_of(row, tokens))))


def run(what: str, row: dict[str, Any], tokens: int) -> dict[str, Any]:
    arguments = [sys.executable, __file__, "--child", what, "--row", json.dumps(row), "--tokens", str(tokens)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**19)}
    output = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout
    return json.loads(output.splitlines()[-1])


def cells(line: dict[str, Any], peaks: dict[str, int]) -> tuple[str, ...]:
    """A row of the table."""
    start, end = ("wide: " if line["model"] == WIDE else ""), ("" if line["recompute"] else ", activations kept")
    shares = [peaks.get(f"{start}LoRA, {dtype}{end}") for dtype in ("float32", "bfloat16")]
    losses = ["", ""] if line["memory"] else [f"{line['loss_before']:.4f}", f"{line['loss']:.4f}"]
    return (
        *(line["label"], *losses, f"{line['tokens'] / line['seconds']:.0f}", f"{line['processor_seconds']:.0f}"),
        *(f"{line['weights_bytes'] / 1e6:.0f}", f"{line['peak_bytes'] / 1e6:.0f}"),
        *("" if share is None else f"{line['peak_bytes'] / share:.3f}" for share in shares),
    )


def write(lines: list[dict[str, Any]]) -> None:
    """The file of results and its page."""
    from lowbit.tables import Table, markdown

    (RESULTS / "qlora.json").write_text(json.dumps({"rows": lines}, indent=1) + "\n")
    peaks = {line["label"]: line["peak_bytes"] for line in lines}
    tokens = max((line["tokens"] for line in lines if not line["memory"]), default=0)
    page = [
        "# QLoRA beside LoRA",
        "",
        f"Written by `python benchmarks/qlora.py`: rank {RANK}, alpha {ALPHA:g}, AdamW at {LR:g}, windows of {SEQ_LEN} "
        f"tokens, {ACCUMULATE} a step, one thread. Losses in nats a token are of held-out text. The peak is the resident set of the "
        "whole process (loading, measuring, training, saving) above what it held after its imports. Blocks run again in the backward "
        "pass, except where activations are kept.",
        "",
        markdown(Table("", COLUMNS, tuple(cells(line, peaks) for line in lines)).filled()),
        f"Rows with losses train on {tokens:,} tokens, the others on {FEW:,}. Machines: "
        f"{'; '.join(sorted({line['machine'] for line in lines}))}, busy with other work.",
        "",
    ]
    (RESULTS / "qlora.md").write_text("\n".join(page))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="label of a row; may be repeated")
    parser.add_argument("--tokens", type=int, default=16384, help="of training, in each row (default: 16384)")
    parser.add_argument("--memory", action="store_true", help="take a few steps only in each row, for its memory")
    parser.add_argument("--table", action="store_true", help="write the table anew; nothing is measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.row, arguments.tokens)
        return
    from lowbit.evaluation.machine import machine

    SCRATCH.mkdir(parents=True, exist_ok=True)
    file, cpu = RESULTS / "qlora.json", machine()["cpu"]
    lines = json.loads(file.read_text())["rows"] if file.exists() else []
    for row in ROWS:
        row["memory"] |= arguments.memory
        tokens = FEW if row["memory"] else arguments.tokens
        known = any(x["label"] == row["label"] and x["tokens"] == tokens for x in lines)
        if known or arguments.table or (arguments.only and row["label"] not in arguments.only):
            continue
        if row["how"] == "qlora" and not (packed(row) / "config.json").exists():
            run("pack", row, tokens)
        line = row | {"tokens": tokens, "machine": cpu} | run(row["how"], row, tokens)
        lines = [*(x for x in lines if x["label"] != row["label"]), line]
        lines.sort(key=lambda x: [each["label"] for each in ROWS].index(x["label"]))
        write(lines)
        print(f"{row['label']}: loss {line['loss']:.4f}, peak {line['peak_bytes'] / 1e6:.0f} MB", flush=True)
    if arguments.table:
        write(lines)


if __name__ == "__main__":
    main()
