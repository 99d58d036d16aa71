// AVX2 with the dot products of AVX-VNNI.
#include <immintrin.h>

#include "cache.h"
#include "solve.h"
#include "step.h"
#include "tiles.h"

#define LOWBIT_VNNI
namespace lowbit::avxvnni {
namespace {

#include "avx2.inl"
#include "kernel.inl"
#include "side.inl"
#include "step.inl"
#include "solve.inl"
#include "cache.inl"

}  // namespace
}  // namespace lowbit::avxvnni

namespace lowbit {
const Kernels* avxvnni_kernels() {
  static const Kernels kernels{"avxvnni", avxvnni::prepare, avxvnni::multiply, avxvnni::decode, avxvnni::read,
                               avxvnni::side, avxvnni::side_input, &avxvnni::step_kernels, &avxvnni::solve_kernels, &avxvnni::cache_kernels};
  return &kernels;
}
}  // namespace lowbit
