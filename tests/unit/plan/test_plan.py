from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig, StableLmConfig

from lowbit.checkpoints import formats, origins, shards
from lowbit.checkpoints.shards import read_shard_header
from lowbit.checkpoints.source import open_model
from lowbit.kernels import native
from lowbit.numerics import Gram, Int, PerChannel, PerCluster, PerGroup, Spec, to_dict
from lowbit.plan import explain, plan
from lowbit.plan.compatibility import model_description
from lowbit.plan.model_plan import plan_model
from lowbit.plan.peak import run_sizes
from lowbit.recipes import METHODS, Recipe, from_plain, recipe
from lowbit.scheme import FormatRule, Scheme
from lowbit.solve import Nearest
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal
from lowbit.stages.rest import Rest
from lowbit.stages.store import ActivationStore
from lowbit.steps import BlockIO, BlockState, Solve

from helpers import tiny_llama

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "opt": OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "stablelm": StableLmConfig(**LLAMA, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny random models by name, saved like a user's and made on first use."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        key = f"{name}-{dtype}".replace("torch.", "")
        if key not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
            model.save_pretrained(root / key)
            made[key] = root / key
        return made[key]

    return get


def walked(model: Path, wanted: Recipe, out: Path) -> tuple[Walk, dict[str, shards.TensorHeader]]:
    """A finished walk over two windows, and the headers of every tensor that it wrote."""
    journal = Journal(out, {})
    journal.open()
    ids = (
        torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0)) if wanted.needs_calibration else None
    )
    walk = Walk(plan_model(model, wanted), ids, journal)
    walk.run()
    Rest(walk).write()
    files = (journal.directory / entry["file"] for entry in journal.finished)
    return walk, {name: header for file in files for name, header in read_shard_header(file).items()}


CASES = [
    ("llama", recipe("rtn", group_size=16)),
    ("tied", recipe("rtn", bits=3, group_size=20)),  # ragged, and rows of 3-bit codes that end inside a byte
    ("tied", recipe("gptq", bits=4, group_size=8, act_order=True)),  # stores the column order
    ("llama", recipe("smoothquant", level="O3")),  # static ranges
    ("llama", recipe("awq+gptq", bits=3, group_size=16, clip=False, grid=2)),
    ("tied", recipe("omniquant", bits=4, activation_bits=4, epochs=1)),  # the shift gives v and o biases
    ("opt", recipe("omniquant", bits=4, activation_bits=4, epochs=1)),
    ("opt", recipe("rtn", group_size=None, symmetric=True)),
    ("gpt2", recipe("rtn", group_size=16)),
    ("mixtral", recipe("rtn", group_size=16)),
    ("stablelm", recipe("gptq", group_size=16)),  # no table: blocks and linears are discovered
    (
        "llama",
        from_plain(
            {
                "method": "omniquant",
                "options": {"activation_bits": 6, "epochs": 0},
                "overrides": [{"match": "down", "bits": 8}, {"match": "v", "skip": True}],
            }
        ),
    ),
]


@pytest.mark.parametrize(("name", "wanted"), CASES, ids=[f"{n}-{r.name}-{i}" for i, (n, r) in enumerate(CASES)])
def test_bytes_and_bits_are_those_of_the_checkpoint(models, tmp_path, name, wanted):
    dtype = torch.float32 if name == "gpt2" else torch.bfloat16
    told = plan(models(name, dtype), wanted)
    walk, headers = walked(models(name, dtype), wanted, tmp_path / "out")
    assert told.bytes_out == sum(header.nbytes for header in headers.values())
    measured = {layer.name: layer.bits_per_weight for block in walk.records for layer in block.layers}
    assert {layer.name: layer.bits_per_weight for layer in told.layers if not layer.reason} == measured
    weights = {layer.name: layer.weights for block in walk.records for layer in block.layers}
    mean = sum(measured[n] * weights[n] for n in measured) / sum(weights.values())
    assert told.bits_per_weight == pytest.approx(mean, rel=1e-12)


