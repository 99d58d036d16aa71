"""Whether a change of the code changes a single byte of what lowbit writes. The safety net of a refactoring.

``make identity BASE=<commit>``, or ``python tests/identity.py --base <commit>``: the runs of tests/identity_runs.py are
executed with the lowbit of BASE and with that of the working tree (HEAD), one thread each, and the sha256 of every weight
file is compared, and of what the loaded checkpoints compute. Exit status 1 where anything differs, is missing or failed.

Everything is kept in ``build/identity``: models, a checkout of BASE while it runs, and BASE's results and outputs, which
serve the next comparison for as long as runs, models, versions and kernels stay the same. ``--fresh`` makes them again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from identity_runs import LINEAR, MODELS, RUNS, Run

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "identity"
SIDE = Path(__file__).with_name("identity_side.py")
SOURCES = ("CMakeLists.txt", "*.cpp", "*.h", "*.inl")  # of the compiled kernels
SHOWN = 6  # differing tensors of a file that are printed: what comes after the first differs in consequence
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

Result = dict[str, Any]


def git(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *args], check=check, capture_output=True, text=True)


def sha256_of(data: Any) -> str:
    text = data if isinstance(data, bytes) else json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()


# Compiled kernels and the checkout of BASE


def installed_kernels() -> Path | None:
    """The compiled module that HEAD runs with: of the editable install, or in the source tree; None without one."""
    for place in (Path(sysconfig.get_path("platlib")) / "lowbit", ROOT / "src" / "lowbit"):
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if (path := next(place.rglob(f"_cpu{suffix}"), None)) is not None:
                return path
    return None


def kernels_of_base(sha: str, tree: Path) -> Path | None:
    """HEAD's compiled module where the C++ sources are BASE's too; else one that is built from BASE, once."""
    if git("diff", "--quiet", sha, "--", *SOURCES, check=False).returncode == 0:
        return installed_kernels()
    directory = BUILD / f"{sha}.kernels"
    if not any(directory.glob("_cpu*")):
        print("BASE has other C++ sources: its kernels are being built", flush=True)
        tools = all(importlib.util.find_spec(name) is not None for name in ("scikit_build_core", "nanobind"))
        isolation = ["--no-build-isolation"] if tools else []
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", str(directory)]
        subprocess.run([*command, str(tree)], check=True)
        (wheel,) = directory.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).name.startswith("_cpu"):
                    (directory / Path(name).name).write_bytes(archive.read(name))
        wheel.unlink()
    built = next(directory.glob("_cpu*"), None)
    if built is None:
        raise SystemExit("the C++ sources of BASE and HEAD differ, and BASE's were not compiled: is there a compiler?")
    return built


def checked_out(sha: str) -> Path:
    tree = BUILD / sha
    discard_checkout(tree)  # one that a killed process left
    git("worktree", "add", "--detach", str(tree), sha)
    return tree


def discard_checkout(tree: Path) -> None:
    git("worktree", "remove", "--force", str(tree), check=False)
    shutil.rmtree(tree, ignore_errors=True)
    git("worktree", "prune")


# Sides


def models_of(key: str) -> Path:
    """The directory with the saved models, which are made when they are not there yet."""
    directory = BUILD / f"models-{key[:12]}"
    if not directory.exists():
        print(f"saving {len(MODELS)} models", flush=True)
        for other in BUILD.glob("models-*"):
            shutil.rmtree(other)
        unfinished = directory.with_suffix(".unfinished")
        unfinished.mkdir()
        job = BUILD / "models.json"
        job.write_text(json.dumps({"models": str(unfinished)}))
        subprocess.run([sys.executable, str(SIDE), str(job)], check=True, env=os.environ | ENVIRONMENT)
        unfinished.rename(directory)
    return directory


@dataclass
class Side:
    """One of the two code bases: where it is, and where its results go."""

    name: str
    tree: Path
    kernels: Path | None
    models: Path
    results: Path
    out: Path
    keys: dict[str, str] = field(default_factory=dict)

    def known(self) -> dict[str, Result]:
        """The last result of each run that still is what it was, by name."""
        if not self.results.exists():
            return {}
        lines = [json.loads(line) for line in self.results.read_text().splitlines()]
        return {line["name"]: line for line in lines if line["key"] == self.keys.get(line["name"])}

    def forget(self, names: list[str]) -> None:
        """Drops results of these runs, so that a run that gives none is not taken for one that did."""
        if self.results.exists():
            lines = self.results.read_text().splitlines(keepends=True)
            self.results.write_text("".join(line for line in lines if json.loads(line)["name"] not in names))
        for name in names:
            shutil.rmtree(self.out / name, ignore_errors=True)

    def execute(self, names: list[str], jobs: int) -> None:
        """Executes the runs in ``jobs`` processes at a time. A process that dies loses the run that it was at, and no other."""
        queues = [names[i::jobs] for i in range(jobs) if names[i::jobs]]
        running = {i: self._start(queue, i) for i, queue in enumerate(queues)}
        try:
            while running:
                i, process = next(iter(running.items()))
                code = process.wait()
                del running[i]
                if code > 0:
                    raise SystemExit(f"{self.name} cannot be tested: its process ended with status {code}, see above")
                left = [name for name in queues[i] if name not in self.known()]
                if left:  # a signal ended the process at the first of them
                    self._lose(left[0], f"signal {-code} ended the process")
                    queues[i] = left[1:]
                    if queues[i]:
                        running[i] = self._start(queues[i], i)
        finally:
            for process in running.values():
                process.terminate()

    def _lose(self, name: str, error: str) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps({"name": name, "key": self.keys[name], "error": error}) + "\n")
        print(f"{self.name}: {name}: {error}", flush=True)

    def _start(self, names: list[str], number: int) -> subprocess.Popen[bytes]:
        self.out.mkdir(parents=True, exist_ok=True)
        job = BUILD / f"{self.name}.{number}.json"
        data = {
            "side": self.name,
            "tree": str(self.tree),
            "kernels": None if self.kernels is None else str(self.kernels),
            "models": str(self.models),
            "results": str(self.results),
            "out": str(self.out),
            "runs": names,
            "keys": {name: self.keys[name] for name in names},
            "announce": number == 0,
        }
        job.write_text(json.dumps(data))
        path = os.pathsep.join([str(self.tree / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, str(SIDE), str(job)], env=os.environ | ENVIRONMENT | {"PYTHONPATH": path}
        )


def keys_of(runs: list[Run], kernels: Path | None, models_key: str) -> dict[str, str]:
    """What determines the result of each run but the code: where it is the same, BASE need not run again."""
    surroundings = [models_key, None if kernels is None else sha256_of(kernels.read_bytes())]
    return {run["name"]: sha256_of([run, surroundings]) for run in runs}


def models_key() -> str:
    """Of the models and of everything that both sides share: versions, processor, the script that executes runs."""
    import torch

    versions = {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy", "numba")}
    return sha256_of([MODELS, LINEAR, versions, torch.backends.cpu.get_cpu_capability(), SIDE.read_text()])


# The comparison


@dataclass
class Comparison:
    """How many files are identical, different and missing, and a line for everything that is not as it should be."""

    identical: int = 0
    different: int = 0
    missing: int = 0
    lines: list[str] = field(default_factory=list)


def compare_files(
    wanted: dict[str, str], found: dict[str, str], directories: tuple[Path, Path], labels: tuple[str, str]
) -> Comparison:
    """Compares hashes by file name; for each file that differs, its tensors."""
    result = Comparison()
    for file in sorted({*wanted, *found}):
        if file not in found or file not in wanted:
            result.missing += 1
            result.lines.append(f"{file}: missing in {labels[1] if file in wanted else labels[0]}")
        elif wanted[file] == found[file]:
            result.identical += 1
        else:
            result.different += 1
            result.lines.append(f"{file}: differs")
            old, new = (_path(directory, file) for directory in directories)
            tensors = tensor_differences(old, new, labels)
            result.lines += [f"  {line}" for line in tensors[:SHOWN]]
            if len(tensors) > SHOWN:
                result.lines.append(f"  and {len(tensors) - SHOWN} more tensors")
    return result


def _path(directory: Path, file: str) -> Path:
    return next(path for path in (directory / file, directory / "checkpoint" / file) if path.exists())


def tensor_differences(old: Path, new: Path, labels: tuple[str, str] = ("BASE", "HEAD")) -> list[str]:
    """A line for each tensor that is not the same in both files."""
    import torch
    from safetensors.torch import load_file

    a, b, lines = load_file(old), load_file(new), []
    for name in sorted({*a, *b}):
        if name not in a or name not in b:
            lines.append(f"{name}: only in {labels[name not in a]}")
            continue
        x, y = a[name], b[name]
        if x.dtype != y.dtype or x.shape != y.shape:
            lines.append(f"{name}: {x.dtype} {list(x.shape)} in {labels[0]}, {y.dtype} {list(y.shape)} in {labels[1]}")
        elif x.numel():
            bytes_x, bytes_y = (t.reshape(-1, 1).view(torch.uint8) for t in (x, y))
            if count := int((bytes_x != bytes_y).any(1).sum()):
                gap = f", by up to {(x.double() - y.double()).abs().max():.3g}" if x.is_floating_point() else ""
                lines.append(f"{name}: {count} of {x.numel()} values of {x.dtype}{gap}")
    return lines or ["the same tensors: the header of the file, or their order in it, differs"]


def compare(run: Run, base: Side, head: Side) -> Comparison:
    """HEAD's run with BASE's; and a run that is to write the same bytes as another one with that, both of HEAD."""
    name, other = run["name"], run.get("same_as")
    old, new = base.known().get(name), head.known().get(name)
    for side, result in ((base, old), (head, new)):
        if result is None or "error" in result:
            return Comparison(lines=[f"{side.name}: {'no result' if result is None else result['error']}"])
    assert old is not None and new is not None
    result = compare_files(old["files"], new["files"], (base.out / name, head.out / name), ("BASE", "HEAD"))
    if (whole := head.known().get(other)) is not None and "files" in whole:
        kept = head.out / other if (head.out / other).exists() else base.out / other  # what is identical is kept once
        labels = ("the other run", "this run")
        twin = compare_files(whole["files"], new["files"], (kept, head.out / name), labels)
        result.lines += [f"not as {other}: {line}" for line in twin.lines]
    return result


def report(runs: list[Run], base: Side, head: Side) -> bool:
    """Prints what is identical and what is not. Returns whether everything is; outputs of HEAD that are identical go."""
    total, failed = Comparison(), []
    for run in runs:
        result = compare(run, base, head)
        total.identical += result.identical
        total.different += result.different
        total.missing += result.missing
        if result.lines:
            failed.append(run["name"])
            print(f"\n{run['name']}", *result.lines, sep="\n  ")
        else:
            shutil.rmtree(head.out / run["name"], ignore_errors=True)
    print(f"\nruns: {len(runs) - len(failed)} as on BASE, {len(failed)} not")
    print(f"files: {total.identical} identical, {total.different} different, {total.missing} missing")
    if failed:
        print(f"not as on BASE: {'; '.join(failed)}\noutputs: {base.out} and {head.out}")
    return not failed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--base", help="the commit to compare the working tree with")
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="runs whose name contains it (* and ? as in file names)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--fresh", action="store_true", help="execute BASE's runs again")
    parser.add_argument("--list", action="store_true", help="print the names of the runs")
    args = parser.parse_args()
    if not args.list and args.base is None:
        parser.error("--base is required: the commit to compare the working tree with")
    return args


def main() -> int:
    args = arguments()
    runs = [run for run in RUNS if fnmatch(run["name"], f"*{args.only}*")]
    if args.list or not runs:
        print(*(run["name"] for run in runs), sep="\n")
        return 0 if runs else 1
    sha = git("rev-parse", "--verify", f"{args.base}^{{commit}}").stdout.strip()
    BUILD.mkdir(parents=True, exist_ok=True)
    key = models_key()
    models, tree = models_of(key), checked_out(sha)
    try:
        kernels = installed_kernels(), kernels_of_base(sha, tree)
        head = Side("HEAD", ROOT, kernels[0], models, BUILD / "head.jsonl", BUILD / "out" / "head")
        base = Side("BASE", tree, kernels[1], models, BUILD / f"{sha}.jsonl", BUILD / "out" / sha[:12])
        names = [run["name"] for run in runs]
        for side, fresh in ((base, args.fresh), (head, True)):
            side.keys = keys_of(runs, side.kernels, key)
            known = {} if fresh else side.known()
            cached = [name for name in names if "files" in known.get(name, {}) and (side.out / name).exists()]
            side.forget([name for name in names if name not in cached])
            print(f"{side.name}: {len(names)} runs, {len(cached)} known already", flush=True)
            side.execute([name for name in names if name not in cached], args.jobs)
    finally:
        discard_checkout(tree)
    return 0 if report(runs, base, head) else 1


if __name__ == "__main__":
    sys.exit(main())
