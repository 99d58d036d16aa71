// Matrix tiles of AMX, for inputs of 16 tokens and more. Fewer, and weights that are not taken here, are AVX-512's.
//
// A tile is 16 rows of 64 bytes. A quad of the packed layout, 16 output rows by 4 columns, is a row of the right factor as
// the tiles want it, so that weights need no transposition: blocks are unpacked to bytes (or to bfloat16, two quads' rows
// for one) in the second-level cache and are multiplied by all tokens from there. Zero points that are whole are taken off
// the codes on the way; what is left of others is a correction at the end.
//
// The input is quantized, or copied, into tiles of 16 tokens once for all blocks. Where scales differ along the columns, a
// product ends at each of their borders and is added up in float32.
//
// Tiles are written in assembly, each with its claim on memory: the intrinsics of g++ 12 make none, and its optimizer drops
// the stores of a configuration that only `ldtilecfg` reads.
#include <immintrin.h>

#include "tiles.h"

namespace lowbit::amx {
namespace {

#include "avx512.inl"
#include "common.inl"

constexpr int64_t TOKENS = 16;               // rows of a tile
constexpr int64_t TILE = 1024;               // bytes of a tile
constexpr int64_t KEPT = 1 << 20;            // bytes of unpacked weights at once: half of the second-level cache
constexpr int64_t MOST_COLUMNS = 1 << 16;    // of one scale: their sum stays below 2**31

// ---- tiles ------------------------------------------------------------------------------------------------------------

struct alignas(64) Config {
  uint8_t palette, start;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
const Config WHOLE{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Tiles 0 to 3 are sums, 4 and 5 of tokens, 6 and 7 of weights.
#define LOWBIT_LOAD(N, P) asm volatile("tileloadd (%0,%1,1), %%tmm" #N : : "r"(P), "r"(64L) : "memory")
#define LOWBIT_STORE(N, P, BYTES) asm volatile("tilestored %%tmm" #N ", (%0,%1,1)" : : "r"(P), "r"(BYTES) : "memory")
#define LOWBIT_ZERO(N) asm volatile("tilezero %%tmm" #N : :)
#define LOWBIT_DOT(SUM, A, B)                                                                   \
  do {                                                                                          \
    if constexpr (HALF) asm volatile("tdpbf16ps %%tmm" #B ", %%tmm" #A ", %%tmm" #SUM : :);     \
    else asm volatile("tdpbssd %%tmm" #B ", %%tmm" #A ", %%tmm" #SUM : :);                      \
  } while (false)

struct Tiled {
  Tiled() { asm volatile("ldtilecfg %0" : : "m"(WHOLE) : "memory"); }
  ~Tiled() { asm volatile("tilerelease" : : : "memory"); }
};

// out [M * 16, N * 16] = k tiles of tokens times k tiles of weights; rows of tiles are `a_step` and `b_step` bytes apart.
template <bool HALF, int M, int N>
static inline void product(const int8_t* a, int64_t a_step, const int8_t* b, int64_t b_step, int64_t k, void* out) {
  LOWBIT_ZERO(0);
  if constexpr (N > 1) LOWBIT_ZERO(1);
  if constexpr (M > 1) LOWBIT_ZERO(2);
  if constexpr (M > 1 && N > 1) LOWBIT_ZERO(3);
  for (int64_t i = 0; i < k; ++i, a += TILE, b += TILE) {
    LOWBIT_LOAD(6, b);
    LOWBIT_LOAD(4, a);
    LOWBIT_DOT(0, 4, 6);
    if constexpr (N > 1) {
      LOWBIT_LOAD(7, b + b_step);
      LOWBIT_DOT(1, 4, 7);
    }
    if constexpr (M > 1) {
      LOWBIT_LOAD(5, a + a_step);
      LOWBIT_DOT(2, 5, 6);
    }
    if constexpr (M > 1 && N > 1) LOWBIT_DOT(3, 5, 7);
  }
  char* c = static_cast<char*>(out);
  constexpr int64_t line = 64 * N;
  LOWBIT_STORE(0, c, line);
  if constexpr (N > 1) LOWBIT_STORE(1, c + 64, line);
  if constexpr (M > 1) LOWBIT_STORE(2, c + 16 * line, line);
  if constexpr (M > 1 && N > 1) LOWBIT_STORE(3, c + 16 * line + 64, line);
}

// Memory that a thread keeps for its next call.
struct Scratch {
  char* memory = nullptr;
  int64_t bytes = 0;
  ~Scratch() { _mm_free(memory); }
  char* take(int64_t n) {
    if (n > bytes) {
      _mm_free(memory);
      memory = static_cast<char*>(_mm_malloc(n, 4096));
      bytes = memory == nullptr ? 0 : n;
      if (memory == nullptr) __builtin_trap();
    }
    return memory;
  }
};
thread_local Scratch scratch;

// ---- where things lie -------------------------------------------------------------------------------------------------

// Integers: a group fills whole tiles of 64 columns. Halves: a tile is a chunk, whatever groups it belongs to.
static inline int64_t group_tiles(const Tiles& t) { return (t.padded + 63) / 64; }
static inline int64_t row_tiles(const Tiles& t, int32_t input) {
  return input == HALVES ? (t.padded_cols() + CHUNK - 1) / CHUNK : t.groups * group_tiles(t);
}
static inline int64_t planes(int32_t input) { return input == FIXED ? 3 : 1; }

static bool takes(const Tiles& t, int32_t input, int64_t m) {
  if (input == HALVES) return t.kind != CODEBOOK;
  return m >= TOKENS && t.kind == UNIFORM && t.padded <= MOST_COLUMNS && (input == INT8 || input == FIXED);
}

static int64_t input_bytes(const Tiles& t, int32_t input, int64_t m) {
  return (m + TOKENS - 1) / TOKENS * planes(input) * row_tiles(t, input) * TILE;
}

// ---- the input --------------------------------------------------------------------------------------------------------

// Tiles [m / 16, planes, row tiles] of 16 tokens.
static void prepare(const Job& job, int64_t first, int64_t last) {
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols(), tiles = row_tiles(t, job.input), in_group = group_tiles(t);
  char* memory = scratch.take(plane * (4 + 3) + 2 * CHUNK);
  float* x = reinterpret_cast<float*>(memory);
  int8_t* q = reinterpret_cast<int8_t*>(x + plane);
  for (int64_t token = first; token < last; ++token) {
    int8_t* to = job.xq + token / TOKENS * planes(job.input) * tiles * TILE + token % TOKENS * 64;
    if (job.input == HALVES) {
      const auto* from = static_cast<const char*>(job.x) + token * t.cols * 2;
      char* line = memory;
      if (t.padded == t.group) {
        __builtin_memcpy(line, from, t.cols * 2);
        __builtin_memset(line + t.cols * 2, 0, tiles * 64 - t.cols * 2);
      } else {
        __builtin_memset(line, 0, tiles * 64);
        for (int64_t g = 0; g < t.groups; ++g)
          __builtin_memcpy(line + g * t.padded * 2, from + g * t.group * 2, least(t.group, t.cols - g * t.group) * 2);
      }
      for (int64_t k = 0; k < tiles; ++k) _mm512_storeu_si512(to + k * TILE, _mm512_loadu_si512(line + 64 * k));
      continue;
    }
    prepare_token(job, token, x, q);
    for (int64_t d = 0; d < planes(job.input); ++d)
      for (int64_t g = 0; g < t.groups; ++g)
        for (int64_t k = 0; k < in_group; ++k, to += TILE) {
          const int64_t n = least(64, t.padded - 64 * k);
          const __mmask64 some = n == 64 ? ~0ull : (1ull << n) - 1;
          _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(some, q + d * plane + g * t.padded + 64 * k));
        }
  }
}

// ---- the weight -------------------------------------------------------------------------------------------------------

// Unpacked blocks. Integers: tiles of codes less whole zeros, and by group and row the scale and what the zero's rest takes
// off for each unit of the input's sum. Halves: tiles of weights.
struct Unpacked {
  int8_t* tiles;   // [blocks, row tiles, 16 quads, 16 rows, 4], halves [blocks, chunks, 16 pairs, 16 rows, 2]
  float* scale;    // [blocks, groups, 16]
  float* rest;     // [blocks, groups, 16]
  bool rests;      // whether any is not zero
};

template <int BITS>
static void unpack_integers(const Tiles& t, const uint8_t* block, int8_t* out, float* scale, float* rest, bool* rests) {
  constexpr int64_t chunk_bytes = 64 * BITS;
  constexpr float least_whole = BITS == 8 ? 128.0f : 0.0f;  // a code less this, up to 128, is a signed byte
  const uint8_t* params = block + t.codes_bytes;
  const int zero_at = LANES * number_bytes(t.scale);
  __mmask16 any = 0;
  for (int64_t g = 0; g < t.groups; ++g, params += t.group_bytes) {
    const auto factor = numbers(params, t.scale);
    const auto zero = t.zero == NONE ? V::set(t.zero_constant) : numbers(params + zero_at, t.zero);
    const auto whole = V::clamp(V::round(zero), least_whole, 128.0f);
    const auto left = V::mul(factor, V::subf(zero, whole));
    any |= _mm512_cmp_ps_mask(left, V::set(0.0f), _CMP_NEQ_UQ);
    V::store(scale + LANES * g, factor);
    V::store(rest + LANES * g, left);
    const auto off = _mm512_mullo_epi32(V::to_int(whole), _mm512_set1_epi32(0x01010101));
    for (int64_t k = 0; k < 2 * group_tiles(t); ++k, out += TILE / 2) {
      const int64_t column = g * t.padded + CHUNK * k;
      if (CHUNK * k >= t.padded) {
        for (int i = 0; i < 8; ++i) _mm512_storeu_si512(out + 64 * i, _mm512_setzero_si512());
        continue;
      }
      const uint8_t* chunk = block + column / CHUNK * chunk_bytes;
      auto quad = [&]<int Q>() { _mm512_storeu_si512(out + 64 * Q, _mm512_sub_epi8(codes<BITS, Q>(chunk), off)); };
      if (t.half()) {  // the half of a chunk, whose other quads meet nothing
        auto moved = [&]<int Q>() {
          const auto w = column % CHUNK ? codes<BITS, Q + 4>(chunk) : codes<BITS, Q>(chunk);
          _mm512_storeu_si512(out + 64 * Q, _mm512_sub_epi8(w, off));
        };
        unroll<0, 4>(moved);
        for (int i = 4; i < 8; ++i) _mm512_storeu_si512(out + 64 * i, _mm512_setzero_si512());
      } else {
        unroll<0, 8>(quad);
      }
    }
  }
  *rests |= any != 0;
}

// Two columns of 16 rows as one row of a tile: pairs, rounded to nearest as the reference rounds a decoded weight.
static inline void store_pairs(int8_t* out, typename V::F even, typename V::F odd) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
}

template <int BITS>
static void unpack_halves(const Tiles& t, const uint8_t* block, const float* table, int8_t* out) {
  constexpr int64_t chunk_bytes = 64 * BITS;
  const uint8_t* params = block + t.codes_bytes;
  const int number_size = LANES * number_bytes(t.scale);
  float start[LANES];
  for (int i = 0; i < LANES; ++i) start[i] = t.kind == TABLE && i < (1 << BITS) ? table[i] : 0.0f;
  const auto low = V::floats(start);
  int64_t column = 0;
  for (int64_t g = 0; g < t.groups; ++g, params += t.group_bytes) {
    const auto scale = numbers(params, t.scale);
    auto zero = V::set(t.zero_constant);
    if (t.zero != NONE) zero = numbers(params + (t.kind == BINARY ? BITS : 1) * number_size, t.zero);
    else if (t.kind == BINARY) zero = V::set(0.0f);
    for (const int64_t stop = column + t.padded; column < stop;) {
      const uint8_t* chunk = block + column / CHUNK * chunk_bytes;
      int8_t* to = out + column / CHUNK * TILE;
      auto quads = [&](auto value) {
        auto quad = [&]<int Q>() {
          store_pairs(to + 128 * Q, value.template operator()<Q, 0>(), value.template operator()<Q, 1>());
          store_pairs(to + 128 * Q + 64, value.template operator()<Q, 2>(), value.template operator()<Q, 3>());
        };
        if (column % CHUNK == 0) unroll<0, 4>(quad);
        if (column % CHUNK != 0 || stop - column > CHUNK / 2) unroll<4, 8>(quad);
      };
      if (t.kind == UNIFORM) {
        quads([&]<int Q, int J>() {
          const auto code = V::to_float(V::template byte<J, 8>(V::as_int(codes<BITS, Q>(chunk))));
          return V::mul(V::subf(code, zero), scale);
        });
      } else if (t.kind == TABLE) {
        quads([&]<int Q, int J>() {
          return V::mul(looked_up<BITS>(low, table, V::template byte<J, BITS>(V::as_int(codes<BITS, Q>(chunk)))), scale);
        });
      } else {
        quads([&]<int Q, int J>() {
          auto sum = V::set(0.0f);
          for (int b = 0; b < BITS; ++b) {
            const auto bit = V::to_float(V::template byte<J, 8>(V::as_int(sign_bits<Q>(chunk + 64 * b))));
            sum = V::fma(V::fma(V::set(2.0f), bit, V::set(-1.0f)), numbers(params + b * number_size, t.scale), sum);
          }
          return V::addf(sum, zero);
        });
      }
      column += least(CHUNK - column % CHUNK, stop - column);
    }
  }
  if (column % CHUNK != 0) __builtin_memset(out + column / CHUNK * TILE + TILE / 2, 0, TILE / 2);
}

template <int BITS>
static void unpack_block(const Job& job, int64_t b, const Unpacked& to, int64_t i, bool* rests) {
  const Tiles& t = *job.tiles;
  const uint8_t* block = job.data + HEADER + b * t.block_bytes;
  int8_t* out = to.tiles + i * row_tiles(t, job.input) * TILE;
  if (job.input == HALVES) return unpack_halves<BITS>(t, block, job.table, out);
  unpack_integers<BITS>(t, block, out, to.scale + i * t.groups * LANES, to.rest + i * t.groups * LANES, rests);
}

static void unpack(const Job& job, int64_t first, int64_t n, Unpacked* to) {
  to->rests = false;
  for (int64_t i = 0; i < n; ++i) {
    switch (job.tiles->bits) {
      case 1: unpack_block<1>(job, first + i, *to, i, &to->rests); break;
      case 2: unpack_block<2>(job, first + i, *to, i, &to->rests); break;
      case 3: unpack_block<3>(job, first + i, *to, i, &to->rests); break;
      case 4: unpack_block<4>(job, first + i, *to, i, &to->rests); break;
      case 5: unpack_block<5>(job, first + i, *to, i, &to->rests); break;
      case 6: unpack_block<6>(job, first + i, *to, i, &to->rests); break;
      case 7: unpack_block<7>(job, first + i, *to, i, &to->rests); break;
      default: unpack_block<8>(job, first + i, *to, i, &to->rests);
    }
  }
}

// ---- products ---------------------------------------------------------------------------------------------------------

static inline void write_row(const Job& job, int64_t token, int64_t row, int64_t n, const typename V::F* y, int blocks) {
  const int64_t at = token * job.tiles->rows + row;
  if (n == LANES * blocks) {
    for (int b = 0; b < blocks; ++b) {
      if (job.y_type == F32) V::store(static_cast<float*>(job.y) + at + LANES * b, y[b]);
      else if (job.y_type == F16) V::store_halves(static_cast<uint16_t*>(job.y) + at + LANES * b, y[b]);
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(job.y) + at + LANES * b),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y[b])));
    }
    return;
  }
  float line[2 * LANES];
  for (int b = 0; b < blocks; ++b) V::store(line + LANES * b, y[b]);
  write_floats(line, n, job.y, job.y_type, at);
}