def test_bytes_in_are_those_of_the_original(models):
    headers = read_shard_header(models("tied") / "model.safetensors")
    assert plan(models("tied"), "rtn").bytes_in == sum(header.nbytes for header in headers.values())


def test_no_weight_is_read(models, monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(shards, "read_tensor", refuse)
    monkeypatch.setattr(origins, "read_tensor", refuse)
    for name in METHODS:
        explained = explain(name, models("llama"))
        assert plan(models("llama"), name).layers and (explained.steps or "cache: " in explained.notes[0])
    source = open_model(models("llama"))  # reading a weight springs the trap
    with pytest.raises(AssertionError, match="a weight was read"):
        source.load_into(source.skeleton(), "")


def test_every_matrix_is_listed_with_its_format_or_the_reason_why_not(models):
    overrides = [{"match": "down", "bits": 8}, {"match": "re:layers\\.1\\..*_proj", "skip": True}]
    told = plan(models("tied"), from_plain({"method": "rtn", "options": {"group_size": 16}, "overrides": overrides}))
    rows = {layer.name: layer for layer in told.layers}
    assert rows["model.layers.0.self_attn.q_proj"].weight == "int4 asymmetric, groups of 16"
    assert rows["model.layers.0.mlp.down_proj"].weight == "int8 asymmetric, groups of 16"
    assert rows["model.layers.0.mlp.down_proj"].shape == (32, 48)
    skipped = rows["model.layers.1.self_attn.q_proj"]
    assert (skipped.weight, skipped.bits_per_weight) == (None, 16.0)
    assert skipped.reason == r"skipped by rule 're:layers\\.1\\..*_proj'"
    assert rows["model.embed_tokens"].reason.startswith("embedding")
    assert rows["lm_head"].reason == "head: tied to model.embed_tokens, which is stored once for both"
    model = AutoModelForCausalLM.from_pretrained(models("tied"))
    matrices = {
        name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1
    }
    assert rows.keys() == matrices


def test_layers_without_a_rule_routers_and_heads_say_so(models):
    only_down = Recipe.blockwise(
        name="mine",
        scheme=Scheme(rules=(FormatRule(match="expert_down", weight=Spec(Int(4), PerGroup(16))),)),
        steps=(Solve(Nearest()),),
    )
    rows = {layer.name: layer.reason for layer in plan(models("mixtral"), only_down).layers}
    assert rows["model.layers.0.mlp.experts.1.down_proj"] == ""
    assert rows["model.layers.0.mlp.experts.1.up_proj"] == "no rule matches it"
    assert rows["model.layers.0.mlp.gate"].startswith("router")
    assert rows["lm_head"] == "head: not in a block"


def test_a_sequence_that_the_model_has_no_positions_for_is_refused(models):
    most = plan(models("llama"), recipe("rtn")).cache.tokens
    with pytest.raises(
        ValueError, match=f"a sequence of {most + 1} tokens needs {most + 1} positions and the model has {most}"
    ):
        plan(models("llama"), recipe("rtn"), context=most + 1)


def test_ragged_groups_are_warned_of_by_role(models):
    warnings = plan(models("llama"), recipe("rtn", group_size=20)).warnings
    assert warnings[0] == (
        "group size 20 does not divide the 32 inputs of q, k, v, o, gate, up (12 layers): the last group of each row holds 12 "
        "(sizes that divide: 16 or channel). lowbit runs that; no other file format holds it"
    )
    assert "48 inputs of down (2 layers)" in warnings[1]
    whole_rows = plan(models("llama"), recipe("rtn", group_size=128)).warnings
    assert all("each row is one group" in warning for warning in whole_rows)
    assert [warning.rpartition("; ")[2] for warning in whole_rows] == [
        "of other file formats at most GGUF holds it",  # rows of 32
        "no other file format holds it",  # and of 48
    ]
    assert plan(models("llama"), recipe("rtn", group_size=16)).warnings == ()


def test_only_lowbits_own_format_and_gguf_in_whole_blocks_hold_groups_that_do_not_divide_a_row(models, tmp_path):
    def holders(model, size: int, bits: int) -> set[str]:
        left = [{"match": "embedding", "skip": True}, {"match": "head", "skip": True}]
        planned = plan_model(model, recipe("rtn", bits=bits, group_size=size, symmetric=True).with_overrides(left))
        described, config = model_description(planned), planned.source.config
        return {each.name for each in formats.FORMATS if each.why_not(described, (), config) is None}

    for bits in (4, 8):
        assert holders(models("tied"), 16, bits) >= {"native", "compressed-tensors"}
        assert holders(models("tied"), 20, bits) == holders(models("tied"), 128, bits) == {"native"}
        blocks = tiny_llama(tmp_path / str(bits), intermediate_size=128)  # rows of 64 and 128
        assert holders(blocks, 96, bits) == {"native", "gguf"} and holders(blocks, 80, bits) == {"native"}


def test_transforms_that_the_architecture_cannot_carry_are_warned_of(models):
    wanted = recipe("omniquant", activation_bits=4)
    shifts = [w for w in plan(models("llama"), wanted).warnings if w.startswith("the shift")]
    assert shifts == [
        f"the shift at edge {edge!r} is not applied (all 2 blocks): its norm has no bias to hold it"
        for edge in ("norm_qkv", "norm_mlp")
    ]
    assert not [w for w in plan(models("opt"), wanted).warnings if w.startswith("the shift")]
    smooth = recipe("smoothquant", all_edges=True)
    (through_gelu,) = plan(models("gpt2", torch.float32), smooth).warnings
    assert through_gelu.startswith(
        "the scale at edge 'up_down' is not applied (all 2 blocks): a scale does not commute"
    )


def test_a_model_without_a_table_is_planned_with_what_is_not_available(models):
    told = plan(models("stablelm"), recipe("smoothquant"))
    assert told.architecture == "discovered stablelm"
    assert sum("No architecture table for model type 'stablelm'" in warning for warning in told.warnings) == 2
    assert told.warnings[-1].startswith(
        "the scale at edge 'norm_*' is not applied (all 2 blocks): this architecture has no"
    )
    assert len([layer for layer in told.layers if not layer.reason]) == 14
    assert explain("smoothquant", models("stablelm")).steps[0].count("No scale is applied") == 1


def test_a_walk_notes_the_same_missing_transforms_as_the_plan(models, tmp_path):
    wanted = recipe("omniquant", activation_bits=4, epochs=0)
    walk, _ = walked(models("llama"), wanted, tmp_path / "out")
    noted = {note.split("'")[1] for note in walk.records[0].notes if "cannot carry a shift" in note}
    told = {w.split("'")[1] for w in plan(models("llama"), wanted).warnings if w.startswith("the shift")}
    assert noted == told == {"norm_qkv", "norm_mlp"}


def test_static_ranges_and_slow_activation_kernels_are_warned_of(models, monkeypatch):
    static = plan(models("llama"), recipe("smoothquant", level="O3"), samples=4, seq_len=16).warnings
    assert static == ("static activation ranges are fixed by the 4 x 16 calibration tokens; larger inputs are clipped",)
    grouped = recipe("rtn", bits=8, group_size=16, activation_bits=8)
    assert plan(models("llama"), grouped).warnings == ()
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    (slow,) = plan(models("llama"), grouped).warnings
    assert slow.startswith(
        "activations are quantized, but no fast kernel computes q, k, v, o, gate, up, down with them"
    )


def test_a_column_order_is_counted_and_said_only_where_one_can_be_stored(models):
    ordered = plan(models("llama"), recipe("gptq", group_size=16, act_order=True))
    plain = plan(models("llama"), recipe("gptq", group_size=16))
    inputs = sum(layer.shape[1] for layer in plain.layers if not layer.reason)
    assert ordered.bytes_out == plain.bytes_out + 4 * inputs
    assert ordered.warnings == (
        f"the solver stores a column order with each layer: up to {4 * inputs} bytes, counted in bytes_out",
    )
    for same in ({"group_size": None, "act_order": True}, {"group_size": 16, "act_order": True, "static_groups": True}):
        assert plan(models("llama"), recipe("gptq", **same)).warnings == ()


def test_a_rule_that_matches_no_layer_names_the_nearest(models):
    wanted = from_plain({"method": "rtn", "overrides": [{"match": "dwn", "bits": 8}]})
    with pytest.raises(ValueError, match=r"rule 'dwn' matches no layer \(did you mean 'down'\?\)"):
        plan(models("llama"), wanted)
    wanted = from_plain({"method": "rtn", "overrides": [{"match": "re:xyzzy", "bits": 8}]})
    with pytest.raises(
        ValueError, match=r"has the roles down, gate, k, o, q, up, v, and names such as model\.layers\.0\.self"
    ):
        explain(wanted, models("llama"))


def test_a_format_that_a_layer_cannot_have_names_the_layer(models):
    clusters = Spec(Int(4), PerCluster((16, 16)))
    wanted = Recipe.blockwise(
        name="mine", scheme=Scheme(rules=(FormatRule(weight=clusters),)), steps=(Solve(Nearest()),)
    )
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.down_proj \(32 x 48\) cannot have its format.*override for 'down'"
    ):
        plan(models("llama"), wanted)


