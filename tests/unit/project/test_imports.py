"""Imports: nothing heavy before it is needed, nothing in circles, and transformers knows our checkpoints."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit

HEAVY = {
    *("torch", "transformers", "numba", "datasets", "sympy", "pandas", "numpy", "scipy", "matplotlib"),
    *("accelerate", "safetensors", "gguf", "huggingface_hub", "tokenizers", "triton"),
}
COMMANDS = ("quantize", "evaluate", "compare", "allocate", "generate", "plan", "explain", "methods", "recipes")
COMMANDS += ("inspect", "bench", "chat", "cache", "generate-data", "merge-adapter", "report", "recommend", "train")

LOADED = """
import atexit, json, os, sys
atexit.register(lambda: os.write(3, json.dumps(sorted({name.partition(".")[0] for name in sys.modules})).encode()))
"""
COMMAND = "import runpy; sys.argv[0] = 'lowbit'; runpy.run_module('lowbit', run_name='__main__', alter_sys=True)"


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-c", code, *arguments]
    return subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def packages_loaded(tmp_path: Path, code: str, *arguments: str, **environment: str) -> tuple[str, set[str]]:
    """The output of ``code`` in a new process, and the packages loaded at its end."""
    file = tmp_path / "loaded.json"
    report = f"import os\nos.dup2(os.open({str(file)!r}, os.O_WRONLY | os.O_CREAT), 3)\n" + LOADED
    done = python(report + code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, set(json.loads(file.read_text()))


# Nothing heavy


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("--help",), "Usage: lowbit"),
        (("--version",), lowbit.__version__),
        *(((command, "--help"), f"Usage: lowbit {command}") for command in COMMANDS),
        (("methods",), "gptq"),
        (("methods", "--json"), '"gptq"'),
        (("recipes",), "w4-gptq"),
        (("recipes", "--json"), '"w4-gptq"'),
        (("recipes", "w4-gptq"), "method: gptq"),
        (("--show-completion", "bash"), "_LOWBIT_COMPLETE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help_and_lists_load_nothing_heavy(tmp_path, arguments, shown):
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"} if "--show-completion" in arguments else {}
    printed, packages = packages_loaded(tmp_path, COMMAND, *arguments, **environment)
    assert shown in printed
    assert not packages & HEAVY


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("lowbit qu", "quantize"),
        ("lowbit quantize --method gpt", "gptq"),
        ("lowbit quantize --method smoothquant+gpt", "smoothquant+gptq"),
        ("lowbit plan MODEL --recipe w8a8-smoothquant-g", "w8a8-smoothquant-gptq"),
        ("lowbit explain w8a8-smoothquant-g", "w8a8-smoothquant-gptq"),
        ("lowbit compare MODEL --method gpt", "gptq"),
        ("lowbit recipes w8a8-smoothquant-g", "w8a8-smoothquant-gptq"),
    ],
)
def test_completion_offers_commands_methods_and_recipes_and_loads_nothing_heavy(tmp_path, words, offered):
    asked = {"_LOWBIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    printed, packages = packages_loaded(tmp_path, COMMAND, **asked)
    assert printed.split() == [offered]
    assert not packages & HEAVY


def test_importing_lowbit_loads_nothing_heavy_and_every_public_name_then_resolves(tmp_path):
    assert not packages_loaded(tmp_path, "import lowbit; dir(lowbit); lowbit.list_methods()")[1] & HEAVY
    code = "import lowbit; print(lowbit.recipe('gptq').name); [getattr(lowbit, name) for name in lowbit.__all__]"
    printed, packages = packages_loaded(tmp_path, code)
    assert printed == "gptq\n"  # nothing but the registry has imported the methods
    assert "torch" in packages


# Public names


def test_public_names_are_said_once_for_type_checkers_and_once_for_python_alike():
    tree = ast.parse(Path(lowbit.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == lowbit._HOMES
    assert lowbit.__all__ == sorted([*typed, "__version__"])
    assert set(lowbit.__all__) <= set(dir(lowbit))


def test_no_import_of_a_module_changes_what_a_public_name_means():
    for module in pkgutil.walk_packages(lowbit.__path__, "lowbit."):
        if module.name == "lowbit.adapters.packed_lora" and importlib.util.find_spec("peft") is None:
            continue
        if module.name.startswith("lowbit.serving.vllm_plugin.") and importlib.util.find_spec("vllm") is None:
            continue
        if module.name not in ("lowbit.__main__", "lowbit.kernels.triton.device", "lowbit.kernels.triton.launch"):
            importlib.import_module(module.name)
    for name, home in lowbit._HOMES.items():
        assert callable(getattr(lowbit, name))
        assert getattr(lowbit, name) is getattr(sys.modules[home], name)
    submodules = {module.name for module in pkgutil.iter_modules(lowbit.__path__)}
    assert not submodules & set(lowbit.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'quantise'"):
        lowbit.quantise  # noqa: B018


def test_an_exception_can_be_caught_by_its_public_name():
    from lowbit.report import BrokenModel

    with pytest.raises(lowbit.BrokenModel):
        raise BrokenModel("all zeros")


# transformers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small packed model."""
    root = tmp_path_factory.mktemp("imports")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    lowbit.quantize(root / "model", lowbit.recipe("rtn", group_size=32), None, out=root / "packed")
    return root


@pytest.mark.parametrize(
    "before",
    [
        "import lowbit; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import lowbit",
        "import transformers.quantizers.auto, lowbit",
        "import lowbit, transformers.models.llama.modeling_llama",
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(f'{root}/model'); import lowbit",
    ],
)
def test_transformers_loads_our_checkpoints_whatever_is_imported_first(checkpoint, before):
    after = (
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(f'{root}/packed')\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = python(f"root = {str(checkpoint)!r}\n{before}\n{after}")
    assert done.stdout == "QuantLinear\n", done.stderr


def test_the_module_that_the_hook_waits_for_keeps_its_loader_and_may_be_reloaded():
    code = (
        "import importlib, inspect, lowbit, transformers.quantizers.auto as host\n"
        "assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(host)\n"
        "assert type(host.__loader__).__name__ == 'SourceFileLoader', host.__loader__\n"
        "importlib.reload(host)\n"
        "assert host.AUTO_QUANTIZER_MAPPING['lowbit'].__name__ == 'LowbitQuantizer'"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


# peft


@pytest.mark.parametrize("order", ["import peft, lowbit", "import lowbit, peft"])
def test_a_lora_config_knows_packed_layers_whatever_is_imported_first(order):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    code = (
        f"{order}\n"
        "import copy, pickle\n"
        "config = pickle.loads(pickle.dumps(copy.deepcopy(peft.LoraConfig())))\n"
        "print(*((key.__name__, value.__name__) for key, value in config._custom_modules.items()), '_custom' in str(config.to_dict()))"
    )
    done = python(code)
    assert done.stdout == "('QuantLinear', 'PackedLora') False\n", done.stderr


# Circles


def test_no_modules_import_each_other_in_a_circle():
    """Imports within functions count too; imports for type checkers do not."""
    graph = grimp.build_graph("lowbit", exclude_type_checking_imports=True, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    order = list(TopologicalSorter(imports).static_order())  # raises CycleError, which names a circle
    assert set(order) == graph.modules
