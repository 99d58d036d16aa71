// What Python sees: addresses and sizes in, nothing owned. Checks that tensors fit each other are made here, once.
#if defined(__x86_64__) && defined(__linux__)
#define LOWBIT_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "pack.h"
#include "step.h"
#include "tiles.h"

namespace nb = nanobind;
using namespace lowbit;

namespace lowbit {
void bind_step(nb::module_& m, const Kernels* (*kernels_called)(const std::string&));  // step.cpp
void bind_cache(nb::module_& m, const Kernels* (*kernels_called)(const std::string&),
                void (*loop)(int64_t pieces, int threads, const std::function<void(int64_t)>& piece));  // cache.cpp
void bind_solve(nb::module_& m, const Kernels* (*kernels_called)(const std::string&),
                void (*loop)(int64_t pieces, int threads, const std::function<void(int64_t)>& piece));  // solve.cpp
}

namespace {

// ---- threads ----------------------------------------------------------------------------------------------------------

// torch's own pool: the OpenMP runtime that it brought along is asked to run our loop too. A second pool would fight it
// for the cores, and linking to a runtime of our own would start one.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel pool = nullptr;

void run_parallel(int64_t pieces, int threads, const std::function<void(int64_t)>& piece) {
  threads = static_cast<int>(std::min<int64_t>(threads, pieces));
  if (threads <= 1 || pool == nullptr) {
    for (int64_t i = 0; i < pieces; ++i) piece(i);
    return;
  }
  struct Work {
    std::atomic<int64_t> next{0};
    int64_t pieces;
    const std::function<void(int64_t)>* piece;
  } work;
  work.pieces = pieces;
  work.piece = &piece;
  pool(
      [](void* p) {
        auto* w = static_cast<Work*>(p);
        for (int64_t i; (i = w->next.fetch_add(1, std::memory_order_relaxed)) < w->pieces;) (*w->piece)(i);
      },
      &work, static_cast<unsigned>(threads), 0);
}

// `n` blocks in a few pieces a thread, so that a thread that is held up does not hold up the others.
void run_blocks(int64_t n, int threads, int64_t bytes, const std::function<void(int64_t, int64_t)>& blocks) {
  if (bytes < 32768) threads = 1;  // waking a thread takes longer
  const int64_t pieces = threads <= 1 ? 1 : std::min<int64_t>(n, bytes < (1 << 20) ? threads : 4 * threads);
  run_parallel(pieces, threads, [&](int64_t i) { blocks(n * i / pieces, n * (i + 1) / pieces); });
}

// Pages of 2 MiB for what lies between its borders; worth a fifth of the speed of memory where the system gives them.
void advise([[maybe_unused]] uintptr_t memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 1 << 21, begin = (memory + page - 1) / page * page, end = (memory + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// ---- a product --------------------------------------------------------------------------------------------------------

// At the start of a cache line: the row of a tile is one.
template <class T>
T* workspace(std::vector<T>& store, int64_t n) {
  constexpr int64_t line = 64, spare = line / sizeof(T);
  if (static_cast<int64_t>(store.size()) < n + spare) {
    store.clear();
    store.reserve(n + spare);
    advise(reinterpret_cast<uintptr_t>(store.data()), n * sizeof(T));
    store.resize(n + spare);
  }
  return store.data() + -reinterpret_cast<uintptr_t>(store.data()) % line / sizeof(T);
}

// Who does what `k` is asked for.
const Kernels* runs(const Kernels* k, const Job& job) {
  return k->takes && !k->takes(*job.tiles, job.input, job.m) ? k->otherwise : k;
}

// Products in float32 of the tokens that fixed point would drown; they replace what is in job.y.
void multiply_drowned(const Kernels* k, const Job& job, int threads) {
  const Tiles& t = *job.tiles;
  const StepKernels& s = *k->step;
  std::vector<float> x(t.cols), kept;
  std::vector<int64_t> tokens;
  for (int64_t token = 0; token < job.m; ++token) {
    s.read(job.x, job.x_type, token * t.cols, t.cols, x.data());
    if (!drowns(t, x.data())) continue;
    tokens.push_back(token);
    kept.insert(kept.end(), x.begin(), x.end());
  }
  if (tokens.empty()) return;
  run_blocks(t.blocks, threads, t.total_bytes * 8, [&](int64_t first, int64_t last) {
    std::vector<float> weight(LANES * t.cols);
    float y[LANES];
    for (int64_t block = first; block < last; ++block) {
      const int64_t row = block * LANES, n = std::min<int64_t>(LANES, t.rows - row);
      k->decode(t, job.data, job.table, row, row + n, weight.data(), F32);
      for (size_t i = 0; i < tokens.size(); ++i) {
        s.dense(weight.data(), F32, t.cols, kept.data() + i * t.cols, 0, n, y);
        s.write(y, n, job.y, job.y_type, tokens[i] * t.rows + row);
      }
    }
  });
}

// Fills job.y; the workspace is made here.
void multiply(const Kernels* k, Job job, int threads) {
  const Kernels* by_lanes = k->otherwise ? k->otherwise : k;
  k = runs(k, job);
  const Tiles& t = *job.tiles;
  const int64_t m = job.m, plane = t.padded_cols() * (t.kind == CODEBOOK ? LANES : 1);
  const int64_t planes = job.input == FLOATS ? 0 : job.input, floats = k->takes ? 0 : m * plane;
  static thread_local std::vector<float> numbers;
  static thread_local std::vector<int8_t> integers;
  job.xf = workspace(numbers, floats + m * (t.segments() + t.groups + 1));
  job.xs = job.xf + floats;
  job.xsum = job.xs + m * t.segments();
  job.xzero = job.xsum + m * t.groups;
  job.xq = workspace(integers, k->takes ? k->input_bytes(t, job.input, m) : m * planes * plane);
  run_blocks(m, m < 4 ? 1 : threads, m * plane * 4, [&](int64_t first, int64_t last) { k->prepare(job, first, last); });
  run_blocks(t.blocks, threads, t.total_bytes * (m + 7) / 8, [&](int64_t first, int64_t last) { k->multiply(job, first, last); });
  if (job.input == FIXED) multiply_drowned(by_lanes, job, threads);
}

// ---- instruction sets -------------------------------------------------------------------------------------------------

// Matrix tiles of bytes and of bfloat16: the processor has them, the system saves them, and lets this process use them.
[[maybe_unused]] bool has_matrix_tiles() {
#ifdef LOWBIT_AMX
  unsigned a, b, c, d, e;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &e, &b, &c, &b)) return false;
  const unsigned bfloat_tiles = 1u << 22, tiles = 1u << 24, byte_tiles = 1u << 25, avx512_bf16 = 1u << 5;
  if ((d & (bfloat_tiles | tiles | byte_tiles)) != (bfloat_tiles | tiles | byte_tiles) || !(e & avx512_bf16)) return false;
  unsigned saved, high;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const unsigned configuration_and_data = 3u << 17;
  if ((saved & configuration_and_data) != configuration_and_data) return false;
  const long request = 0x1023, data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, data) == 0;
#else
  return false;
#endif
}