def test_a_model_that_is_quantized_already_is_refused_with_its_method(models, tmp_path):
    config = json.loads((models("llama") / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    (tmp_path / "model.safetensors").write_bytes((models("llama") / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"already quantized with 'gptq'.*original model"):
        plan(tmp_path, "rtn")


def test_activations_go_to_files_as_the_store_decides(models, tmp_path):
    each = 16 * 32 * 4  # tokens, channels, bytes of a window
    for limit, (method, windows) in product(
        (0, 4 * each, 8 * each + 1, 40 * each),
        (
            ("rtn", (4, 4, 4)),
            ("gptq", (1, 5, 1)),
            ("omniquant", (5, 5, 5)),
        ),  # one window is held out where text is read
    ):
        with ActivationStore(limit, tmp_path) as store:
            for array, count in zip(("fp", "quant", "next"), windows, strict=True):
                store.allocate(array, (count, 16, 32), torch.float32)
            told = plan(models("llama"), method, samples=4, seq_len=16, ram_limit=limit)
            assert told.peak_disk_bytes == store.disk_bytes, (method, limit)
            assert told.peak_ram_parts["block"]["activations"] == store.ram_bytes
    assert plan(models("llama"), "rtn", samples=0).peak_disk_bytes == 0


def test_statistics_are_counted_as_a_block_gathers_them(models):
    source = open_model(models("mixtral"))
    planned = plan_model(models("mixtral"), recipe("gptq", group_size=16))
    model = source.load_full()
    from lowbit.architectures import unfuse_experts

    unfuse_experts(model)
    block, meta = model.model.layers[0], planned.blocks[0]
    x = torch.randn(2, 8, 32)
    cos_sin = model.model.rotary_emb(x, torch.arange(8)[None])
    io = BlockIO(x, None, lambda run, window: run(window, position_embeddings=cos_sin))
    state = BlockState.of("", block, meta.resolved, meta.formats, io)
    kept = [stat.nbytes for stats in state.collect([Gram()]).values() for stat in stats.values()]
    assert len(kept) == len(meta.resolved.shared_inputs)
    assert run_sizes(planned, meta, 2, 8).statistics_bytes([Gram()]) == sum(kept)


def test_the_memory_estimate_grows_with_what_the_steps_hold(models):
    def step(wanted: Recipe, **sizes) -> int:
        terms = plan(models("llama"), wanted, **sizes).peak_ram_parts["block"]
        return next(size for name, size in terms.items() if name.startswith("step "))

    assert step(recipe("gptq")) > step(recipe("rtn"))
    few, more, many = (step(recipe("awq", clip=False), samples=n) for n in (2, 4, 8))
    assert many - more == 2 * (more - few) > 0  # a search keeps inputs and outputs of the judged modules
    assert step(recipe("awq", clip=False, windows=1), samples=8) < step(recipe("awq", clip=False), samples=8)
    assert step(recipe("omniquant", batch=4)) > step(recipe("omniquant"))
    told = plan(models("llama"), "gptq")
    assert told.peak_ram_bytes == max(sum(terms.values()) for terms in told.peak_ram_parts.values())


def test_a_plan_and_an_explanation_are_plain_data(models):
    told = json.loads(json.dumps(plan(models("llama"), "gptq").to_dict()))
    assert told["recipe"] == to_dict(recipe("gptq"))
    assert told["layers"][1]["shape"] == [32, 32]
    assert {"bytes_in", "bytes_out", "bits_per_weight", "peak_ram_bytes", "peak_disk_bytes"} <= told.keys()
    said = json.loads(json.dumps(explain("gptq", models("llama")).to_dict()))
    assert said["layers"] == told["layers"]


# Compatibility


def answers(models, name: str, **options) -> dict[str, str]:
    return plan(models("llama"), recipe(name, **options)).compatibility


def test_every_runtime_and_format_has_an_answer_and_the_kernels_are_named(models):
    for name in METHODS:
        found = plan(models("llama"), name).compatibility
        assert all(found[key].startswith("yes") for key in ("lowbit", "transformers (import lowbit)", "native format"))
        assert all(text.startswith(("yes: ", "no: ")) for text in found.values())
        assert [each.title for each in formats.FORMATS] == list(found)[2:]
    best = native.instruction_sets()[0]
    best = native.MATRIX_TILES.get(best, best)  # the plan is for one token
    assert answers(models, "smoothquant")["lowbit"] == f"yes: kernel {best} for q, k, v, o, gate, up, down"
    assert answers(models, "rtn")["lowbit"].startswith(f"yes: kernel {best} for q, k")


FITS = "yes: lowbit export DIR --format"


@pytest.mark.parametrize(
    ("name", "options", "format", "why"),
    [
        ("rtn", {"group_size": 16}, "vLLM / compressed-tensors", FITS),
        ("rtn", {"group_size": 20}, "vLLM / compressed-tensors", "20 does not divide 32"),
        ("smoothquant", {}, "vLLM / compressed-tensors", FITS),
        ("llm-int8", {}, "vLLM / compressed-tensors", "its inputs are quantized whole"),
        ("llm-int8", {}, "bitsandbytes", FITS),
        ("nf4", {"double_quant": True}, "bitsandbytes", FITS),
        ("rtn", {"group_size": 16}, "bitsandbytes", "NF4, FP4 or symmetric integers of 8 bits"),
        (
            "gptq",
            {"group_size": 16, "act_order": True},
            "vLLM / compressed-tensors",
            "layers keep column orders of inputs",
        ),
        (
            "omniquant",
            {"activation_bits": 4},
            "vLLM / compressed-tensors",
            "layers have biases that the model's class does not have",
        ),
        ("rtn", {"group_size": 16, "symmetric": True}, "llama.cpp GGUF", "blocks are 32 inputs"),
        ("hqq", {"bits": 4, "group_size": 32}, "llama.cpp GGUF", "integers with plain scales"),
        ("rtn", {"bits": 8, "group_size": 32}, "llama.cpp GGUF", "8 bits with zero points do not fit"),
        ("rtn", {"bits": 4, "group_size": 16}, "AWQ format (GEMM)", FITS),
        ("rtn", {"bits": 3, "group_size": 16}, "AWQ format (GEMM)", "4 bits, not of 3"),
        ("rtn", {"group_size": 16}, "GPTQ format", "multiples of 32, found 48 x 32"),
        ("smoothquant", {}, "GPTQ format", "weights only"),
    ],
)
def test_other_formats_are_judged_by_bits_groups_and_zero_points(models, name, options, format, why):
    assert why in answers(models, name, **options)[format]


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_formats_that_have_no_place_for_a_packed_embedding_say_how_to_leave_it(models, name):
    def found(**change):
        wanted = recipe("rtn", group_size=16).with_overrides([{"match": "embedding", **change}])
        return plan(models(name), wanted).compatibility

    packed, plain = found(bits=8), found(skip=True)
    for other in ("vLLM / compressed-tensors", "AWQ format (GEMM)", "GPTQ format"):
        assert "the embedding is packed, for which it has no place; --embedding-bits 16 leaves it" in packed[other]
        assert "embedding" not in plain[other]
    assert packed["native format"].startswith("yes")


# Explanations


def test_steps_are_explained_with_the_edges_of_this_model(models):
    said = explain(recipe("omniquant", activation_bits=4), models("llama"))
    learn, solve = said.steps
    assert learn.startswith("Learn: Minimizes objective over the parameters of makers")
    assert "A shift by Midpoint is folded into the weights on both sides of v_o." in learn
    assert (
        "A scale by Smooth(alpha=0.5) is folded into the weights on both sides of norm_qkv, norm_mlp, v_o, q_k."
        in learn
    )
    assert "Measures AbsMax, Range of every input first." in learn
    assert solve.startswith("Solve: Solves every linear")
    assert said.notes[0].startswith("every block sees the hidden states that the quantized blocks before it give")
    assert "the shift at edge 'norm_qkv' is not applied (all 2 blocks): its norm has no bias to hold it" in said.notes
    on_opt = explain(recipe("omniquant", activation_bits=4), models("opt")).steps[0]
    assert "A shift by Midpoint is folded into the weights on both sides of norm_qkv, norm_mlp, v_o." in on_opt


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("qlora", ("Solve", "Train")),
        ("spinquant", ("Train", "RotateResidual", "RotateInputs", "Solve")),
    ],
)
def test_stages_that_train_are_explained_where_they_run(name, order, models):
    said = explain(recipe(name), models("llama")).steps
    assert tuple(line.partition(":")[0] for line in said) == order
    train = said[order.index("Train")]
    assert train.startswith(
        "Train: Trains parameters of a whole model: what is moved to minimize objective. Here what = "
    )
    assert "objective = " in train and "lr = " in train


def test_a_search_is_not_promised_where_nothing_reads_the_edge(models):
    from lowbit.steps import MeanAbsPower, Search

    wanted = Recipe.blockwise(
        name="mine",
        scheme=Scheme(rules=(FormatRule(weight=Spec(Int(4), PerChannel())),)),
        steps=(Search(MeanAbsPower(2), ("q_k", "nowhere")), Solve(Nearest())),
    )
    said = explain(wanted, models("llama"))
    assert "No scale is applied: no edge of this model can carry one there." in said.steps[0]
    assert said.notes[1:] == (
        "the scale at edge 'q_k' is not applied (all 2 blocks): no linear reads it, so there is nothing to measure",
        "the scale at edge 'nowhere' is not applied (all 2 blocks): this architecture has no such edge",
    )


def test_explanations_follow_from_the_steps_and_name_no_method(models):
    plain = {"clip": False, "mse": False, "order": "none"}
    mixed = explain(recipe("awq+gptq", bits=3, group_size=16, **plain), models("mixtral"))
    solver_free = " ".join(mixed.steps).replace("Gptq(", "")
    assert not [name for name in METHODS if name in solver_free.lower().split()]
    assert "v_o" in mixed.steps[0]
    assert "Here solver = Gptq(fit=MinMax, order=none, damp=0.01, block=128, rank=diagonal" in mixed.steps[-1]


def test_experts_are_one_edge_in_words(models):
    wanted = from_plain(
        {
            "name": "mine",
            "scheme": [
                {
                    "match": "*",
                    "weight": {
                        "type": "Spec",
                        "grid": {"type": "Int", "bits": 4},
                        "granularity": {"type": "PerChannel"},
                    },
                }
            ],
            "steps": [
                {"type": "Set", "rule": {"type": "Smooth"}, "at": ["expert_up_down*"]},
                {"type": "Solve", "solver": {"type": "Nearest"}},
            ],
        }
    )
    assert "on both sides of expert_up_down." in explain(wanted, models("mixtral")).steps[0]
