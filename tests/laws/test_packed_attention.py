"""Attention over packed tokens: the compiled code and the runs of decoded tokens are one function."""

import copy
import itertools
from functools import partial

import pytest
import torch

from lowbit import kernels
from lowbit.caches import Coordinates, PackedLayer, attend_packed
from lowbit.caches.attention import compiled_reason
from lowbit.caches.compiled import Description, packs
from lowbit.caches.rotary import turned
from lowbit.compiled import ENVIRONMENT
from lowbit.modules import KVSpec
from lowbit.numerics import NF4, Block, Float, Int, Normal, PerGroup, PerToken, Spec

GRIDS = [
    *(Int(bits, zero="real") for bits in range(1, 9)),
    *(Int(bits, symmetric=True) for bits in (1, 2, 3, 4, 8)),
    *(Int(bits) for bits in (2, 5)),
    *(Normal(bits) for bits in (2, 3, 4, 6)),
    NF4,
    Float(4, 3, "fn"),
    Float(2, 1),
]
GRAINS = [PerToken(), PerGroup(32), PerGroup(24), Block(32, 1), Block(16, 8), Block(24, 1)]
SETS = kernels.native.instruction_sets()
LANES = [isa for isa in SETS if isa not in kernels.native.MATRIX_TILES]


def layer_of(key, value, count=150, batch=2, heads=2, dim=64, dtype=torch.float32, seed=0, **options):
    rows = key.granularity.rows if key and isinstance(key.granularity, Block) else 1
    recent = options.pop("recent", 48 if 48 % rows == 0 else 2 * rows)
    frequencies = torch.logspace(0, -4, dim // 2) if options.get("before_rope") else None
    layer = PackedLayer(KVSpec(key, value, recent=recent, **options), frequencies=frequencies)
    made = torch.Generator().manual_seed(seed)
    layer.update(*(torch.randn(batch, heads, count, dim, generator=made).to(dtype) for _ in range(2)))
    return layer


def query_of(batch=2, heads=6, count=1, dim=64, seed=5):
    return torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(seed))


def exact(query, layer, mask=None):
    keys, values = (side.read(torch.float32) for side in layer.sides)
    shared = query.shape[1] // keys.shape[1]
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - query.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(
        query, keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1), attn_mask=mask
    )
    return out.transpose(1, 2)


def assert_close(a, b, tolerance=3e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=LANES)
def isa(request, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, request.param)
    return request.param


def test_decoded_tokens_at_once_give_what_runs_give():
    layer = layer_of(
        Spec(Int(4, zero="real"), Block(32, 1)), Spec(Int(4, zero="real"), PerGroup(32)), count=700, recent=32
    )
    assert compiled_reason(layer) is None
    mask = torch.ones(2, 1, 30, 700, dtype=torch.bool).tril(670)
    mask[0, :, :, :50] = False
    for seen in (None, mask, torch.where(mask, 0.0, -1e30)):
        query = query_of(count=30)
        assert_close(attend_packed(query, layer, seen), attend_packed(query, layer, seen, compiled=False))


def test_runs_of_decoded_tokens_give_attention_over_all():
    for grain in GRAINS[:4]:
        layer = layer_of(Spec(Int(4, zero="real"), grain), Spec(Int(4, zero="real"), PerGroup(32)), count=2500)
        for count in (1, 40):
            query = query_of(count=count)
            assert_close(attend_packed(query, layer, compiled=False), exact(query, layer))


