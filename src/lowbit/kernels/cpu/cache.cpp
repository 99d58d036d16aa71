// What Python sees of cache.h: a layer's keys and values, described once and whenever a buffer moves, and attention over them.
#include "cache.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>

#include "step.h"

namespace nb = nanobind;

namespace lowbit {

using Loop = void (*)(int64_t pieces, int threads, const std::function<void(int64_t)>& piece);

namespace {

const Kernels* (*called)(const std::string&);
Loop run_parallel;

constexpr int64_t CUT = 128;     // tokens are cut into parts at multiples of it

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

float* filled(std::vector<float>& store, int64_t n) {
  if (static_cast<int64_t>(store.size()) < n) store.resize(n);
  return store.data();
}

// y [cols] = x [rows] matrix [rows, cols]
void times(const float* x, const float* matrix, int64_t n, float* y) {
  std::fill_n(y, n, 0.0f);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) y[j] += x[i] * matrix[i * n + j];
}

// y [rows] = matrix [rows, cols] x [cols]
void transposed_times(const float* x, const float* matrix, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += x[j] * matrix[i * n + j];
    y[i] = sum;
  }
}

}  // namespace

namespace {

// The first packed token of `part`.
int64_t first_of(const PackedTokens& t, Part part) { return t.length / CUT * part.number / part.of * CUT; }

// The tokens of `part`: the first has those that are kept, the last those that wait.
CacheSide part_of(CacheSide side, Part part) {
  if (part.of == 1) return side;
  PackedTokens& t = side.packed;
  const int64_t blocks = CUT / (t.rows > 1 ? t.rows : 1), cuts = t.length / CUT;
  const int64_t first = first_of(t, part), last = part.number + 1 == part.of ? t.length : cuts * (part.number + 1) / part.of * CUT;
  if (part.number) side.kept.length = 0;
  if (part.number + 1 < part.of) side.waiting.length = 0;
  const int64_t tile = t.rows > 1 ? first / t.rows * t.block_tiles() : first / LANES;
  const int64_t params = t.rows > 1 ? first / t.rows * t.groups : tile * t.groups * LANES;
  t.codes += tile * t.tile_words();
  t.scale = static_cast<char*>(t.scale) + params * number_bytes(t.number);
  if (t.zero) t.zero = static_cast<char*>(t.zero) + params * number_bytes(t.number);
  if (t.rows > 1) {
    t.counts += first / t.rows;
    t.blocks = part.number + 1 == part.of ? t.blocks - first / t.rows : (last - first) / CUT * blocks;
  }
  t.length = last - first;
  return side;
}

}  // namespace

int64_t parts_of(const LayerSide& keys, const LayerSide& values) {
  const PackedTokens &k = keys.packed, &v = values.packed;
  if (keys.kept_length != values.kept_length || CUT % k.rows || k.length / CUT != v.length / CUT) return 1;
  if (k.rows > 1 && static_cast<int64_t>(keys.counts.size()) * k.rows != k.length) return 1;  // something was cropped
  return k.length >= 4 * CUT ? 2 : 1;
}

void attend_head(const CacheKernels& k, const LayerSide& keys, const LayerSide& values, int64_t head, int64_t more, const float* q,
                 int64_t rows, const int32_t* begin, const int32_t* end, float* out, CacheRoom& room, Part part, float* most,
                 float* total) {
  const int64_t dk = keys.dim(), dv = values.dim();
  const float *rotation = keys.rotation_of(head), *scale = keys.scale_of(head), *shift = keys.shift_of(head);
  const float* packed_q = q;
  float* constant = nullptr;
  const bool turned = keys.turning.cos != nullptr;  // then the tokens come back from their coordinates
  if (keys.packed.length && (rotation || scale) && !turned) {
    float *to = filled(room.queries, (rows + 1) * dk), *scaled = to + rows * dk;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < dk; ++d) scaled[d] = q[r * dk + d] * (scale ? scale[d] : 1.0f);
      if (rotation) times(scaled, rotation, dk, to + r * dk);
      else std::copy_n(scaled, dk, to + r * dk);
    }
    packed_q = to;
  }
  if (keys.packed.length && shift && !turned) {
    constant = filled(room.constant, rows);
    for (int64_t r = 0; r < rows; ++r) {
      float sum = 0;
      for (int64_t d = 0; d < dk; ++d) sum += q[r * dk + d] * shift[d];
      constant[r] = sum;
    }
  }
  if (!most) {
    most = filled(room.softmax, 2 * rows);
    total = most + rows;
  }
  Turning turning = turned ? keys.turning_of(head) : Turning{};
  CacheAttention a{q, packed_q, turning, constant, begin, end, rows, part_of(keys.of(head, more), part), part_of(values.of(head, more), part),
                   nullptr, out, filled(room.packed_out, rows * dv), filled(room.weight, rows), most, total};
  a.turning.position += first_of(keys.packed, part);
  a.room = filled(room.room, cache_room(a));
  k.attend(a);
  if (!a.values.packed.length) return;
  rotation = values.rotation_of(head), scale = values.scale_of(head), shift = values.shift_of(head);
  float* back = filled(room.x, dv);
  for (int64_t r = 0; r < rows; ++r) {
    const float* mixed = a.packed_out + r * dv;
    if (rotation) transposed_times(mixed, rotation, dv, back), mixed = back;
    for (int64_t d = 0; d < dv; ++d)
      out[r * dv + d] += mixed[d] * (scale ? scale[d] : 1.0f) + (shift ? shift[d] * a.weight[r] : 0.0f);
  }
}