// Whether `k` computes a small product as the portable kernels do, from a weight of 4 bits and 40 x 200 whose products are
// exact in every way of the input. An emulator or a compiler may break tiles where the processor says that it has them.
// `spoil` changes one code before `k` sees it.
[[maybe_unused]] bool agrees(const Kernels* k, bool spoil) {
  constexpr int64_t rows = 40, cols = 200, group = 64, groups = 4, tokens = 17;
  uint32_t state = 1;
  auto next = [&](uint32_t n) { return (state = state * 1664525 + 1013904223) >> 16 & (n - 1); };
  std::vector<uint8_t> codes(rows * cols / 2);
  std::vector<float> scale(rows * groups), zero(rows * groups), x(tokens * cols);
  for (uint8_t& byte : codes) byte = static_cast<uint8_t>(next(256));
  for (float& s : scale) s = 1.0f / static_cast<float>(1 + next(2));
  for (float& z : zero) z = static_cast<float>(next(16));
  for (float& v : x) v = static_cast<float>(next(128)) - 64.0f;
  for (int64_t i = 0; i < tokens; ++i) x[i * cols + i] = 127.0f;  // so that a step of 8 bits is one
  std::vector<uint16_t> halves(x.size());
  for (size_t i = 0; i < x.size(); ++i) std::memcpy(&halves[i], reinterpret_cast<char*>(&x[i]) + 2, 2);
  const Canonical from{UNIFORM, 4, rows, cols, group, codes.data(), scale.data(), zero.data(), 0.0f};
  const Tiles t = describe(from);
  std::vector<uint8_t> data(t.total_bytes);
  write_header(t, data.data());
  pack(from, t, data.data(), 0, t.blocks);
  for (const int32_t input : {INT8, HALVES, FIXED}) {
    Job job{};
    job.tiles = &t;
    job.data = data.data();
    job.x_type = job.y_type = F32;
    job.m = tokens;
    job.input = input == HALVES ? FIXED : input;
    job.act_bits = input == INT8 ? 8 : 0;
    job.act_symmetric = true;
    std::vector<float> expected(tokens * rows), found(tokens * rows);
    job.x = x.data();
    job.y = expected.data();
    multiply(portable_kernels(), job, 1);
    if (spoil) data[HEADER] ^= 1;
    if (input == HALVES) job.x = halves.data(), job.x_type = BF16;
    job.input = input;
    job.y = found.data();
    multiply(k, job, 1);
    if (spoil) data[HEADER] ^= 1;
    for (size_t i = 0; i < found.size(); ++i)
      if (!(std::abs(found[i] - expected[i]) < 0.1f)) return false;  // sums are multiples of a half, fixed point is near
  }
  return true;
}

