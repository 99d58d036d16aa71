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
#include <sys/mman.h>

#include "tiles.h"

namespace lowbit::amx {
namespace {

#include "avx512.inl"
#include "common.inl"

constexpr int64_t TOKENS = 16;               // rows of a tile
constexpr int64_t TILE = 1024;               // bytes of a tile
constexpr int64_t KEPT = 1 << 20;            // bytes of unpacked weights at once: half of the second-level cache
constexpr int64_t PART = 64;                 // tiles of a row at once, at most
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
#define LOWBIT_LOAD(N, P, BYTES) asm volatile("tileloadd (%0,%1,1), %%tmm" #N : : "r"(P), "r"(BYTES) : "memory")
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

// out [M * 16, N * 16] = k pairs of tiles of tokens, each D pairs after the last, times k pairs of tiles of weights; or ADD:
// out += that. Meanwhile `lines` cache lines a pair are asked for, from `ahead` on.
template <bool HALF, int D, int M, int N, bool ADD>
static inline void product(const int8_t* a, const int8_t* b, int64_t k, void* out, const int8_t* ahead, int64_t lines) {
  char* c = static_cast<char*>(out);
  constexpr int64_t line = 64 * N;
  if constexpr (ADD) {
    LOWBIT_LOAD(0, c, line);
    if constexpr (N > 1) LOWBIT_LOAD(1, c + 64, line);
    if constexpr (M > 1) LOWBIT_LOAD(2, c + 16 * line, line);
    if constexpr (M > 1 && N > 1) LOWBIT_LOAD(3, c + 16 * line + 64, line);
  } else {
    LOWBIT_ZERO(0);
    if constexpr (N > 1) LOWBIT_ZERO(1);
    if constexpr (M > 1) LOWBIT_ZERO(2);
    if constexpr (M > 1 && N > 1) LOWBIT_ZERO(3);
  }
  for (int64_t i = 0; i < k; ++i, a += D * 2 * TILE, b += 2 * TILE) {
    for (int64_t l = 0; l < lines; ++l, ahead += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    LOWBIT_LOAD(6, b, 64L);
    LOWBIT_LOAD(4, a, 64L);
    LOWBIT_DOT(0, 4, 6);
    if constexpr (N > 1) {
      LOWBIT_LOAD(7, b + TILE, 64L);
      LOWBIT_DOT(1, 4, 7);
    }
    if constexpr (M > 1) {
      LOWBIT_LOAD(5, a + TILE, 64L);
      LOWBIT_DOT(2, 5, 6);
    }
    if constexpr (M > 1 && N > 1) LOWBIT_DOT(3, 5, 7);
  }
  LOWBIT_STORE(0, c, line);
  if constexpr (N > 1) LOWBIT_STORE(1, c + 64, line);
  if constexpr (M > 1) LOWBIT_STORE(2, c + 16 * line, line);
  if constexpr (M > 1 && N > 1) LOWBIT_STORE(3, c + 16 * line + 64, line);
}

// Memory that a thread keeps for its next call, in large pages where the system gives them.
struct Scratch {
  char* memory = nullptr;
  int64_t bytes = 0;
  ~Scratch() { _mm_free(memory); }
  char* take(int64_t n) {
    if (n > bytes) {
      _mm_free(memory);
      constexpr int64_t page = 1 << 21;
      bytes = (n + page - 1) / page * page;
      memory = static_cast<char*>(_mm_malloc(bytes, page));
      if (memory == nullptr) __builtin_trap();
      madvise(memory, bytes, MADV_HUGEPAGE);
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
  return (m + 2 * TOKENS - 1) / (2 * TOKENS) * 2 * planes(input) * row_tiles(t, input) * TILE;
}

// ---- the input --------------------------------------------------------------------------------------------------------

// Tiles of 16 tokens [m / 32, row tiles, planes, 2].
static void prepare(const Job& job, int64_t first, int64_t last) {
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols(), tiles = row_tiles(t, job.input), in_group = group_tiles(t);
  char* memory = scratch.take(plane * (4 + 3) + 2 * CHUNK);
  float* x = reinterpret_cast<float*>(memory);
  int8_t* q = reinterpret_cast<int8_t*>(x + plane);
  for (int64_t token = first; token < last; ++token) {
    const int64_t pair = token / (2 * TOKENS), digits = planes(job.input), step = digits * 2 * TILE;
    int8_t* to = job.xq + pair * tiles * step + token / TOKENS % 2 * TILE + token % TOKENS * 64;
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
      for (int64_t k = 0; k < tiles; ++k) _mm512_storeu_si512(to + k * step, _mm512_loadu_si512(line + 64 * k));
      continue;
    }
    prepare_token(job, token, x, q);
    for (int64_t g = 0; g < t.groups; ++g)
      for (int64_t k = 0; k < in_group; ++k, to += step) {
        const int64_t n = least(64, t.padded - 64 * k);
        const __mmask64 some = n == 64 ? ~0ull : (1ull << n) - 1;
        for (int64_t d = 0; d < digits; ++d)
          _mm512_storeu_si512(to + d * 2 * TILE, _mm512_maskz_loadu_epi8(some, q + d * plane + g * t.padded + 64 * k));
      }
  }
}

// ---- the weight -------------------------------------------------------------------------------------------------------

// The tiles first..last of the rows of some blocks, unpacked, in the order in which they are read: by pairs of blocks, tiles,
// blocks of the pair. A tile is 16 quads of codes less whole zeros [16 rows, 4], or 16 pairs of bfloat16 [16 rows, 2].
struct Unpacked {
  int8_t* tiles;
  int64_t first, last;
  float* scale;    // [blocks, groups, 16], of integers
  float* rest;     // [blocks, groups, 16]: what the rest of a zero takes off for each unit of the input's sum
  bool rests;      // whether any is not zero

  int8_t* at(int64_t block, int64_t tile) const {
    return tiles + ((block / 2 * (last - first) + tile - first) * 2 + block % 2) * TILE;
  }
};

template <int BITS>
static void unpack_integers(const Tiles& t, const uint8_t* block, Unpacked* to, int64_t i) {
  constexpr int64_t chunk_bytes = 64 * BITS;
  constexpr float least_whole = BITS == 8 ? 128.0f : 0.0f;  // a code less this, up to 128, is a signed byte
  const int64_t in_group = group_tiles(t), zero_at = LANES * number_bytes(t.scale);
  auto off = V::izero();
  for (int64_t k = to->first; k < to->last; ++k) {
    const int64_t g = k / in_group, begin = k % in_group * 64;
    if (k == to->first || begin == 0) {
      const uint8_t* params = block + t.codes_bytes + g * t.group_bytes;
      const auto scale = numbers(params, t.scale);
      const auto zero = t.zero == NONE ? V::set(t.zero_constant) : numbers(params + zero_at, t.zero);
      const auto whole = V::clamp(V::round(zero), least_whole, 128.0f);
      const auto rest = V::mul(scale, V::subf(zero, whole));
      V::store(to->scale + (i * t.groups + g) * LANES, scale);
      V::store(to->rest + (i * t.groups + g) * LANES, rest);
      to->rests |= _mm512_cmp_ps_mask(rest, V::set(0.0f), _CMP_NEQ_UQ) != 0;
      off = _mm512_mullo_epi32(V::to_int(whole), _mm512_set1_epi32(0x01010101));
    }
    for (int64_t half = 0; half < 2; ++half) {
      int8_t* out = to->at(i, k) + half * (TILE / 2);
      const int64_t column = g * t.padded + begin + half * CHUNK;
      if (begin + half * CHUNK >= t.padded) {
        __builtin_memset(out, 0, TILE / 2);
        continue;
      }
      const uint8_t* chunk = block + column / CHUNK * chunk_bytes;
      for (int line = 0; line < BITS; ++line) V::prefetch(chunk + AHEAD + 64 * line);
      if (t.half()) {  // a half of a chunk, whose other quads are another group's
        unroll<0, 4>([&]<int Q>() {
          const auto w = column % CHUNK ? codes<BITS, Q + 4>(chunk) : codes<BITS, Q>(chunk);
          _mm512_storeu_si512(out + 64 * Q, _mm512_sub_epi8(w, off));
        });
        __builtin_memset(out + TILE / 4, 0, TILE / 4);
      } else {
        unroll<0, 8>([&]<int Q>() { _mm512_storeu_si512(out + 64 * Q, _mm512_sub_epi8(codes<BITS, Q>(chunk), off)); });
      }
    }
  }
}

// Two columns of 16 rows as one row of a tile: pairs, rounded to nearest as the reference rounds a decoded weight.
static inline void store_pairs(int8_t* out, typename V::F even, typename V::F odd) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
}

template <int BITS>
static void unpack_halves(const Tiles& t, const uint8_t* block, const float* table, Unpacked* to, int64_t i) {
  constexpr int64_t chunk_bytes = 64 * BITS;
  const int number_size = LANES * number_bytes(t.scale);
  float start[LANES];
  for (int l = 0; l < LANES; ++l) start[l] = t.kind == TABLE && l < (1 << BITS) ? table[l] : 0.0f;
  const auto low = V::floats(start);
  for (int64_t k = to->first; k < to->last; ++k) {
    const uint8_t* chunk = block + k * chunk_bytes;
    int8_t* out = to->at(i, k);
    for (int line = 0; line < BITS; ++line) V::prefetch(chunk + AHEAD + 64 * line);
    auto quads = [&]<int FIRST, int LAST>() {
      const int64_t g = (k * CHUNK + 4 * FIRST) / t.padded;
      if (g >= t.groups) return __builtin_memset(out + 128 * FIRST, 0, 128 * (LAST - FIRST)), void();
      const uint8_t* params = block + t.codes_bytes + g * t.group_bytes;
      const auto scale = numbers(params, t.scale);
      auto zero = V::set(t.kind == BINARY ? 0.0f : t.zero_constant);
      if (t.zero != NONE) zero = numbers(params + (t.kind == BINARY ? BITS : 1) * number_size, t.zero);
      auto pairs = [&](auto value) {
        unroll<FIRST, LAST>([&]<int Q>() {
          store_pairs(out + 128 * Q, value.template operator()<Q, 0>(), value.template operator()<Q, 1>());
          store_pairs(out + 128 * Q + 64, value.template operator()<Q, 2>(), value.template operator()<Q, 3>());
        });
      };
      if (t.kind == UNIFORM) {
        pairs([&]<int Q, int J>() {
          const auto code = V::to_float(V::template byte<J, 8>(V::as_int(codes<BITS, Q>(chunk))));
          return V::mul(V::subf(code, zero), scale);
        });
      } else if (t.kind == TABLE) {
        pairs([&]<int Q, int J>() {
          return V::mul(looked_up<BITS>(low, table, V::template byte<J, BITS>(V::as_int(codes<BITS, Q>(chunk)))), scale);
        });
      } else {
        pairs([&]<int Q, int J>() {
          auto sum = V::set(0.0f);
          for (int b = 0; b < BITS; ++b) {
            const auto bit = V::to_float(V::template byte<J, 8>(V::as_int(sign_bits<Q>(chunk + 64 * b))));
            sum = V::fma(V::fma(V::set(2.0f), bit, V::set(-1.0f)), numbers(params + b * number_size, t.scale), sum);
          }
          return V::addf(sum, zero);
        });
      }
    };
    if (t.half()) {
      quads.template operator()<0, 4>();
      quads.template operator()<4, 8>();
    } else {
      quads.template operator()<0, 8>();
    }
  }
}

template <int BITS>
static void unpack_block(const Job& job, int64_t b, Unpacked* to, int64_t i) {
  const uint8_t* block = job.data + HEADER + b * job.tiles->block_bytes;
  if (job.input == HALVES) unpack_halves<BITS>(*job.tiles, block, job.table, to, i);
  else unpack_integers<BITS>(*job.tiles, block, to, i);
}

static void unpack(const Job& job, int64_t first, int64_t n, Unpacked* to) {
  for (int64_t i = 0; i < n; ++i) {
    switch (job.tiles->bits) {
      case 1: unpack_block<1>(job, first + i, to, i); break;
      case 2: unpack_block<2>(job, first + i, to, i); break;
      case 3: unpack_block<3>(job, first + i, to, i); break;
      case 4: unpack_block<4>(job, first + i, to, i); break;
      case 5: unpack_block<5>(job, first + i, to, i); break;
      case 6: unpack_block<6>(job, first + i, to, i); break;
      case 7: unpack_block<7>(job, first + i, to, i); break;
      default: unpack_block<8>(job, first + i, to, i);
    }
  }
}

// ---- products ---------------------------------------------------------------------------------------------------------

static inline void write_row(const Job& job, int64_t token, int64_t row, int64_t n, typename V::F y) {
  const int64_t at = token * job.tiles->rows + row;
  if (n < LANES) {
    float line[LANES];
    V::store(line, y);
    write_floats(line, n, job.y, job.y_type, at);
  } else if (job.y_type == F32) {
    V::store(static_cast<float*>(job.y) + at, y);
  } else if (job.y_type == F16) {
    V::store_halves(static_cast<uint16_t*>(job.y) + at, y);
  } else {
    auto* to = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(job.y) + at);
    _mm256_storeu_si256(to, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
  }
}

// Input tiles that are asked for while others are multiplied: so many cache lines with each tile.
struct Ahead {
  const int8_t* at;
  int64_t lines;
};

// M tiles of tokens with N blocks from i on, the part of their rows that is unpacked: sum [M * 16, N * 16] += the product, in
// float32; = where the part is the first.
template <int M, int N>
static void add_halves(const Job&, int64_t, const int8_t* tokens, const Unpacked& w, int64_t i, Ahead next, float* sum) {
  const auto multiplied = w.first == 0 ? product<true, 1, M, N, false> : product<true, 1, M, N, true>;
  multiplied(tokens, w.at(i, w.first), w.last - w.first, sum, next.at, next.lines);
}

template <int D, int M, int N>
static void add_integers(const Job& job, int64_t token, const int8_t* tokens, const Unpacked& w, int64_t i, Ahead next, float* sum) {
  const Tiles& t = *job.tiles;
  const int64_t in_group = group_tiles(t), segments = t.segments();
  const bool by_token = job.act_bits != 0;  // one scale for all of a token: it comes last
  alignas(64) int32_t found[D][M * TOKENS * N * LANES];
  for (int64_t k = w.first; k < w.last;) {
    const int64_t g = k / in_group, in = k % in_group, left = least(in_group - in, w.last - k);
    const int64_t n = by_token ? left : least(left, SEGMENT / 64 - in % (SEGMENT / 64));
    for (int d = 0; d < D; ++d) {
      const int8_t* a = tokens + ((k - w.first) * D + d) * 2 * TILE;
      product<false, D, M, N, false>(a, w.at(i, k), n, found[d], next.at, next.lines);
      next.at += n * next.lines * 64;
    }
    typename V::F scale[N];
    for (int j = 0; j < N; ++j) scale[j] = V::floats(w.scale + ((i + j) * t.groups + g) * LANES);
    const float* own = job.xs + token * segments + g * t.group_segments() + in / (SEGMENT / 64);
    const int64_t last = least(M * TOKENS, job.m - token);
    for (int64_t m = 0; m < last; ++m)
      for (int j = 0; j < N; ++j) {
        const int64_t at = (m * N + j) * LANES;
        auto whole = V::to_float(V::load(found[0] + at));
        if constexpr (D == 3) {
          whole = V::fma(V::to_float(V::load(found[1] + at)), V::set(256.0f), whole);
          whole = V::fma(V::to_float(V::load(found[2] + at)), V::set(65536.0f), whole);
        }
        const auto by = by_token ? scale[j] : V::mul(scale[j], V::set(own[m * segments]));
        V::store(sum + at, k == 0 ? V::mul(whole, by) : V::fma(whole, by, V::floats(sum + at)));
      }
    k += n;
  }
}

// What is added up, to y: rows of tokens, each of pairs of blocks, from `first` on.
static void finish(const Job& job, int64_t token, int64_t tokens, int64_t first, int64_t n, const Unpacked& w, const float* sums) {
  const Tiles& t = *job.tiles;
  const float* row_sums = reinterpret_cast<const float*>(job.data + t.sums_offset);
  const int64_t pair = (tokens + TOKENS - 1) / TOKENS * TOKENS * 2 * LANES;
  for (int64_t m = 0; m < tokens; ++m) {
    const bool shifted = job.act_bits && job.xzero[token + m] != 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = (first + i) * LANES, rows = least(LANES, t.rows - row);
      const int64_t width = i / 2 * 2 + 1 < n ? 2 : 1;  // blocks of its pair
      auto y = V::floats(sums + i / 2 * pair + (m * width + i % 2) * LANES);
      if (job.act_bits) y = V::mul(y, V::set(job.xs[(token + m) * t.segments()]));
      if (w.rests)
        for (int64_t g = 0; g < t.groups; ++g)
          y = V::fma(V::floats(w.rest + (i * t.groups + g) * LANES), V::set(-job.xsum[(token + m) * t.groups + g]), y);
      if (shifted) {
        const auto some = static_cast<__mmask16>((1u << rows) - 1);
        y = V::fma(_mm512_maskz_loadu_ps(some, row_sums + row), V::set(-job.xzero[token + m]), y);
      }
      write_row(job, token + m, row, rows, y);
    }
  }
}

// M tiles of tokens with n unpacked blocks, of which `first` is the first, through `sums`.
template <int M>
static void multiply_blocks(const Job& job, int64_t token, int64_t first, int64_t n, const Unpacked& w, float* sums) {
  const auto add2 = job.input == HALVES ? add_halves<M, 2> : job.input == INT8 ? add_integers<1, M, 2> : add_integers<3, M, 2>;
  const auto add1 = job.input == HALVES ? add_halves<M, 1> : job.input == INT8 ? add_integers<1, M, 1> : add_integers<3, M, 1>;
  const int64_t tiles = row_tiles(*job.tiles, job.input), digits = planes(job.input), step = digits * 2 * TILE;
  const int64_t pairs = (n + 1) / 2, lines = (2 * TILE / 64 + pairs - 1) / pairs;
  const int8_t* tokens = job.xq + (token / (2 * TOKENS) * tiles + w.first) * step;
  const int8_t* next = tokens + tiles * step;
  for (int64_t i = 0; i < n; i += 2, next += (w.last - w.first) * digits * lines * 64)
    (i + 1 < n ? add2 : add1)(job, token, tokens, w, i, {next, lines}, sums + i * M * TOKENS * LANES);
  if (w.last == tiles) finish(job, token, least(M * TOKENS, job.m - token), first, n, w, sums);
}

static void multiply(const Job& job, int64_t first, int64_t last) {
  const Tiles& t = *job.tiles;
  const Tiled tiled;
  const int64_t tiles = row_tiles(t, job.input), parts = (tiles + PART - 1) / PART, part = (tiles + parts - 1) / parts;
  const int64_t most = least(KEPT / (part * TILE) / 2 * 2, (last - first + 1) / 2 * 2), params = t.groups * LANES * 4;
  // Sums are for all tokens where a row comes in parts, and for those at work where it does not.
  const int64_t sums = (parts == 1 ? 2 * TOKENS : (job.m + TOKENS - 1) / TOKENS * TOKENS) * LANES * 4;
  char* memory = scratch.take(most * (part * TILE + sums + 2 * params));
  float* sum = reinterpret_cast<float*>(memory + most * part * TILE);
  float* scale = sum + most * sums / 4;
  for (int64_t b = first; b < last; b += most) {
    const int64_t n = least(most, last - b), together = (n + 1) / 2 * 2 * LANES;
    Unpacked w{reinterpret_cast<int8_t*>(memory), 0, 0, scale, scale + most * params / 4, false};
    for (; w.first < tiles; w.first = w.last) {
      w.last = least(w.first + part, tiles);
      unpack(job, b, n, &w);
      int64_t token = 0;
      for (; token + TOKENS < job.m; token += 2 * TOKENS)
        multiply_blocks<2>(job, token, b, n, w, sum + (parts == 1 ? 0 : token * together));
      if (token < job.m) multiply_blocks<1>(job, token, b, n, w, sum + (parts == 1 ? 0 : token * together));
    }
  }
}

}  // namespace
}  // namespace lowbit::amx

namespace lowbit {
const Kernels* amx_kernels() {
  static const Kernels* lanes = avx512_kernels();
  static const Kernels kernels{"amx", amx::prepare, amx::multiply, lanes->decode, lanes->read,       lanes->side,
                               lanes->side_input, lanes->step, lanes->solve, lanes->cache, amx::takes, lanes, amx::input_bytes};
  return &kernels;
}
}  // namespace lowbit