bool pack_head(const CacheKernels& k, const LayerSide& side, int64_t head, int64_t count,
               void (*read)(const void*, int32_t, int64_t, int64_t, float*), CacheRoom& room) {
  if (!count) return true;
  const int64_t dim = side.dim();
  const float *rotation = side.rotation_of(head), *scale = side.scale_of(head), *shift = side.shift_of(head);
  const CacheSide of = side.of(head);
  float *x = filled(room.x, (count + 1) * dim), *moved = x + count * dim;
  read(of.waiting.data, side.type, 0, count * dim, x);
  const Turning& turning = side.turning;
  for (int64_t i = 0; i < count; ++i) {
    float* row = x + i * dim;
    const int64_t position = side.kept_length + side.packed.length + i;
    for (int64_t d = 0; d < turning.turned; ++d) {  // back to position 0
      const float cos = turning.cos[d * turning.room + position], sin = turning.sin[d * turning.room + position];
      const float first = row[d], second = row[d + turning.turned];
      row[d] = first * cos + second * sin;
      row[d + turning.turned] = second * cos - first * sin;
    }
    for (int64_t d = 0; d < dim && shift; ++d) row[d] -= shift[d];
    for (int64_t d = 0; d < dim && scale; ++d) row[d] /= scale[d];
    if (rotation) times(row, rotation, dim, moved), std::copy_n(moved, dim, row);
  }
  return k.pack(of.packed, x, count, side.symmetric, side.whole, filled(room.room, pack_room(of.packed)));
}

namespace {

// q [batch, heads, rows, dim of keys] scaled, out [batch, heads, rows, dim of values]; row r sees the keys from begin to end
// [batch, queries] at r % queries.
void attend(const std::string& isa, const LayerSide& keys, const LayerSide& values, uintptr_t q, int64_t rows, int64_t queries,
            uintptr_t begin, uintptr_t end, uintptr_t out, int threads) {
  if (keys.batch != values.batch || keys.heads != values.heads || queries < 1 || rows % queries)
    throw std::invalid_argument("keys, values and queries do not fit each other");
  if (!keys.turns_all(0)) throw std::invalid_argument("the rotary embedding is not known at all positions");
  const CacheKernels* k = called(isa)->cache;
  nb::gil_scoped_release release;
  const int64_t chunks = (rows + CACHE_QUERIES - 1) / CACHE_QUERIES, all = keys.batch * keys.heads;
  run_parallel(all * chunks, threads, [&](int64_t piece) {
    static thread_local CacheRoom room;
    const int64_t head = piece / chunks, first = piece % chunks * CACHE_QUERIES, n = std::min(CACHE_QUERIES, rows - first);
    int32_t from[CACHE_QUERIES], to[CACHE_QUERIES];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t query = head / keys.heads * queries + (first + i) % queries;
      from[i] = at<int32_t>(begin)[query];
      to[i] = at<int32_t>(end)[query];
    }
    attend_head(*k, keys, values, head, 0, at<float>(q) + (head * rows + first) * keys.dim(), n, from, to,
                at<float>(out) + (head * rows + first) * values.dim(), room);
  });
}

// Tiles from `first` to `last` of every head: out [batch, heads, slots, dim].
void decode(const std::string& isa, const LayerSide& side, int64_t first, int64_t last, uintptr_t out, int threads) {
  const CacheKernels* k = called(isa)->cache;
  if (first < 0 || last > side.tiles || side.packed.bits < 1) throw std::invalid_argument("there are no such tiles");
  nb::gil_scoped_release release;
  const int64_t heads = side.batch * side.heads, dim = side.dim(), count = last - first;
  run_parallel(heads * count, threads, [&](int64_t i) {
    static thread_local std::vector<float> room;
    k->decode(side.of(i / count).packed, first + i % count, at<float>(out) + i * LANES * dim, filled(room, (dim + 32) * LANES));
  });
}