// Widest first.
std::vector<const Kernels*> look([[maybe_unused]] bool spoil) {
  std::vector<const Kernels*> found;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#ifndef LOWBIT_WITHOUT_avx512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
#if defined(LOWBIT_AMX) && !defined(LOWBIT_WITHOUT_amx)
    if (has_matrix_tiles() && agrees(amx_kernels(), spoil)) found.push_back(amx_kernels());
#endif
    found.push_back(avx512_kernels());
  }
#endif
#ifndef LOWBIT_WITHOUT_avxvnni
  if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(avxvnni_kernels());
#endif
  if (avx2) found.push_back(avx2_kernels());
#elif defined(__aarch64__)
  found.push_back(neon_kernels());
#endif
  found.push_back(portable_kernels());
  return found;
}

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = look(false);
  return found;
}

const Kernels* kernels_called(const std::string& name) {
  for (const Kernels* k : available())
    if (name.empty() || name == k->name) return k;
  throw std::invalid_argument("this CPU does not run " + name);
}

// ---- entry points -----------------------------------------------------------------------------------------------------

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The header of tiles, which must be of this shape; a table must have a value for each of their codes.
Tiles fitting(uintptr_t tiles, int64_t bytes, int64_t rows, int64_t cols, uintptr_t table, int64_t values) {
  const Tiles t = header(at<uint8_t>(tiles), bytes);
  if (t.rows != rows || t.cols != cols) throw std::invalid_argument("the packed tiles are of another shape than the layer");
  if (t.kind == TABLE && (!table || values < int64_t{1} << t.bits))
    throw std::invalid_argument("the table has fewer values than the packed tiles have codes");
  return t;
}