// M tiles of tokens with N blocks, all their columns.
template <int M, int N>
static void multiply_halves(const Job& job, int64_t token, int64_t row, const Unpacked& w, int64_t i) {
  const int64_t step = row_tiles(*job.tiles, HALVES) * TILE;
  alignas(64) float sum[M * TOKENS * N * LANES];
  product<true, M, N>(job.xq + token / TOKENS * step, step, w.tiles + i * step, step, step / TILE, sum);
  const int64_t rows = least(N * LANES, job.tiles->rows - row);
  for (int64_t m = 0; m < M * TOKENS && token + m < job.m; ++m) {
    typename V::F y[N];
    for (int n = 0; n < N; ++n) y[n] = V::floats(sum + (m * N + n) * LANES);
    write_row(job, token + m, row, rows, y, N);
  }
}

template <int M, int N>
static void multiply_integers(const Job& job, int64_t token, int64_t row, const Unpacked& w, int64_t i) {
  const Tiles& t = *job.tiles;
  const int64_t step = row_tiles(t, job.input) * TILE, in_group = group_tiles(t), segments = t.segments();
  const bool by_token = job.act_bits != 0;  // one scale for all of a token: it comes last
  const int64_t at_once = by_token ? in_group : SEGMENT / 64, digits = planes(job.input);
  const float* scales = w.scale + i * t.groups * LANES;
  const int8_t *a = job.xq + token / TOKENS * digits * step, *b = w.tiles + i * step;
  alignas(64) int32_t found[M * TOKENS * N * LANES];
  alignas(64) float sum[M * TOKENS * N * LANES] = {};
  const int64_t tokens = least(M * TOKENS, job.m - token);
  for (int64_t g = 0; g < t.groups; ++g) {
    typename V::F scale[N];
    for (int n = 0; n < N; ++n) scale[n] = V::floats(scales + (n * t.groups + g) * LANES);
    for (int64_t k = 0; k < in_group; k += at_once) {
      const int64_t tile = (g * in_group + k) * TILE;
      float power = 1.0f;
      for (int64_t d = 0; d < digits; ++d, power *= 256.0f) {
        product<false, M, N>(a + d * step + tile, digits * step, b + tile, step, least(at_once, in_group - k), found);
        const float* own = job.xs + token * segments + g * t.group_segments() + k / at_once;
        for (int64_t m = 0; m < tokens; ++m)
          for (int n = 0; n < N; ++n) {
            const auto by = by_token ? scale[n] : V::mul(scale[n], V::set(own[m * segments] * power));
            float* to = sum + (m * N + n) * LANES;
            V::store(to, V::fma(V::to_float(V::load(found + (m * N + n) * LANES)), by, V::floats(to)));
          }
      }
    }
  }
  const float* sums = reinterpret_cast<const float*>(job.data + t.sums_offset);
  const int64_t rows = least(N * LANES, t.rows - row);
  for (int64_t m = 0; m < tokens; ++m) {
    typename V::F y[N];
    for (int n = 0; n < N; ++n) {
      y[n] = V::floats(sum + (m * N + n) * LANES);
      if (by_token) y[n] = V::mul(y[n], V::set(job.xs[(token + m) * segments]));
      if (w.rests)
        for (int64_t g = 0; g < t.groups; ++g)
          y[n] = V::fma(V::floats(w.rest + ((i + n) * t.groups + g) * LANES), V::set(-job.xsum[(token + m) * t.groups + g]), y[n]);
      if (by_token && job.xzero[token + m] != 0.0f) {
        const auto some = static_cast<__mmask16>((1u << least(LANES, rows - n * LANES)) - 1);
        y[n] = V::fma(_mm512_maskz_loadu_ps(some, sums + row + n * LANES), V::set(-job.xzero[token + m]), y[n]);
      }
    }
    write_row(job, token + m, row, rows, y, N);
  }
}

