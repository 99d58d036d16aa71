"""One side of `make identity`: executes runs with the lowbit of one tree and writes what came out of each.

``python tests/identity_side.py JOB.json``, started by tests/identity.py with one thread and with ``<tree>/src`` first on
the path. The job says ``tree``, ``kernels`` (the compiled module, or null), ``models``, ``out``, ``results``, ``side`` and
``runs`` (names). A job without a tree saves the models, with transformers alone.

Every run is a line of the results: its files with their hashes, or its error. Beside the weights of the checkpoint there
is ``outputs.safetensors``: what the loaded checkpoint, or the packed linear, computes.

Lowbit decides by a clock whether the processor multiplies bfloat16 and int8 faster than float32, and learns in bfloat16
where it does. Here the answer is always yes, so that neither the machine nor its load decides which code a run tests. That
is the only place where this script looks below the public interface.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from identity_runs import LINEAR, MODELS, RUNS, VOCABULARY, Run, spelled

OUTPUTS = "outputs.safetensors"
_MEASURED = "faster_than_float32"


class Stopped(Exception):
    """Raised by the progress callback of a run that is to be repeated."""


class Kernels(importlib.abc.MetaPathFinder):
    """Finds the compiled kernels of a tree where they are, so that nothing is copied into a working tree."""

    def __init__(self, path: str):
        self.path = path

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname.startswith("lowbit.") and fullname.endswith("._cpu"):
            return importlib.util.spec_from_file_location(fullname, self.path)
        return None


def import_lowbit(tree: Path, kernels: str | None) -> Any:
    """The lowbit of ``tree``, whatever else is installed: an editable install finds its own before the path is looked at."""
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable_skbc")]
    if kernels is not None:
        sys.meta_path.insert(0, Kernels(kernels))
    import lowbit

    assert Path(lowbit.__file__).is_relative_to(tree / "src"), f"imported {lowbit.__file__}, expected it in {tree}"
    for part in ("pipeline", "steps.precision"):  # names of the package may be imported on first use only
        importlib.import_module(f"lowbit.{part}")
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "lowbit"]
    deciding = [module for module in modules if hasattr(module, _MEASURED)]
    assert deciding, f"no module of lowbit has {_MEASURED}: name what decides by a clock now in tests/identity_side.py"
    for module in deciding:
        setattr(module, _MEASURED, lambda dtype: True)
    return lowbit


def instruction_sets() -> list[str]:
    """Those of the compiled kernels that were imported; empty without kernels."""
    modules = [module for name, module in sys.modules.items() if name.startswith("lowbit.") and name.endswith("._cpu")]
    return modules[0].instruction_sets() if modules else []


# Inputs, which both sides share


def save_models(directory: Path) -> None:
    """Saves every model of :data:`MODELS` and the lone linear. Imports transformers, and nothing of lowbit."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, (model_type, options, dtype) in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
        with torch.no_grad():
            for module in model.modules():
                if not isinstance(module, nn.Embedding):
                    for parameter in module.parameters(recurse=False):
                        _make_uneven(parameter)
        model.to(getattr(torch, dtype)).save_pretrained(directory / name)
    torch.manual_seed(0)
    x = torch.randn(200, 96) @ (torch.eye(96) + 0.06 * torch.randn(96, 96))
    x[:, [3, 50]] *= 30
    linear = {"weight": torch.randn(48, 96) / 10, "bias": torch.randn(48), "inputs": x, "fisher": torch.rand(48, 96)}
    save_file(linear, directory / f"{LINEAR}.safetensors")


def _make_uneven(parameter: Tensor) -> None:
    """Loud channels in norms, biases that are not zero, matrices large enough for blocks to matter to the logits."""
    if parameter.dim() >= 2:
        parameter.mul_(3)
    elif parameter.eq(0).all():  # biases, and gains of norms that are stored as what they differ from one by
        parameter.copy_(0.2 * torch.randn_like(parameter))
        parameter[::16] *= 5
    else:
        parameter.copy_(0.5 + torch.rand_like(parameter))
        parameter[::16] *= 20


def calibration_ids(run: Run) -> Tensor | None:
    if run["windows"] is None:
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (run["windows"], run["tokens"]), generator=generator)


# Runs


class Interruption:
    """A progress callback that stops a run once, after some blocks or (``"blocks"``) when a count begins behind the last."""

    def __init__(self, after: int | str, by: str):
        self.after, self.by, self.highest = after, by, 0.0

    def __call__(self, done: float, *_: Any) -> None:
        begun_anew, self.highest = done < self.highest, max(self.highest, done)
        if begun_anew if self.after == "blocks" else done >= float(self.after):
            if self.by == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stopped


