// What Python sees: addresses and sizes in, nothing owned. Checks that tensors fit each other are made here, once.
#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "pack.h"
#include "tiles.h"

namespace nb = nanobind;
using namespace lowbit;

namespace lowbit {
void bind_step(nb::module_& m, const Kernels* (*kernels_called)(const std::string&));  // step.cpp
}

namespace {

// ---- instruction sets -------------------------------------------------------------------------------------------------

// Widest first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(avx512_kernels());
  if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(avxvnni_kernels());
  if (avx2) found.push_back(avx2_kernels());
#elif defined(__aarch64__)
  found.push_back(neon_kernels());
#endif
  found.push_back(portable_kernels());
  return found;
}

const Kernels* kernels_called(const std::string& name) {
  for (const Kernels* k : available())
    if (name.empty() || name == k->name) return k;
  throw std::invalid_argument("this CPU does not run " + name);
}

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

// ---- entry points -----------------------------------------------------------------------------------------------------

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Canonical canonical(int kind, int bits, int64_t rows, int64_t cols, int64_t group, uintptr_t codes, uintptr_t scale,
                    uintptr_t zero, float zero_constant) {
  if (kind < UNIFORM || kind > BINARY || bits < 1 || bits > 8 || rows < 1 || cols < 1 || group < 1 || group > cols)
    throw std::invalid_argument("no weight has this kind, width or shape");
  return {kind, bits, rows, cols, group, at<uint8_t>(codes), at<float>(scale), at<float>(zero), zero_constant};
}

// Pages of 2 MiB for what lies between its borders; worth a fifth of the speed of memory where the system gives them.
void advise([[maybe_unused]] uintptr_t memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 1 << 21, begin = (memory + page - 1) / page * page, end = (memory + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
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

void unpack_into(uintptr_t tiles, int64_t bytes, uintptr_t codes, int threads) {
  const auto* data = at<uint8_t>(tiles);
  const Tiles t = header(data, bytes);
  nb::gil_scoped_release release;
  run_blocks(t.blocks, threads, bytes, [&](int64_t first, int64_t last) { unpack(t, data, at<uint8_t>(codes), first, last); });
}

template <class T>
T* workspace(std::vector<T>& store, int64_t n) {
  if (static_cast<int64_t>(store.size()) < n) store.resize(n);
  return store.data();
}

void linear(const std::string& isa, uintptr_t tiles, int64_t bytes, uintptr_t table, uintptr_t x, int x_type, int64_t m,
            uintptr_t y, int y_type, int input, int act_bits, bool act_symmetric, bool act_shared, uintptr_t act_scale,
            uintptr_t act_zero, int threads) {
  const auto* data = at<uint8_t>(tiles);
  const Tiles t = header(data, bytes);
  const Kernels* k = kernels_called(isa);
  if (m == 0) return;
  const int64_t plane = t.padded_cols() * (t.kind == CODEBOOK ? LANES : 1), planes = input == FLOATS ? 0 : input;
  static thread_local std::vector<float> floats;
  static thread_local std::vector<int8_t> integers;
  float* f = workspace(floats, m * (plane + t.segments() + t.groups + 1));
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
  job.act_shared = act_shared;
  job.act_scale = at<float>(act_scale);
  job.act_zero = at<float>(act_zero);
  job.xf = f;
  job.xs = f + m * plane;
  job.xsum = job.xs + m * t.segments();
  job.xzero = job.xsum + m * t.groups;
  job.xq = workspace(integers, m * planes * plane);
  nb::gil_scoped_release release;
  run_blocks(m, m < 4 ? 1 : threads, m * plane * 4, [&](int64_t first, int64_t last) { k->prepare(job, first, last); });
  run_blocks(t.blocks, threads, bytes * (m + 7) / 8, [&](int64_t first, int64_t last) { k->multiply(job, first, last); });
}

void decode(const std::string& isa, uintptr_t tiles, int64_t bytes, uintptr_t table, int64_t first, int64_t last,
            uintptr_t out, int type, int threads) {
  const auto* data = at<uint8_t>(tiles);
  const Tiles t = header(data, bytes);
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
  m.doc() = "Products with packed weights on CPUs; called by lowbit.kernels.native only.";
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available()) names.emplace_back(k->name);
    return names;
  });
  m.def("use_pool", [](uintptr_t address) { pool = reinterpret_cast<Parallel>(address); });
  m.def("advise", &advise);
  m.def("packed_bytes", &packed_bytes);
  m.def("pack", &pack_into);
  m.def("unpack", &unpack_into);
  m.def("linear", &linear);
  m.def("decode", &decode);
  m.def("read", &read_memory);
  bind_step(m, &kernels_called);
}