// Packs the first `count` waiting tokens of every head.
bool pack(const std::string& isa, const LayerSide& side, int64_t count, int threads) {
  const Kernels* kernels = called(isa);
  const Kernels* k = kernels->otherwise ? kernels->otherwise : kernels;
  if (count < 0 || count > side.waiting_length || count % side.packed.rows) throw std::invalid_argument("no such tokens wait");
  if (!side.turns_all(0)) throw std::invalid_argument("the rotary embedding is not known at all positions");
  nb::gil_scoped_release release;
  std::vector<uint8_t> finite(side.batch * side.heads);
  run_parallel(side.batch * side.heads, threads, [&](int64_t head) {
    static thread_local CacheRoom room;
    finite[head] = pack_head(*k->cache, side, head, count, k->step->read, room);
  });
  return std::all_of(finite.begin(), finite.end(), [](uint8_t f) { return f != 0; });
}

}  // namespace

void bind_cache(nb::module_& m, const Kernels* (*kernels_called)(const std::string&), Loop loop) {
  called = kernels_called;
  run_parallel = loop;
  nb::class_<LayerSide>(m, "LayerSide")
      .def("__init__",
           [](LayerSide* self, int64_t batch, int64_t heads, int64_t dim, int type) {
             new (self) LayerSide();
             self->batch = batch;
             self->heads = heads;
             self->packed.dim = dim;
             self->packed.rows = 1;
             self->type = type;
           })
      .def("format",
           [](LayerSide& s, int bits, std::vector<float> table, float middle, int64_t words, int64_t groups, int64_t width,
              int64_t rows, int number, bool symmetric, bool whole) {
             if (bits < 1 || bits > 8 || (!table.empty() && table.size() != size_t{1} << bits) || rows < 1 || width < 1 ||
                 words * 32 < s.dim() * bits || groups * width < s.dim() || (groups - 1) * width >= s.dim())
               throw std::invalid_argument("no such format of packed tokens");
             s.packed.bits = bits;
             s.table = std::move(table);
             s.packed.middle = middle;
             s.packed.words = words;
             s.packed.groups = groups;
             s.packed.width = width;
             s.packed.rows = rows;
             s.packed.number = number;
             s.symmetric = symmetric;
             s.whole = whole;
           })
      .def("packed",
           [](LayerSide& s, uintptr_t codes, int64_t tiles, uintptr_t scale, uintptr_t zero, int64_t params, std::vector<int32_t> counts,
              int64_t length) {
             s.packed.codes = at<uint32_t>(codes);
             s.tiles = tiles;
             s.packed.scale = at<void>(scale);
             s.packed.zero = at<void>(zero);
             s.params = params;
             s.counts = std::move(counts);
             s.packed.length = length;
           })
      .def("floats",
           [](LayerSide& s, uintptr_t kept, int64_t kept_room, int64_t kept_length, uintptr_t waiting, int64_t waiting_room,
              int64_t start, int64_t waiting_length) {
             s.kept = kept;
             s.kept_room = kept_room;
             s.kept_length = kept_length;
             s.waiting = waiting;
             s.waiting_room = waiting_room;
             s.start = start;
             s.waiting_length = waiting_length;
           })
      .def("coordinates",
           [](LayerSide& s, uintptr_t rotation, int64_t rotation_step, uintptr_t scale, uintptr_t shift, int64_t shift_step) {
             s.rotation = at<float>(rotation);
             s.rotation_step = rotation_step;
             s.scale = at<float>(scale);
             s.shift = at<float>(shift);
             s.shift_step = shift_step;
           })
      .def("turning",
           [](LayerSide& s, uintptr_t cos, uintptr_t sin, int64_t turned, int64_t room) {
             if (turned < 1 || 2 * turned > s.dim()) throw std::invalid_argument("no such rotary embedding");
             s.turning.cos = at<float>(cos);
             s.turning.sin = at<float>(sin);
             s.turning.turned = turned;
             s.turning.room = room;
           })
      .def_rw("leaving", &LayerSide::leaving);
  m.def("attend_cache", &attend);
  m.def("decode_cache", &decode);
  m.def("pack_cache", &pack);
}

}  // namespace lowbit