template <int M>
static void multiply_blocks(const Job& job, int64_t token, int64_t first, int64_t n, const Unpacked& w) {
  int64_t i = 0;
  for (; i + 2 <= n; i += 2)
    (job.input == HALVES ? multiply_halves<M, 2> : multiply_integers<M, 2>)(job, token, (first + i) * LANES, w, i);
  if (i < n) (job.input == HALVES ? multiply_halves<M, 1> : multiply_integers<M, 1>)(job, token, (first + i) * LANES, w, i);
}

static void multiply(const Job& job, int64_t first, int64_t last) {
  const Tiles& t = *job.tiles;
  const Tiled tiled;
  const int64_t bytes = row_tiles(t, job.input) * TILE, params = t.groups * LANES;
  int64_t most = KEPT / bytes / 2 * 2;
  if (most < 2) most = 2;
  if (most > last - first) most = last - first;
  char* memory = scratch.take(most * (bytes + 2 * params * 4));
  Unpacked w{reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(memory + most * bytes), nullptr, false};
  w.rest = w.scale + most * params;
  for (int64_t b = first; b < last; b += most) {
    const int64_t n = least(most, last - b);
    unpack(job, b, n, &w);
    int64_t token = 0;
    for (; token + TOKENS < job.m; token += 2 * TOKENS) multiply_blocks<2>(job, token, b, n, w);
    if (token < job.m) multiply_blocks<1>(job, token, b, n, w);
  }
}

}  // namespace
}  // namespace lowbit::amx

namespace lowbit {
const Kernels* amx_kernels() {
  static const Kernels* lanes = avx512_kernels();
  static const Kernels kernels{"amx",       amx::prepare, amx::multiply, lanes->decode,
                               lanes->read, amx::takes,   lanes,         amx::input_bytes};
  return &kernels;
}
}  // namespace lowbit
