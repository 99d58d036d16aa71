// AVX-512 with VNNI.
#include <immintrin.h>

#include "cache.h"
#include "solve.h"
#include "step.h"
#include "tiles.h"

namespace lowbit::avx512 {
namespace {

#include "avx512.inl"
#include "kernel.inl"
#include "side.inl"
#include "step.inl"
#include "solve.inl"
#include "cache.inl"

}  // namespace
}  // namespace lowbit::avx512

namespace lowbit {
const Kernels* avx512_kernels() {
  static const Kernels kernels{"avx512", avx512::prepare, avx512::multiply, avx512::decode, avx512::read,
                               avx512::side, avx512::side_input, &avx512::step_kernels, &avx512::solve_kernels, &avx512::cache_kernels};
  return &kernels;
}
}  // namespace lowbit