def quantize(lowbit: Any, run: Run, models: Path, out: Path, interrupt: bool = False) -> None:
    """A whole run; ``out/checkpoint`` is written unless the run is interrupted."""
    recipe = spelled(run["recipe"], lowbit.Recipe.__annotations__)
    progress = Interruption(**run["interrupt"]) if interrupt else None
    torch.manual_seed(0)
    lowbit.quantize(
        models / run["model"],
        recipe,
        calibration_ids(run),
        out=out / "checkpoint",
        max_kl=1e9,
        allow_broken=True,
        progress=progress,
        **run.get("settings", {}),
    )


def quantize_linear(lowbit: Any, run: Run, models: Path, out: Path) -> None:
    tensors = load_file(models / f"{LINEAR}.safetensors")
    linear = nn.Linear(96, 48)
    linear.load_state_dict({name: tensors[name] for name in ("weight", "bias")})
    recipe = spelled(run["recipe"], lowbit.Recipe.__annotations__)
    known = {"fisher": tensors["fisher"]} if run["recipe"]["method"] == "squeezellm" else {}
    torch.manual_seed(0)
    inputs = None if run["windows"] is None else tensors["inputs"]
    packed = lowbit.quantize_linear(linear, inputs, recipe, **known)
    buffers = {name: tensor.contiguous() for name, tensor in packed.state_dict().items()}
    (out / "checkpoint").mkdir(parents=True)
    save_file(buffers, out / "checkpoint" / "linear.safetensors")
    with torch.no_grad():
        save_file({"output": packed(tensors["inputs"][:32])}, out / OUTPUTS)


def stop(job: dict[str, Any], lowbit: Any, run: Run, out: Path) -> None:
    """Starts the run and ends it in its middle. A run that is to be killed gets a process of its own."""
    assert os.name == "posix" or run["interrupt"]["by"] != "kill", "SIGKILL needs a POSIX system"
    if run["interrupt"]["by"] == "kill":
        child = Path(job["results"]).with_suffix(f".kill.{os.getpid()}.json")
        child.write_text(json.dumps(job | {"stop": run["name"]}))
        code = subprocess.run([sys.executable, __file__, str(child)], check=False).returncode
        child.unlink()
        assert code == -signal.SIGKILL, f"the run was not killed: its process ended with {code}"
    else:
        try:
            quantize(lowbit, run, Path(job["models"]), out, interrupt=True)
        except Stopped:
            pass
    assert not (out / "checkpoint").exists(), "the run had finished before it was to be stopped"


def execute(job: dict[str, Any], lowbit: Any, run: Run) -> dict[str, str]:
    """Executes one run. Returns the sha256 of each of its files by name."""
    out, models = Path(job["out"]) / run["name"], Path(job["models"])
    shutil.rmtree(out, ignore_errors=True)
    if run["model"] == LINEAR:
        quantize_linear(lowbit, run, models, out)
    else:
        if "interrupt" in run:
            stop(job, lowbit, run, out)
        quantize(lowbit, run, models, out)
        ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            logits = lowbit.load(out / "checkpoint", torch.float32)(input_ids=ids, use_cache=False).logits
        save_file({"logits": logits.contiguous()}, out / OUTPUTS)
    files = [*sorted((out / "checkpoint").glob("*.safetensors")), out / OUTPUTS]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    if "tree" not in job:
        save_models(Path(job["models"]))
        return
    lowbit = import_lowbit(Path(job["tree"]), job["kernels"])
    warnings.filterwarnings("ignore")  # of torch and transformers; what lowbit has to say is in the report
    runs = {run["name"]: run for run in RUNS}
    if "stop" in job:
        run = runs[job["stop"]]
        quantize(lowbit, run, Path(job["models"]), Path(job["out"]) / run["name"], interrupt=True)
        return
    if job["announce"]:
        sets = ", ".join(instruction_sets()) or "no compiled ones"
        print(f"{job['side']}: torch with {torch.backends.cpu.get_cpu_capability()}, kernels: {sets}", flush=True)
    for name in job["runs"]:
        began = time.monotonic()
        try:
            outcome: dict[str, Any] = {"files": execute(job, lowbit, runs[name])}
        except Exception as error:  # of any kind: it is recorded, and the other runs go on
            outcome = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        line = {"name": name, "key": job["keys"][name], **outcome, "seconds": round(time.monotonic() - began, 2)}
        with Path(job["results"]).open("a") as file:  # one write for a line: other processes append to the same file
            file.write(json.dumps(line) + "\n")
        print(f"{job['side']}: {name}, {line['seconds']:.1f} s {outcome.get('error', '')}", flush=True)


if __name__ == "__main__":
    main()
