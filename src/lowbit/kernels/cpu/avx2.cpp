// AVX2, FMA and F16C.
#include <immintrin.h>

#include "cache.h"
#include "solve.h"
#include "step.h"
#include "tiles.h"

namespace lowbit::avx2 {
namespace {

#include "avx2.inl"
#include "kernel.inl"
#include "side.inl"
#include "step.inl"
#include "solve.inl"
#include "cache.inl"

}  // namespace
}  // namespace lowbit::avx2

namespace lowbit {
const Kernels* avx2_kernels() {
  static const Kernels kernels{"avx2", avx2::prepare, avx2::multiply, avx2::decode, avx2::read,
                               avx2::side, avx2::side_input, &avx2::step_kernels, &avx2::solve_kernels, &avx2::cache_kernels};
  return &kernels;
}
}  // namespace lowbit