Canonical canonical(int kind, int bits, int64_t rows, int64_t cols, int64_t group, uintptr_t codes, uintptr_t scale,
                    uintptr_t zero, float zero_constant) {
  if (kind < UNIFORM || kind > BINARY || bits < 1 || bits > 8 || rows < 1 || cols < 1 || group < 1 || group > cols)
    throw std::invalid_argument("no weight has this kind, width or shape");
  return {kind, bits, rows, cols, group, at<uint8_t>(codes), at<float>(scale), at<float>(zero), zero_constant};
}

void pack_into(int kind, int bits, int64_t rows, int64_t cols, int64_t group, uintptr_t codes, uintptr_t scale,
               uintptr_t zero, float zero_constant, uintptr_t out, int64_t bytes, int threads) {
  const Canonical from = canonical(kind, bits, rows, cols, group, codes, scale, zero, zero_constant);
  const Tiles t = describe(from);
  if (t.total_bytes != bytes) throw std::invalid_argument("the buffer is not as long as the tiles");
  auto* data = at<uint8_t>(out);
  advise(out, bytes);
  write_header(t, data);
  nb::gil_scoped_release release;
  run_blocks(t.blocks, threads, bytes, [&](int64_t first, int64_t last) { pack(from, t, data, first, last); });
}

int64_t packed_bytes(int kind, int bits, int64_t rows, int64_t cols, int64_t group, uintptr_t scale, uintptr_t zero) {
  return describe(canonical(kind, bits, rows, cols, group, 0, scale, zero, 0.0f)).total_bytes;
}

void unpack_into(uintptr_t tiles, int64_t bytes, uintptr_t codes, int64_t rows, int64_t cols, int bits, int threads) {
  const auto* data = at<uint8_t>(tiles);
  const Tiles t = header(data, bytes);
  if (t.rows != rows || t.cols != cols || t.bits != bits)
    throw std::invalid_argument("the packed tiles are of another shape or width than the layer");
  nb::gil_scoped_release release;
  run_blocks(t.blocks, threads, bytes, [&](int64_t first, int64_t last) { unpack(t, data, at<uint8_t>(codes), first, last); });
}

// x [m, cols], y [m, rows].
void linear(const std::string& isa, uintptr_t tiles, int64_t bytes, uintptr_t table, int64_t values, uintptr_t x, int x_type,
            int64_t m, int64_t cols, uintptr_t y, int y_type, int64_t rows, int input, int act_bits, bool act_symmetric, float act_reach, bool act_shared,
            uintptr_t act_scale, uintptr_t act_zero, int threads) {
  const auto* data = at<uint8_t>(tiles);
  const Tiles t = fitting(tiles, bytes, rows, cols, table, values);
  const Kernels* k = kernels_called(isa);
  if (m == 0) return;
  Job job{};
  job.tiles = &t;
  job.data = data;
  job.table = at<float>(table);
  job.x = at<void>(x);
  job.y = at<void>(y);
  job.x_type = x_type;
  job.y_type = y_type;
  job.m = m;
  job.input = input;
  job.act_bits = act_bits;
  job.act_symmetric = act_symmetric;
  job.act_reach = act_reach;
  job.act_shared = act_shared;
  job.act_scale = at<float>(act_scale);
  job.act_zero = at<float>(act_zero);
  if (input == FLOATS && t.kind != TABLE && t.kind != CODEBOOK)
    throw std::invalid_argument("only values that are looked up meet floats");
  if (input == HALVES && (x_type != BF16 || !runs(k, job)->takes))
    throw std::invalid_argument("only matrix tiles multiply bfloat16 as it is");
  nb::gil_scoped_release release;
  multiply(k, job, threads);
}

