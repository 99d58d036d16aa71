// Arm with dot products (Armv8.2): sixteen lanes are four registers. Written by the book and not yet run on an Arm machine.
#include <arm_neon.h>

#include "cache.h"
#include "solve.h"
#include "step.h"
#include "tiles.h"

namespace lowbit::neon {
namespace {

struct V {
  struct B { uint8x16_t v[4]; };
  struct I { int32x4_t v[4]; };
  struct F { float32x4_t v[4]; };
  static constexpr bool takes_bytes = false;  // codes are read as signed bytes, see dot()
  static constexpr int products = 12;
  static constexpr bool fuses = true;
  static constexpr bool pairs = false;

  static B load(const void* p) {
    const auto* q = static_cast<const uint8_t*>(p);
    return {{vld1q_u8(q), vld1q_u8(q + 16), vld1q_u8(q + 32), vld1q_u8(q + 48)}};
  }
  static void store_all(uint8_t* p, B b) { for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, b.v[i]); }
  template <int SHIFT, int MASK>
  static B field(B b) {
    for (auto& x : b.v) {
      if constexpr (SHIFT > 0) x = vshrq_n_u8(x, SHIFT);
      if constexpr (SHIFT < 0) x = vshlq_n_u8(x, -SHIFT);
      x = vandq_u8(x, vdupq_n_u8(MASK));
    }
    return b;
  }
  static B either(B a, B b) { for (int i = 0; i < 4; ++i) a.v[i] = vorrq_u8(a.v[i], b.v[i]); return a; }
  // The instruction multiplies signed bytes, which codes below 128 are; those of 8 bits come in two halves.
  template <int BITS>
  static I dot(I acc, B w, const int8_t* x) {
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(quad));
    for (int i = 0; i < 4; ++i) {
      if constexpr (BITS == 8) {
        const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(w.v[i], vdupq_n_u8(15)));
        const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(w.v[i], 4));
        acc.v[i] = vdotq_s32(acc.v[i], low, all);
        acc.v[i] = vaddq_s32(acc.v[i], vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), high, all), 4));
      } else {
        acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), all);
      }
    }
    return acc;
  }
  static I as_int(B b) { I r; for (int i = 0; i < 4; ++i) r.v[i] = vreinterpretq_s32_u8(b.v[i]); return r; }
  template <int J, int BITS>
  static I byte(I a) {
    for (auto& x : a.v) {
      uint32x4_t u = vreinterpretq_u32_s32(x);
      if constexpr (J > 0) u = vshrq_n_u32(u, 8 * J);
      x = vreinterpretq_s32_u32(vandq_u32(u, vdupq_n_u32(0xff)));
    }
    return a;
  }
  static F gather(const float* table, I index) {
    float values[16];
    int32_t at[16];
    for (int i = 0; i < 4; ++i) vst1q_s32(at + 4 * i, index.v[i]);
    for (int i = 0; i < 16; ++i) values[i] = table[at[i]];
    return floats(values);
  }
  static F lookup(F table, I index) {  // a table of 64 bytes; byte b of lane i is byte 4 * index + b
    uint8x16x4_t bytes;
    for (int i = 0; i < 4; ++i) bytes.val[i] = vreinterpretq_u8_f32(table.v[i]);
    F r;
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t first = vshlq_n_u32(vandq_u32(vreinterpretq_u32_s32(index.v[i]), vdupq_n_u32(15)), 2);
      const uint32x4_t at = vaddq_u32(vmulq_n_u32(first, 0x01010101u), vdupq_n_u32(0x03020100u));
      r.v[i] = vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(at)));
    }
    return r;
  }
  static void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

  template <int BY>
  static I right(I a) {
    if constexpr (BY > 0)
      for (auto& x : a.v) x = vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), BY));
    return a;
  }
  template <int BY>
  static I left(I a) { for (auto& x : a.v) x = vshlq_n_s32(x, BY); return a; }
  static I low(I a, int mask) { for (auto& x : a.v) x = vandq_s32(x, vdupq_n_s32(mask)); return a; }
  static I either_int(I a, I b) { for (int i = 0; i < 4; ++i) a.v[i] = vorrq_s32(a.v[i], b.v[i]); return a; }

  static I izero() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static I add(I a, I b) { for (int i = 0; i < 4; ++i) a.v[i] = vaddq_s32(a.v[i], b.v[i]); return a; }
  static I sub(I a, I b) { for (int i = 0; i < 4; ++i) a.v[i] = vsubq_s32(a.v[i], b.v[i]); return a; }
  template <int POWER>
  static I scaled(I a) { for (auto& x : a.v) x = vshlq_s32(x, vdupq_n_s32(POWER)); return a; }
  static I signed_byte(I a) { for (auto& x : a.v) x = vshrq_n_s32(vshlq_n_s32(x, 24), 24); return a; }
  static I next_byte(I a) { for (auto& x : a.v) x = vshrq_n_s32(x, 8); return a; }
  static void store_bytes(int8_t* p, I a) {
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  }

  static F set(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}}; }
  static F floats(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
  static void store(float* p, F f) { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, f.v[i]); }
  static I widened(const uint8_t* p) {
    const uint8x16_t b = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(b)), high = vmovl_u8(vget_high_u8(b));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
  }
  static F bytes(const uint8_t* p) { return to_float(widened(p)); }
  static F to_float(I a) { F f; for (int i = 0; i < 4; ++i) f.v[i] = vcvtq_f32_s32(a.v[i]); return f; }
  static I to_int(F a) { I r; for (int i = 0; i < 4; ++i) r.v[i] = vcvtnq_s32_f32(a.v[i]); return r; }
  static F round(F a) { for (auto& x : a.v) x = vrndnq_f32(x); return a; }
  static F fma(F a, F b, F c) { for (int i = 0; i < 4; ++i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return c; }
  static F mul(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
  static F div(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vdivq_f32(a.v[i], b.v[i]); return a; }
  static F addf(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
  static F subf(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vsubq_f32(a.v[i], b.v[i]); return a; }
  static F min(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vminnmq_f32(a.v[i], b.v[i]); return a; }  // a where b is NaN
  static F max(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vmaxnmq_f32(a.v[i], b.v[i]); return a; }
  static F clamp(F a, float low, float high) {
    for (auto& x : a.v) x = vminnmq_f32(vmaxnmq_f32(x, vdupq_n_f32(low)), vdupq_n_f32(high));
    return a;
  }
  static float total(F a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3])));
  }
  static F halves(const uint16_t* p) {
    F f;
    for (int i = 0; i < 4; ++i) f.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return f;
  }
  static F bfloats(const uint16_t* p) {
    F f;
    for (int i = 0; i < 4; ++i) f.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return f;
  }
  static void store_halves(uint16_t* p, F f) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(f.v[i])));
  }
  static void store_bfloats(uint16_t* p, F f) {  // decoded weights: finite
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t u = vreinterpretq_u32_f32(f.v[i]), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
      vst1_u16(p + 4 * i, vshrn_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16));
    }
  }
};

#include "kernel.inl"
#include "side.inl"
#include "step.inl"
#include "solve.inl"
#include "cache.inl"

}  // namespace
}  // namespace lowbit::neon

namespace lowbit {
const Kernels* neon_kernels() {
  static const Kernels kernels{"neon", neon::prepare, neon::multiply, neon::decode, neon::read,
                               neon::side, neon::side_input, &neon::step_kernels, &neon::solve_kernels, &neon::cache_kernels};
  return &kernels;
}
}  // namespace lowbit
