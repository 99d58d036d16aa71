// AVX2 with the dot products of AVX-VNNI.
#include <immintrin.h>

#include "tiles.h"

#define LOWBIT_VNNI
namespace lowbit::avxvnni {
namespace {

#include "avx2.inl"
#include "kernel.inl"

}  // namespace
}  // namespace lowbit::avxvnni

namespace lowbit {
const Kernels* avxvnni_kernels() {
  static const Kernels kernels{"avxvnni", avxvnni::prepare, avxvnni::multiply, avxvnni::decode, avxvnni::read};
  return &kernels;
}
}  // namespace lowbit