// Rows first..last of rows, [last - first, cols].
void decode(const std::string& isa, uintptr_t tiles, int64_t bytes, uintptr_t table, int64_t values, int64_t rows, int64_t cols,
            int64_t first, int64_t last, uintptr_t out, int type, int threads) {
  const auto* data = at<uint8_t>(tiles);
  const Tiles t = fitting(tiles, bytes, rows, cols, table, values);
  const int64_t height = t.kind == CODEBOOK ? 1 : LANES;
  if (first < 0 || last > t.rows || first > last || first % height != 0)
    throw std::invalid_argument("rows are decoded in whole blocks");
  const Kernels* k = kernels_called(isa);
  nb::gil_scoped_release release;
  const int64_t blocks = (last - first + height - 1) / height, size = type == F32 ? 4 : 2;
  run_blocks(blocks, threads, bytes, [&](int64_t a, int64_t b) {
    const int64_t from = first + a * height, to = std::min(last, first + b * height);
    if (from < to) k->decode(t, data, at<float>(table), from, to, at<char>(out) + (from - first) * t.cols * size, type);
  });
}

// y [m, rows] += x [m, cols] W^T, W of few values: compressed rows (`start`), or `width` values a row at the same columns.
void side(const std::string& isa, uintptr_t start, uintptr_t column, int column_bytes, uintptr_t value, int64_t width,
          int64_t rows, uintptr_t x, int x_type, int64_t m, int64_t cols, uintptr_t y, int y_type, int threads) {
  const Kernels* k = kernels_called(isa);
  Side s{at<int32_t>(start), at<void>(column), column_bytes, at<uint16_t>(value), width, rows, 1, nullptr, nullptr, y_type};
  nb::gil_scoped_release release;
  const int64_t values = start ? s.start[rows] : rows * width, blocks = (rows + LANES - 1) / LANES;
  const int64_t together = m <= 4 ? 1 : LANES;  // filling lanes pays from here on
  static thread_local std::vector<float> numbers;
  float* input = workspace(numbers, cols * together);
  for (int64_t t = 0; t < m; t += together) {
    s.tokens = std::min(together, m - t);
    const char* from = at<char>(x) + t * cols * number_bytes(x_type);
    s.y = at<char>(y) + t * rows * number_bytes(y_type);
    if (s.tokens == 1 && x_type == F32) {
      s.x = reinterpret_cast<const float*>(from);
    } else {
      s.x = input;
      run_blocks(cols, threads, s.tokens == 1 ? 0 : cols * s.tokens * 4, [&](int64_t first, int64_t last) {
        k->side_input(s, from, x_type, cols, input, first, last);
      });
    }
    run_blocks(blocks, threads, values * 4 * s.tokens, [&](int64_t first, int64_t last) {
      k->side(s, first * LANES, std::min(rows, last * LANES));
    });
  }
}

double read_memory(const std::string& isa, uintptr_t data, int64_t bytes, int threads) {
  const Kernels* k = kernels_called(isa);
  const int64_t pieces = 8 * threads, each = bytes / pieces / 256 * 256;
  std::vector<double> sums(pieces);
  nb::gil_scoped_release release;
  run_parallel(pieces, threads, [&](int64_t i) { sums[i] = k->read(at<uint8_t>(data) + i * each, each); });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Compiled code for CPUs: products with packed weights, and the inner loops of the solvers.";
  auto names_of = [](const std::vector<const Kernels*>& found) {
    std::vector<std::string> names;
    for (const Kernels* k : found) names.emplace_back(k->name);
    return names;
  };
  m.def("instruction_sets", [=] { return names_of(available()); });
  m.def("spoiled_instruction_sets", [=] { return names_of(look(true)); });
  m.def("use_pool", [](uintptr_t address) { pool = reinterpret_cast<Parallel>(address); });
  m.def("advise", &advise);
  m.def("packed_bytes", &packed_bytes);
  m.def("pack", &pack_into);
  m.def("unpack", &unpack_into);
  m.def("linear", &linear);
  m.def("decode", &decode);
  m.def("side", &side);
  m.def("read", &read_memory);
  bind_step(m, &kernels_called);
  bind_solve(m, &kernels_called, &run_parallel);
  bind_cache(m, &kernels_called, &run_parallel);
}