def _tiles(isa, native, shape, first, last):
    return kernels.cache.decode(isa, native, first, last, shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compiled_code_decodes_as_torch_does(isa, grid):
    """Bit for bit, but for the last one of a product that is rounded once or twice."""
    for grain, dim in itertools.product(GRAINS, (64, 24)):
        layer = layer_of(Spec(grid, grain), None, dim=dim, count=200)
        side, native = layer.key_side, Description().current(layer.key_side)
        for start, end in ((0, side.packed.length), (5, 77)):
            found = side.packed.decode(start, end, partial(_tiles, isa, native, side.shape))
            torch.testing.assert_close(found, side.packed.decode(start, end), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid_is_read_as_it_decodes(isa, grid):
    for key, value in itertools.product(GRAINS[:4], GRAINS[:3]):
        layer = layer_of(Spec(grid, key), Spec(grid, value))
        assert compiled_reason(layer) is None
        query = query_of()
        assert_close(attend_packed(query, layer), exact(query, layer))


@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize(("dim", "heads"), [(64, 2), (80, 6), (128, 8), (24, 4), (7, 2), (16, 40)])
def test_every_shape_of_heads_is_read(isa, grain, dim, heads):
    values = grain if not isinstance(grain, Block) else PerToken()
    layer = layer_of(Spec(Int(3, zero="real"), grain), Spec(Int(5, zero="real"), values), dim=dim)
    assert compiled_reason(layer) is None
    for count in (1, 2, 5, 8):
        query = query_of(count=count, dim=dim, heads=heads)
        assert_close(attend_packed(query, layer), exact(query, layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["float16", "bfloat16", "float32"])
def test_floats_and_scales_of_every_type_are_read(isa, dtype, scale):
    layer = layer_of(
        Spec(Int(4, zero="real"), Block(16, 1), scale_dtype=scale),
        Spec(Int(4, zero="real"), PerGroup(32), scale_dtype=scale),
        dtype=dtype,
        sink=5,
    )
    assert compiled_reason(layer) is None
    query = query_of()
    assert_close(attend_packed(query, layer), exact(query, layer))


@pytest.mark.parametrize("options", [{"key_rotation": "hadamard"}, {"value_rotation": "hadamard"}, {"centred": True}, {"key_rotation": "hadamard", "value_rotation": "hadamard", "centred": True}, {"sink": 4}, {"recent": 0}, {"past_only": False}], ids=str)  # fmt: skip
def test_coordinates_and_windows_are_read(isa, options):
    layer = layer_of(Spec(Int(4, zero="real"), PerToken()), Spec(Int(4, zero="real"), PerToken()), **options)
    assert compiled_reason(layer) is None
    for count in (1, 3):
        query = query_of(count=count)
        assert_close(attend_packed(query, layer), exact(query, layer))


BEFORE_ROPE = [{}, {"key_rotation": "hadamard"}, {"centred": True, "sink": 3}]


@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("options", BEFORE_ROPE, ids=str)
def test_keys_packed_before_the_rotary_embedding_are_read(isa, grain, options):
    rows = grain.rows if isinstance(grain, Block) else 1
    recent = 48 if 48 % rows == 0 else 2 * rows
    layer = layer_of(Spec(Int(3, zero="real"), grain), None, count=700, recent=recent, before_rope=True, **options)
    assert compiled_reason(layer) is None
    for count in (1, 5):
        query = query_of(count=count)
        assert_close(attend_packed(query, layer), exact(query, layer))
    layer.crop(-101)
    query = query_of()
    assert_close(attend_packed(query, layer), exact(query, layer))


@pytest.mark.parametrize("removed", [1, 20, 60, 101])
def test_what_is_left_of_a_cropped_block_is_read(isa, removed):
    layer = layer_of(Spec(Int(2, zero="real"), Block(32, 1)), Spec(Int(2, zero="real"), PerGroup(32)), recent=32)
    assert compiled_reason(layer) is None
    layer.crop(-removed)
    made = torch.Generator().manual_seed(1)
    layer.update(*(torch.randn(2, 2, 90, 64, generator=made) for _ in range(2)))
    query = query_of()
    assert_close(attend_packed(query, layer), exact(query, layer))


def test_masks_of_padded_batches_are_read(isa):
    layer = layer_of(Spec(Int(4, zero="real"), Block(32, 1)), Spec(Int(4, zero="real"), PerGroup(32)), recent=32)
    assert compiled_reason(layer) is None
    for count in (1, 4):
        mask = torch.ones(2, 1, count, 150, dtype=torch.bool).tril(150 - count)
        mask[1, :, :, :77] = False
        query = query_of(count=count)
        assert_close(attend_packed(query, layer, mask), exact(query, layer, mask))
        added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        assert_close(attend_packed(query, layer, added), exact(query, layer, mask))
        holed = mask.clone()
        holed[:, :, :, 100:110] = False  # goes through runs
        assert_close(attend_packed(query, layer, holed), exact(query, layer, holed))


def test_a_key_of_nan_is_not_hidden(isa):
    layer = layer_of(Spec(Int(4, zero="real"), PerToken()), Spec(Int(4, zero="real"), PerToken()))
    key, value = torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64)
    key[0, 0, 0, 3] = torch.nan
    layer.update(key, value)
    assert attend_packed(query_of(), layer)[0, :, 0].isnan().any()


@pytest.mark.parametrize("grid", [g for g in GRIDS if isinstance(g, Int)], ids=str)
@pytest.mark.parametrize("grain", GRAINS, ids=str)
def test_compiled_code_packs_as_torch_does(isa, grid, grain):
    """Bit for bit."""
    rows = grain.rows if isinstance(grain, Block) else 1
    options = {"key_rotation": "hadamard"} if rows == 1 else {"before_rope": True}
    layer = layer_of(Spec(grid, grain), None, recent=2 * rows, count=5 * rows + 40, **options)
    side = layer.key_side
    assert packs(side)
    tokens = torch.randn(2, 2, 2 * rows, 64, generator=torch.Generator().manual_seed(3)) * 3
    tokens[0, 0] = 0.0
    tokens[1, 0] = 2.5
    side.append(tokens)
    side.packed.reserve(4 * rows)
    wanted = copy.deepcopy(side.packed)
    count = 2 * rows
    tokens = side.waiting.tokens[:, :, :count]
    if side.frequencies is not None:
        tokens = turned(tokens, side.frequencies, side.packed_length, -1)
    wanted.append(side.coordinates.forward(tokens))
    assert kernels.cache.pack(isa, Description().current(side), count)
    side.packed.count(count)
    ours, theirs = side.packed.decode(), wanted.decode()
    if "key_rotation" in options:
        torch.testing.assert_close(ours, theirs, atol=0.5, rtol=0)
        assert (ours == theirs).float().mean() > 0.98  # the rotation's sums are in another order
    else:
        assert torch.equal(ours, theirs)


CALIBRATED = {"key_rotation": "learned", "value_rotation": "learned", **dict.fromkeys(("key_scaled", "key_shifted", "value_scaled", "value_shifted"), True)}  # fmt: skip


def drawn_coordinates(heads, dim, seed):
    """Of each head: a rotation, scales over a factor of ten, shifts of a few units."""
    made = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(heads, dim, dim, generator=made))[0]
    scale = torch.randn(heads, 1, dim, generator=made).mul(0.6).exp()
    return Coordinates(rotation, scale, 2 * torch.randn(heads, 1, dim, generator=made))


@pytest.mark.parametrize("grain", GRAINS[:4], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (3, 24)])
@pytest.mark.parametrize("centred", [False, True])
def test_calibrated_coordinates_of_every_head_are_read(isa, grain, heads, dim, centred):
    """In compiled code, in runs of decoded tokens and all at once: scores and mixtures in coordinates are those without."""
    values = grain if not isinstance(grain, Block) else PerGroup(32)
    spec = KVSpec(
        Spec(Int(4, zero="real"), grain), Spec(Int(4, zero="real"), values), recent=64, centred=centred, **CALIBRATED
    )
    layer = PackedLayer(spec, drawn_coordinates(heads, dim, 1), drawn_coordinates(heads, dim, 2))
    made = torch.Generator().manual_seed(0)
    layer.update(*(torch.randn(2, heads, 200, dim, generator=made) for _ in range(2)))
    assert compiled_reason(layer) is None and layer.key_side.packed_length and layer.value_side.packed_length
    for count in (1, 5, 20):
        query = query_of(heads=3 * heads, count=count, dim=dim)
        wanted = exact(query, layer)
        assert_close(attend_packed(query, layer), wanted, 1e-4)
        assert_close(attend_packed(query, layer, compiled=False), wanted, 1e-4)


