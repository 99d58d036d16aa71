// What Python sees of solve.h: the loops over granules and over strips of rows, in torch's pool.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "solve.h"
#include "tiles.h"

namespace nb = nanobind;

namespace lowbit {

using Loop = void (*)(int64_t pieces, int threads, const std::function<void(int64_t)>& piece);

namespace {

constexpr int64_t SMALL_PIECE = 1 << 15;  // values

const Kernels* (*called)(const std::string&);
Loop run_parallel;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The levels of a grid, read where they lie.
void make_grid(Grid* self, int64_t count, bool own, uintptr_t values, uintptr_t midpoints, uintptr_t codes, float most,
               float middle, bool whole) {
  if (count < 0 || count > 256) throw std::invalid_argument("a grid has up to 256 levels");
  new (self) Grid{count, most, middle, whole, own, at<float>(values), at<float>(midpoints), at<uint8_t>(codes)};
}

// best [granules]: the number of each granule's first best candidate; -1 if none loses less than infinity.
void search(const std::string& isa, const Grid& grid, uintptr_t x, int64_t granules, int64_t size, uintptr_t importance,
            int64_t importance_step, uintptr_t scale, uintptr_t zero, int64_t tried, float norm, uintptr_t best, int threads) {
  if (grid.own) throw std::invalid_argument("a range places one grid for all granules");
  const SolveKernels* k = called(isa)->solve;
  nb::gil_scoped_release release;
  // Few granules are cut by their candidates, so that every thread has work.
  const int64_t wanted = threads <= 1 ? 1 : 4 * threads;
  const int64_t parts = std::clamp<int64_t>(wanted / std::max<int64_t>(granules, 1), 1, std::max<int64_t>(tried / 16, 1));
  std::vector<double> loss(granules * parts);
  std::vector<int32_t> number(granules * parts);
  const Search s{grid,           at<float>(x),  granules,       size, at<float>(importance), importance_step, at<float>(scale),
                 at<float>(zero), tried, norm, parts, loss.data(), number.data()};
  const int64_t all = granules * parts, pieces = std::min(all, wanted);
  run_parallel(pieces, threads, [&](int64_t p) {
    for (int64_t i = all * p / pieces; i < all * (p + 1) / pieces; ++i) k->search(s, i / parts, i % parts);
  });
  for (int64_t g = 0; g < granules; ++g) {
    double least = std::numeric_limits<double>::infinity();
    at<int32_t>(best)[g] = -1;
    for (int64_t i = g * parts; i < (g + 1) * parts; ++i)
      if (loss[i] < least) least = loss[i], at<int32_t>(best)[g] = number[i];
  }
}

// See Columns. True if descent changed a code.
bool columns(const std::string& isa, const Grid& grid, int64_t rows, int64_t count, int64_t pitch, uintptr_t input, uintptr_t mix,
             uintptr_t divisor, uintptr_t set, uintptr_t scale, uintptr_t zero, uintptr_t codes, uintptr_t moved, uintptr_t kept,
             uintptr_t value, float limit, uintptr_t target, uintptr_t error, int threads) {
  const SolveKernels* k = called(isa)->solve;
  const Columns c{grid,          rows,          count,           pitch,        at<float>(input), at<float>(mix),
                  at<float>(divisor), at<int32_t>(set), at<float>(scale), at<float>(zero), at<uint8_t>(codes), at<float>(moved),
                  at<uint8_t>(kept), at<float>(value), limit, at<float>(target), at<float>(error)};
  nb::gil_scoped_release release;
  std::atomic<bool> changed{false};
  run_parallel((rows + STRIP - 1) / STRIP, threads, [&](int64_t strip) {
    static thread_local std::vector<float> room;
    room.resize(std::max<size_t>(room.size(), columns_room(c)));
    if (k->columns(c, strip, room.data())) changed.store(true, std::memory_order_relaxed);
  });
  return changed.load();
}

// Pieces of work for `threads`: few threads' worth of granules, and no piece so small that handing it out costs more.
void by_granule(int64_t granules, int64_t size, int threads, const std::function<void(int64_t)>& one) {
  const int64_t wanted = threads <= 1 ? 1 : 4 * threads;
  const int64_t pieces = std::clamp<int64_t>(granules * size / SMALL_PIECE, 1, std::min(wanted, std::max<int64_t>(granules, 1)));
  run_parallel(pieces, threads, [&](int64_t p) {
    for (int64_t i = granules * p / pieces; i < granules * (p + 1) / pieces; ++i) one(i);
  });
}

// See Fake.
void fake(const std::string& isa, const Grid& grid, uintptr_t x, int64_t granules, int64_t size, uintptr_t scale, uintptr_t zero,
          uintptr_t y, int threads) {
  if (grid.count != 0) throw std::invalid_argument("levels that are listed are not simulated here");
  const SolveKernels* k = called(isa)->solve;
  nb::gil_scoped_release release;
  const Fake f{grid, at<float>(x), granules, size, at<float>(scale), at<float>(zero), at<float>(y), nullptr, nullptr, nullptr, nullptr};
  if (granules >= threads) {
    by_granule(granules, size, threads, [&](int64_t i) { k->fake_forward(f, i, 0, size); });
  } else {
    by_granule(threads, granules * size / threads, threads, [&](int64_t p) {
      for (int64_t i = 0; i < granules; ++i) k->fake_forward(f, i, size * p / threads, size * (p + 1) / threads);
    });
  }
}

void fake_backward(const std::string& isa, const Grid& grid, uintptr_t x, int64_t granules, int64_t size, uintptr_t scale,
                   uintptr_t zero, uintptr_t g, uintptr_t of_x, uintptr_t of_scale, uintptr_t of_zero, int threads) {
  if (grid.count != 0) throw std::invalid_argument("levels that are listed are not simulated here");
  const SolveKernels* k = called(isa)->solve;
  nb::gil_scoped_release release;
  const Fake f{grid,    at<float>(x), granules,        size,                at<float>(scale), at<float>(zero),
               nullptr, at<float>(g), at<float>(of_x), at<float>(of_scale), at<float>(of_zero)};
  by_granule(granules, size, threads, [&](int64_t i) { k->fake_backward(f, i); });
}

// lo, hi [granules]: lowest and highest value of each granule of x [granules, size]; size is not 0.
void extremes(const std::string& isa, uintptr_t x, int64_t granules, int64_t size, uintptr_t lo, uintptr_t hi, int threads) {
  const SolveKernels* k = called(isa)->solve;
  nb::gil_scoped_release release;
  by_granule(granules, size, threads, [&](int64_t i) { k->extremes(at<float>(x) + i * size, size, at<float>(lo) + i, at<float>(hi) + i); });
}

// of_x [granules, size]: what the values gain from the gradients of the extremes.
void extremes_backward(const std::string& isa, uintptr_t x, int64_t granules, int64_t size, uintptr_t lo, uintptr_t hi,
                       uintptr_t of_lo, uintptr_t of_hi, uintptr_t of_x, int threads) {
  const SolveKernels* k = called(isa)->solve;
  nb::gil_scoped_release release;
  by_granule(granules, size, threads, [&](int64_t i) {
    k->extremes_backward(at<float>(x) + i * size, size, at<float>(lo)[i], at<float>(hi)[i], at<float>(of_lo)[i],
                         at<float>(of_hi)[i], at<float>(of_x) + i * size);
  });
}

// See Compare; size is not 0.
void compare(const std::string& isa, uintptr_t p, uintptr_t q, int64_t rows, int64_t size, uintptr_t found, uintptr_t same,
             uintptr_t gradient, float reverse, float weight, int threads) {
  const SolveKernels* k = called(isa)->solve;
  nb::gil_scoped_release release;
  const Compare c{at<float>(p), at<float>(q), rows, size, at<double>(found), at<uint8_t>(same), at<float>(gradient), reverse, weight};
  by_granule(rows, size, threads, [&](int64_t i) { k->compare(c, i); });
}

}  // namespace

void bind_solve(nb::module_& m, const Kernels* (*kernels_called)(const std::string&), Loop loop) {
  called = kernels_called;
  run_parallel = loop;
  nb::class_<Grid>(m, "Grid").def("__init__", &make_grid);
  m.def("search", &search);
  m.def("columns", &columns);
  m.def("fake", &fake);
  m.def("fake_backward", &fake_backward);
  m.def("extremes", &extremes);
  m.def("extremes_backward", &extremes_backward);
  m.def("compare", &compare);
}

}  // namespace lowbit
