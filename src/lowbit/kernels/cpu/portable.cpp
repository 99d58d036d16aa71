// Plain C++: what V has to provide, said in loops. Runs everywhere, and is what the others are checked against.
#include "cache.h"
#include "solve.h"
#include "step.h"
#include "tiles.h"

namespace lowbit::portable {
namespace {

struct V {
  struct B { uint8_t v[64]; };   // 16 rows by 4 columns of codes
  struct I { int32_t v[16]; };
  struct F { float v[16]; };
  static constexpr bool takes_bytes = false;  // whether dot() is as quick for codes of 8 bits as for shorter ones
  static constexpr int products = 1;  // sums, of several tokens at once, that registers hold; here it is short compiling
  static constexpr bool fuses = false;  // whether fma() rounds once
  static constexpr bool pairs = false;  // whether registers hold the sums of two blocks: V has quad() and dot_quad()

  static B load(const void* p) { B b; __builtin_memcpy(b.v, p, 64); return b; }
  static void store_all(uint8_t* p, B b) { __builtin_memcpy(p, b.v, 64); }
  // Bits at SHIFT (to the left where it is negative), masked.
  template <int SHIFT, int MASK>
  static B field(B b) {
    for (auto& x : b.v) x = static_cast<uint8_t>((SHIFT >= 0 ? x >> (SHIFT >= 0 ? SHIFT : 0) : x << (SHIFT < 0 ? -SHIFT : 0)) & MASK);
    return b;
  }
  static B either(B a, B b) { for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i]; return a; }
  // acc[row] += sum of 4 columns; codes are below 2**BITS, x is signed.
  template <int BITS>
  static I dot(I acc, B w, const int8_t* x) {
    for (int r = 0; r < 16; ++r)
      for (int j = 0; j < 4; ++j) acc.v[r] += w.v[4 * r + j] * x[j];
    return acc;
  }
  static I as_int(B b) { I i; __builtin_memcpy(i.v, b.v, 64); return i; }
  // Byte J of each lane; above the BITS of a code there is nothing to be masked but other bytes.
  template <int J, int BITS>
  static I byte(I a) { for (auto& x : a.v) x = static_cast<int32_t>((static_cast<uint32_t>(x) >> (8 * J)) & 0xff); return a; }
  static F lookup(F table, I index) { F f; for (int i = 0; i < 16; ++i) f.v[i] = table.v[index.v[i] & 15]; return f; }
  static F gather(const float* table, I index) { F f; for (int i = 0; i < 16; ++i) f.v[i] = table[index.v[i]]; return f; }
  static void prefetch(const void*) {}

  // Bits of each lane, moved as those of an unsigned number; those of `mask`; those of either.
  template <int BY>
  static I right(I a) { for (auto& x : a.v) x = static_cast<int32_t>(static_cast<uint32_t>(x) >> BY); return a; }
  template <int BY>
  static I left(I a) { for (auto& x : a.v) x = static_cast<int32_t>(static_cast<uint32_t>(x) << BY); return a; }
  static I low(I a, int mask) { for (auto& x : a.v) x &= mask; return a; }
  static I either_int(I a, I b) { for (int i = 0; i < 16; ++i) a.v[i] |= b.v[i]; return a; }

  static I izero() { return I{}; }
  static I add(I a, I b) { for (int i = 0; i < 16; ++i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); return a; }
  template <int POWER>  // a times 2**POWER, which is whole
  static I scaled(I a) { for (auto& x : a.v) x = POWER >= 0 ? x * (1 << (POWER > 0 ? POWER : 0)) : x / (1 << (POWER < 0 ? -POWER : 0)); return a; }
  static I sub(I a, I b) { for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i]; return a; }
  static I signed_byte(I a) { for (auto& x : a.v) x = static_cast<int8_t>(x & 0xff); return a; }
  static I next_byte(I a) { for (auto& x : a.v) x >>= 8; return a; }
  static void store_bytes(int8_t* p, I a) { for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]); }

  static F set(float x) { F f; for (auto& y : f.v) y = x; return f; }
  static F floats(const float* p) { F f; __builtin_memcpy(f.v, p, 64); return f; }
  static void store(float* p, F f) { __builtin_memcpy(p, f.v, 64); }
  static F bytes(const uint8_t* p) { F f; for (int i = 0; i < 16; ++i) f.v[i] = p[i]; return f; }
  static I widened(const uint8_t* p) { I r; for (int i = 0; i < 16; ++i) r.v[i] = p[i]; return r; }
  static F to_float(I a) { F f; for (int i = 0; i < 16; ++i) f.v[i] = static_cast<float>(a.v[i]); return f; }
  static I to_int(F a) { I r; for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] == a.v[i] ? static_cast<int32_t>(__builtin_rintf(a.v[i])) : 0; return r; }
  static F round(F a) { for (auto& x : a.v) x = __builtin_rintf(x); return a; }
  static F fma(F a, F b, F c) { for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i]; return c; }
  static F mul(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i]; return a; }
  static F div(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i]; return a; }
  static F addf(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] += b.v[i]; return a; }
  static F subf(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i]; return a; }
  static F min(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] = b.v[i] < a.v[i] ? b.v[i] : a.v[i]; return a; }
  static F max(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] = b.v[i] > a.v[i] ? b.v[i] : a.v[i]; return a; }
  static F clamp(F a, float low, float high) { for (auto& x : a.v) x = x < low ? low : x > high ? high : x; return a; }
  static float total(F a) { float s = 0; for (float x : a.v) s += x; return s; }

  static float half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t u;
    if (rest >= 0x7c00) u = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x400) u = sign | ((rest << 13) + (112u << 23));
    else {
      const float tiny = static_cast<float>(rest) * 5.9604644775390625e-08f;  // 2**-24
      __builtin_memcpy(&u, &tiny, 4);
      u |= sign;
    }
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
  static uint16_t to_half(float f) {
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x47800000) return sign | 0x7c00;
    if (u < 0x38800000) {  // below the normal numbers: count in units of 2**-24
      float x;
      __builtin_memcpy(&x, &u, 4);
      return sign | static_cast<uint16_t>(__builtin_rintf(x * 16777216.0f));
    }
    u += 0xfff + (u >> 13 & 1);
    return sign | static_cast<uint16_t>((u - (112u << 23)) >> 13);
  }
  static F halves(const uint16_t* p) { F f; for (int i = 0; i < 16; ++i) f.v[i] = half(p[i]); return f; }
  static F bfloats(const uint16_t* p) {
    F f;
    for (int i = 0; i < 16; ++i) {
      const uint32_t u = static_cast<uint32_t>(p[i]) << 16;
      __builtin_memcpy(f.v + i, &u, 4);
    }
    return f;
  }
  static void store_bfloats(uint16_t* p, F f) {  // decoded weights: finite
    uint32_t u[16];
    __builtin_memcpy(u, f.v, 64);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>((u[i] + 0x7fff + (u[i] >> 16 & 1)) >> 16);
  }
  static void store_halves(uint16_t* p, F f) { for (int i = 0; i < 16; ++i) p[i] = to_half(f.v[i]); }
};

#include "kernel.inl"
#include "side.inl"
#include "step.inl"
#include "solve.inl"
#include "cache.inl"

}  // namespace
}  // namespace lowbit::portable

namespace lowbit {
const Kernels* portable_kernels() {
  static const Kernels kernels{"portable", portable::prepare, portable::multiply, portable::decode, portable::read,
                               portable::side, portable::side_input, &portable::step_kernels, &portable::solve_kernels, &portable::cache_kernels};
  return &kernels;
}
}  // namespace lowbit