@pytest.mark.parametrize("part", ["rotation", "scale", "shift"])
def test_compiled_code_packs_in_calibrated_coordinates_as_torch_does(isa, part):
    """Bit for bit where no sum's order matters."""
    place = Coordinates(**{part: getattr(drawn_coordinates(2, 64, 3), part)})
    layer = PackedLayer(KVSpec(Spec(Int(4, zero="real"), PerGroup(32)), None, recent=8), place)
    layer.update(*(torch.randn(2, 2, 60, 64, generator=torch.Generator().manual_seed(0)) for _ in range(2)))
    side = layer.key_side
    side.append(torch.randn(2, 2, 4, 64, generator=torch.Generator().manual_seed(3)))
    side.packed.reserve(4)
    wanted = copy.deepcopy(side.packed)
    wanted.append(side.coordinates.forward(side.waiting.tokens[:, :, :4]))
    assert kernels.cache.pack(isa, Description().current(side), 4)
    side.packed.count(4)
    ours, theirs = side.packed.decode(), wanted.decode()
    if part == "rotation":
        assert (ours == theirs).float().mean() > 0.98
        assert_close(ours, theirs, 0.5)
    else:
        assert_close(ours, theirs, 1e-6)


def test_scales_beyond_their_storage_are_told(isa):
    layer = layer_of(Spec(Int(4, zero="real"), PerToken()), None, recent=0)
    layer.key_side.append(torch.full((2, 2, 1, 64), 3e38))
    layer.key_side.packed.reserve(1)
    layer.key_side.waiting.tokens[..., 0] = -3e38
    assert not kernels.cache.pack(isa, Description().current(layer.key_side), 1)


@pytest.mark.skipif(not SETS, reason="lowbit was installed without its compiled kernels")
def test_bits_do_not_depend_on_threads():
    layer = layer_of(Spec(Int(4, zero="real"), Block(32, 1)), Spec(Int(4, zero="real"), PerGroup(32)), recent=32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(attend_packed(query_of(count=3), layer))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
