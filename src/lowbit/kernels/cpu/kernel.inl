// The algorithm, once for all instruction sets. A file that includes this stands in a namespace of its own and defines
// V, sixteen lanes: see portable.cpp for what V has. Nothing of the standard library is used here, for an inline function
// compiled with wide instructions could be the one that the linker keeps for everyone.

#include "common.inl"

template <int D>
static inline typename V::F joined(const typename V::I* acc) {
  if constexpr (D == 1) return V::to_float(acc[0]);
  auto low = V::fma(V::to_float(acc[1]), V::set(256.0f), V::to_float(acc[0]));
  return V::fma(V::to_float(acc[2]), V::set(65536.0f), low);
}

// ---- the products of one block of 16 rows with M tokens ---------------------------------------------------------------

// How many sums of each of N products are in flight, so that additions need not wait for one another.
template <int N>
constexpr int in_flight() {
  return N == 1 ? 4 : N <= 6 ? 2 : 1;
}

// Codes of R blocks times a quad of the input; the sums of a block are N behind those of the one before. Where a quad is spread
// over the lanes in a register of its own, two blocks share it. U is V: what only some instruction sets have depends on it.
template <int BITS, int N, int R, class U>
static inline void meet(typename U::I* acc, const typename U::B* w, const int8_t* x) {
  if constexpr (R == 1) {
    acc[0] = U::template dot<BITS>(acc[0], w[0], x);
  } else {
    const auto quad = U::quad(x);
    for (int r = 0; r < R; ++r) acc[r * N] = U::dot_quad(acc[r * N], w[r], quad);
  }
}

// Codes of a chunk of R blocks, `next` apart, times the input, N products of it at once: integers of the chunk's columns, the
// next `stride` further.
template <int BITS, int N, int R, int FIRST, int LAST>
static inline void dots(const uint8_t* chunk, int64_t next, const int8_t* x, int64_t stride, typename V::I (*acc)[R * N]) {
  constexpr int ACCS = in_flight<N>();
  unroll<FIRST, LAST>([&]<int Q>() {
    typename V::B w[R];
    for (int r = 0; r < R; ++r) w[r] = codes<BITS, Q>(chunk + r * next);
    for (int i = 0; i < N; ++i) meet<BITS, N, R, V>(acc[Q % ACCS] + i, w, x + i * stride + 4 * Q);
  });
}

// Where dot products take codes of 8 bits, fields of fewer need not be moved down first: each is masked where it is and has
// a sum of its own, a multiple of its place's power of two, which is divided out once a segment. Two instructions for 64
// weights. The price is registers, so that only few products at once are taken this way.
template <int BITS>
constexpr int fields() {
  return (BITS & 4 ? 2 : 0) + (BITS & 2 ? 4 : 0) + (BITS & 1 ? 8 : 0);
}

template <int BITS, int SUMS>
constexpr bool in_place() {
  return V::takes_bytes && BITS < 8 && fields<BITS>() * SUMS <= 24;
}

template <int WIDTH, int N, int R, int FIRST, int LAST>
static inline void plane_dots(const uint8_t* plane, int64_t next, const int8_t* x, int64_t stride, typename V::I (*acc)[R * N]) {
  constexpr int count = 8 / WIDTH;
  unroll<FIRST, LAST>([&]<int Q>() {
    constexpr int field = Q % count;
    typename V::B w[R];
    for (int r = 0; r < R; ++r)
      w[r] = V::template field<0, (((1 << WIDTH) - 1) << (WIDTH * field))>(V::load(plane + r * next + 64 * (Q / count)));
    for (int i = 0; i < N; ++i) meet<8, N, R, V>(acc[field] + i, w, x + i * stride + 4 * Q);
  });
}

template <int BITS, int N, int R, int FIRST, int LAST>
static inline void dots_in_place(const uint8_t* chunk, int64_t next, const int8_t* x, int64_t stride,
                                 typename V::I (*acc)[R * N]) {
  constexpr int twos = BITS & 4 ? 2 : 0, ones = twos + (BITS & 2 ? 4 : 0);
  if constexpr (BITS & 4) plane_dots<4, N, R, FIRST, LAST>(chunk, next, x, stride, acc);
  if constexpr (BITS & 2) plane_dots<2, N, R, FIRST, LAST>(chunk + 64 * (BITS & 4), next, x, stride, acc + twos);
  if constexpr (BITS & 1) plane_dots<1, N, R, FIRST, LAST>(chunk + 64 * (BITS & 6), next, x, stride, acc + ones);
}

template <int WIDTH, int BELOW, int N>
static inline void gather_plane(typename V::I (*acc)[N], typename V::I* sum) {
  unroll<0, 8 / WIDTH>([&]<int C>() {
    for (int i = 0; i < N; ++i) sum[i] = V::add(sum[i], V::template scaled<BELOW - WIDTH * C>(acc[C][i]));
  });
}

template <int BITS, int N>
static inline void gather_fields(typename V::I (*acc)[N]) {
  typename V::I sum[N];
  for (int i = 0; i < N; ++i) sum[i] = V::izero();
  if constexpr (BITS & 4) gather_plane<4, 0, N>(acc, sum);
  if constexpr (BITS & 2) gather_plane<2, (BITS & 4), N>(acc + (BITS & 4 ? 2 : 0), sum);
  if constexpr (BITS & 1) gather_plane<1, (BITS & 6), N>(acc + (BITS & 4 ? 2 : 0) + (BITS & 2 ? 4 : 0), sum);
  for (int i = 0; i < N; ++i) acc[0][i] = sum[i];
}

template <int BITS, int D, int M, int R, bool HALF>
static void uniform_blocks(const Job& job, const uint8_t* block, int64_t token, float* out) {
  constexpr int N = D * M;
  constexpr bool IN_PLACE = in_place<BITS, R * N>();
  constexpr int ACCS = IN_PLACE ? fields<BITS>() : in_flight<N>();
  constexpr int64_t chunk_bytes = 64 * BITS;
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols(), segments = t.segments(), groups = t.groups, padded = t.padded;
  const int64_t group_bytes = t.group_bytes, next = t.block_bytes, params_bytes = t.block_bytes - t.codes_bytes;
  const int32_t scale_kind = t.scale, zero_kind = t.zero;
  const int zero_at = LANES * number_bytes(scale_kind);
  auto multiply_add = [next, plane]<int FIRST, int LAST>(const uint8_t* chunk, const int8_t* x, auto acc) {
    if constexpr (IN_PLACE) dots_in_place<BITS, N, R, FIRST, LAST>(chunk, next, x, plane, acc);
    else dots<BITS, N, R, FIRST, LAST>(chunk, next, x, plane, acc);
  };
  // The input goes by as the codes do: a chunk, a segment and a group further each time.
  const int8_t* x = job.xq + token * D * plane;
  const float* by = job.xs + token * segments;
  const float* whole = job.xsum + token * groups;
  const uint8_t* chunk = block;
  const uint8_t* params = block + t.codes_bytes;
  // From here on what is AHEAD lies behind what these blocks have left, which is asked for elsewhere.
  const uint8_t* late = params - AHEAD;
  const int64_t passed = params_bytes + (R - 1) * next;
  typename V::F sum[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sum[r][m] = V::set(0.0f);
  for (int64_t g = 0; g < groups; ++g, params += group_bytes, ++whole) {
    for (int r = 0; r < R; ++r) ask_for(params + (R + r) * next, group_bytes);
    const int64_t ahead = chunk < late ? AHEAD : AHEAD + passed;
    typename V::F inner[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) inner[r][m] = V::set(0.0f);
    for (int64_t left = padded; left > 0; left -= SEGMENT, ++by) {
      typename V::I acc[ACCS][R * N];
      for (int a = 0; a < ACCS; ++a)
        for (int i = 0; i < R * N; ++i) acc[a][i] = V::izero();
      if constexpr (HALF) {  // quads are counted from the start of the chunk, the input from the start of the group
        if (g % 2 == 0) {
          multiply_add.template operator()<0, 4>(chunk, x, acc);
        } else {
          multiply_add.template operator()<4, 8>(chunk, x - CHUNK / 2, acc);
          chunk += chunk_bytes;
        }
        x += CHUNK / 2;
      } else {
        const uint8_t* stop = chunk + least(left, SEGMENT) / CHUNK * chunk_bytes;
        for (; chunk != stop; chunk += chunk_bytes, x += CHUNK) {
          for (int r = 0; r < R; ++r)
            for (int line = 0; line < BITS; ++line) V::prefetch(chunk + r * next + ahead + 64 * line);
          multiply_add.template operator()<0, 8>(chunk, x, acc);
        }
      }
      if constexpr (IN_PLACE) {
        gather_fields<BITS, R * N>(acc);
      } else {
        for (int a = 1; a < ACCS; ++a)
          for (int i = 0; i < R * N; ++i) acc[0][i] = V::add(acc[0][i], acc[a][i]);
      }
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m)
          inner[r][m] = V::fma(joined<D>(acc[0] + r * N + m * D), V::set(by[m * segments]), inner[r][m]);
    }
    for (int r = 0; r < R; ++r) {
      const uint8_t* own = params + r * next;
      auto scale = numbers(own, scale_kind);
      auto zero = zero_kind == NONE ? V::set(t.zero_constant) : numbers(own + zero_at, zero_kind);
      for (int m = 0; m < M; ++m)
        sum[r][m] = V::fma(scale, V::fma(zero, V::set(-whole[m * groups]), inner[r][m]), sum[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) V::store(out + LANES * (r * M + m), sum[r][m]);
}

// Binary coding: a plane for each base, its dot products apart, plane after plane of a segment; M is 1.
template <int BITS, int D>
static void binary_block(const Job& job, const uint8_t* block, int64_t token, float* out) {
  constexpr bool IN_PLACE = in_place<1, D>();
  constexpr int ACCS = IN_PLACE ? fields<1>() : 1;
  constexpr int64_t chunk_bytes = 64 * BITS;
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols(), segments = t.segments(), step = t.segment();
  auto multiply_add = [plane]<int FIRST, int LAST>(const uint8_t* unit, const int8_t* x, auto acc) {
    if constexpr (IN_PLACE) {
      plane_dots<1, D, 1, FIRST, LAST>(unit, 0, x, plane, acc);
    } else {
      unroll<FIRST, LAST>([&]<int Q>() {
        auto w = sign_bits<Q>(unit);
        for (int d = 0; d < D; ++d) acc[0][d] = V::template dot<1>(acc[0][d], w, x + d * plane + 4 * Q);
      });
    }
  };
  const uint8_t* params = block + t.codes_bytes;
  const int base_bytes = LANES * number_bytes(t.scale);
  auto sum = V::set(0.0f);
  int64_t column = 0, segment = 0;
  for (int64_t g = 0; g < t.groups; ++g, params += t.group_bytes) {
    ask_for(params + t.block_bytes, t.group_bytes);
    typename V::F inner[BITS];
    for (int b = 0; b < BITS; ++b) inner[b] = V::set(0.0f);
    for (int64_t left = t.padded; left > 0; left -= step, ++segment) {
      // A group that is half a chunk starts in the middle of one every other time.
      const bool late = column % CHUNK != 0;
      const int64_t end = column + least(step, left);
      const auto by = V::set(job.xs[token * segments + segment]);
      for (int b = 0; b < BITS; ++b) {
        typename V::I acc[ACCS][D];
        for (int a = 0; a < ACCS; ++a)
          for (int d = 0; d < D; ++d) acc[a][d] = V::izero();
        for (int64_t at = column / CHUNK * CHUNK; at < end; at += CHUNK) {
          const uint8_t* chunk = block + at / CHUNK * chunk_bytes;
          const int8_t* x = job.xq + token * D * plane + at;
          V::prefetch(chunk + AHEAD + 64 * b);
          if (late) multiply_add.template operator()<4, 8>(chunk + 64 * b, x, acc);
          else if (end - at > CHUNK / 2) multiply_add.template operator()<0, 8>(chunk + 64 * b, x, acc);
          else multiply_add.template operator()<0, 4>(chunk + 64 * b, x, acc);
        }
        typename V::I whole[D];
        for (int d = 0; d < D; ++d) whole[d] = IN_PLACE ? V::izero() : acc[0][d];
        if constexpr (IN_PLACE) gather_plane<1, 0, D>(acc, whole);
        inner[b] = V::fma(joined<D>(whole), by, inner[b]);
      }
      column = end;
    }
    auto whole = V::set(job.xsum[token * t.groups + g]);
    for (int b = 0; b < BITS; ++b) {  // a set bit is +1, a clear one -1
      auto signed_sum = V::fma(V::set(2.0f), inner[b], V::mul(whole, V::set(-1.0f)));
      sum = V::fma(numbers(params + b * base_bytes, t.scale), signed_sum, sum);
    }
    if (t.zero != NONE) sum = V::fma(numbers(params + BITS * base_bytes, t.zero), whole, sum);
  }
  V::store(out, sum);
}

// One table for all rows, a scale a group.
template <int BITS, int M>
static void table_block(const Job& job, const uint8_t* block, int64_t token, float* out) {
  constexpr int64_t chunk_bytes = 64 * BITS;
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols();
  const uint8_t* params = block + t.codes_bytes;
  float start[LANES];
  for (int i = 0; i < LANES; ++i) start[i] = i < (1 << BITS) ? job.table[i] : 0.0f;
  const auto low = V::floats(start);
  typename V::F sum[M];
  for (int m = 0; m < M; ++m) sum[m] = V::set(0.0f);
  int64_t column = 0;
  for (int64_t g = 0; g < t.groups; ++g, params += t.group_bytes) {
    ask_for(params + t.block_bytes, t.group_bytes);
    typename V::F inner[4][M];
    for (int j = 0; j < 4; ++j)
      for (int m = 0; m < M; ++m) inner[j][m] = V::set(0.0f);
    const bool late = column % CHUNK != 0;
    const int64_t stop = column + t.padded;
    while (column < stop) {
      const uint8_t* chunk = block + column / CHUNK * chunk_bytes;
      const float* x[M];
      for (int m = 0; m < M; ++m) x[m] = job.xf + (token + m) * plane + column / CHUNK * CHUNK;
      for (int line = 0; line < BITS; ++line) V::prefetch(chunk + AHEAD + 64 * line);
      auto quad = [&]<int Q>() {
        auto w = V::as_int(codes<BITS, Q>(chunk));
        unroll<0, 4>([&]<int J>() {
          auto value = looked_up<BITS>(low, job.table, V::template byte<J, BITS>(w));
          for (int m = 0; m < M; ++m) inner[J][m] = V::fma(value, V::set(x[m][4 * Q + J]), inner[J][m]);
        });
      };
      const int64_t left = stop - column;
      if (!late) unroll<0, 4>(quad);
      if (late || left > CHUNK / 2) unroll<4, 8>(quad);
      column += least(CHUNK, left);
    }
    auto scale = numbers(params, t.scale);
    for (int m = 0; m < M; ++m) {
      auto all = V::addf(V::addf(inner[0][m], inner[1][m]), V::addf(inner[2][m], inner[3][m]));
      sum[m] = V::fma(scale, all, sum[m]);
    }
  }
  for (int m = 0; m < M; ++m) V::store(out + LANES * m, sum[m]);
}

// A table for each row; a block is one row, lanes are columns, and the one horizontal sum comes at its end.
template <int BITS, int M>
static void codebook_row(const Job& job, const uint8_t* block, int64_t token, float* out) {
  constexpr int64_t chunk_bytes = 64 * BITS;
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols() * LANES;
  const float* table = reinterpret_cast<const float*>(block + t.codes_bytes);
  float start[LANES];
  for (int i = 0; i < LANES; ++i) start[i] = i < (1 << BITS) ? table[i] : 0.0f;
  const auto low = V::floats(start);
  typename V::F sum[4][M];
  for (int j = 0; j < 4; ++j)
    for (int m = 0; m < M; ++m) sum[j][m] = V::set(0.0f);
  for (int64_t column = 0; column < t.padded; column += CHUNK) {
    const uint8_t* chunk = block + column / CHUNK * chunk_bytes;
    for (int line = 0; line < BITS; ++line) V::prefetch(chunk + AHEAD + 64 * line);
    const float* x = job.xf + token * plane + column * LANES;
    unroll<0, 8>([&]<int Q>() {
      auto w = V::as_int(codes<BITS, Q>(chunk));
      unroll<0, 4>([&]<int J>() {
        auto value = looked_up<BITS>(low, table, V::template byte<J, BITS>(w));
        for (int m = 0; m < M; ++m) sum[J][m] = V::fma(value, V::floats(x + m * plane + (4 * Q + J) * LANES), sum[J][m]);
      });
    });
  }
  for (int m = 0; m < M; ++m)
    out[m] = V::total(V::addf(V::addf(sum[0][m], sum[1][m]), V::addf(sum[2][m], sum[3][m])));
}

// ---- all tokens -------------------------------------------------------------------------------------------------------

static void prepare(const Job& job, int64_t first, int64_t last) {
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols() * (t.kind == CODEBOOK ? LANES : 1), planes = job.input == FLOATS ? 0 : job.input;
  for (int64_t token = first; token < last; ++token)
    prepare_token(job, token, job.xf + token * plane, job.xq + token * planes * plane);
}

template <int BITS, int D, int M>
static void uniform(const Job& job, const uint8_t* block, int64_t token, float* out) {
  if (job.tiles->half()) uniform_blocks<BITS, D, M, 1, true>(job, block, token, out);
  else uniform_blocks<BITS, D, M, 1, false>(job, block, token, out);
}

using Block = void (*)(const Job&, const uint8_t*, int64_t, float*);

struct Choice {
  Block by8, by4, by2, by1;  // for so many tokens at once; null where there is none
};

// F<M> where the registers hold its N products; one token is always taken.
template <template <int> class F, int M, int N>
static constexpr Block fitting() {
  if constexpr (M == 1 || N <= V::products) return F<M>::block;
  else return nullptr;
}

template <int BITS, int D>
struct Uniform {
  template <int M>
  struct Of { static constexpr Block block = uniform<BITS, D, M>; };
  template <int M>
  struct Pair { static constexpr Block block = uniform_blocks<BITS, D, M, 2, false>; };
};

template <int BITS>
struct Looked {
  template <int M>
  struct Of { static constexpr Block block = table_block<BITS, M>; };
  template <int M>
  struct Rows { static constexpr Block block = codebook_row<BITS, M>; };
};

template <template <int> class F, int D>
static constexpr Choice fitting() {
  return {fitting<F, 8, 8 * D>(), fitting<F, 4, 4 * D>(), fitting<F, 2, 2 * D>(), fitting<F, 1, D>()};
}

template <int BITS>
static Choice choice(const Tiles& t, int32_t input) {
  if (t.kind == TABLE) return fitting<Looked<BITS>::template Of, 2>();  // values and inputs in float take registers too
  if (t.kind == CODEBOOK) return fitting<Looked<BITS>::template Rows, 2>();
  if (t.kind == BINARY) return {nullptr, nullptr, nullptr, input == INT8 ? binary_block<BITS, 1> : binary_block<BITS, 3>};
  return input == INT8 ? fitting<Uniform<BITS, 1>::template Of, 1>() : fitting<Uniform<BITS, 3>::template Of, 3>();
}

// For two blocks at once; empty where one is taken at a time, as for one token of integers, which gains nothing.
template <int BITS>
static Choice pairs(const Job& job) {
  if constexpr (V::pairs) {
    const Tiles& t = *job.tiles;
    if (t.kind != UNIFORM || t.half() || (job.input == INT8 && job.m == 1)) return {};
    return job.input == INT8 ? fitting<Uniform<BITS, 1>::template Pair, 1>() : fitting<Uniform<BITS, 3>::template Pair, 3>();
  }
  return {};
}

struct Choices {
  Choice one, two;
};

template <int BITS>
static Choices choices(const Job& job) {
  return {choice<BITS>(*job.tiles, job.input), pairs<BITS>(job)};
}

static Choices choose(const Job& job) {
  switch (job.tiles->bits) {
    case 1: return choices<1>(job);
    case 2: return choices<2>(job);
    case 3: return choices<3>(job);
    case 4: return choices<4>(job);
    case 5: return choices<5>(job);
    case 6: return choices<6>(job);
    case 7: return choices<7>(job);
    default: return choices<8>(job);
  }
}

static void multiply(const Job& job, int64_t first, int64_t last) {
  const Tiles& t = *job.tiles;
  const Choices choices = choose(job);
  const int64_t height = t.kind == CODEBOOK ? 1 : LANES;
  // Others than uniform weights have no sums; their inputs are symmetric, so that what is not zero there is NaN.
  const float* sums = t.kind == UNIFORM ? reinterpret_cast<const float*>(job.data + t.sums_offset) : nullptr;
  float out[2 * 8 * LANES];
  for (int64_t b = first; b < last;) {
    const int64_t together = choices.two.by1 && last - b > 1 ? 2 : 1;
    const Choice& c = together == 2 ? choices.two : choices.one;
    const uint8_t* block = job.data + HEADER + b * t.block_bytes;
    for (int64_t token = 0; token < job.m;) {
      const int64_t left = job.m - token;
      const int64_t batch = left >= 8 && c.by8 ? 8 : left >= 4 && c.by4 ? 4 : left >= 2 && c.by2 ? 2 : 1;
      (batch == 8 ? c.by8 : batch == 4 ? c.by4 : batch == 2 ? c.by2 : c.by1)(job, block, token, out);
      for (int64_t r = 0; r < together; ++r) {
        const int64_t row = (b + r) * height, n = least(height, t.rows - row);
        for (int64_t m = 0; m < batch; ++m) {
          float* y = out + (r * batch + m) * height;
          if (sums && job.act_bits && job.xzero[token + m] != 0.0f)
            for (int64_t i = 0; i < n; ++i) y[i] -= job.xzero[token + m] * sums[row + i];
          write_floats(y, n, job.y, job.y_type, (token + m) * t.rows + row);
        }
      }
      token += batch;
    }
    b += together;
  }
}

// ---- back to floating point -------------------------------------------------------------------------------------------

template <int BITS>
static void decode_chunk(const uint8_t* chunk, bool binary, uint8_t (*rows)[CHUNK]) {
  unroll<0, 8>([&]<int Q>() {
    uint8_t quad[64];
    if (!binary) {
      V::store_all(quad, codes<BITS, Q>(chunk));
    } else {
      for (int i = 0; i < 64; ++i) {
        int code = 0;
        for (int b = 0; b < BITS; ++b) code |= ((chunk[64 * b + i] >> Q) & 1) << b;
        quad[i] = static_cast<uint8_t>(code);
      }
    }
    for (int r = 0; r < LANES; ++r) __builtin_memcpy(rows[r] + 4 * Q, quad + 4 * r, 4);
  });
}

static void chunk_codes(const Tiles& t, const uint8_t* chunk, uint8_t (*rows)[CHUNK]) {
  const bool binary = t.kind == BINARY;
  switch (t.bits) {
    case 1: return decode_chunk<1>(chunk, binary, rows);
    case 2: return decode_chunk<2>(chunk, binary, rows);
    case 3: return decode_chunk<3>(chunk, binary, rows);
    case 4: return decode_chunk<4>(chunk, binary, rows);
    case 5: return decode_chunk<5>(chunk, binary, rows);
    case 6: return decode_chunk<6>(chunk, binary, rows);
    case 7: return decode_chunk<7>(chunk, binary, rows);
    default: return decode_chunk<8>(chunk, binary, rows);
  }
}

// How the codes of one row and group become values: the affine map, or levels times a factor.
struct Values {
  int32_t kind;
  int32_t bits;
  float scale, zero;
  const float* levels;
  typename V::F low;  // the first 16 levels
};

static inline typename V::F decoded(const uint8_t* codes, const Values& v) {
  if (v.kind == UNIFORM) return V::mul(V::subf(V::bytes(codes), V::set(v.zero)), V::set(v.scale));
  const auto index = V::widened(codes);
  return V::mul(v.bits <= 4 ? V::lookup(v.low, index) : V::gather(v.levels, index), V::set(v.scale));
}

static inline void put(typename V::F x, void* out, int32_t type, int64_t offset) {
  if (type == F32) V::store(static_cast<float*>(out) + offset, x);
  else if (type == BF16) V::store_bfloats(static_cast<uint16_t*>(out) + offset, x);
  else V::store_halves(static_cast<uint16_t*>(out) + offset, x);
}

static inline float number(const uint8_t* p, int32_t type, int lane) {
  float all[LANES];
  V::store(all, numbers(p, type));
  return all[lane];
}

static void decode_codebook(const Tiles& t, const uint8_t* block, int64_t row, float* line) {
  const float* table = reinterpret_cast<const float*>(block + t.codes_bytes);
  uint8_t lanes[LANES][CHUNK];
  (void)row;
  for (int64_t column = 0; column < t.padded; column += CHUNK) {
    chunk_codes(t, block + column / CHUNK * 64 * t.bits, lanes);
    for (int j = 0; j < CHUNK; ++j)
      for (int l = 0; l < LANES; ++l) {
        const int64_t at = (column + j) * LANES + l;
        if (at < t.cols) line[at] = table[lanes[l][j]];
      }
  }
}

// Rows first..last to out [last - first, cols]; first is a multiple of LANES, or the kind a codebook.
static void decode(const Tiles& t, const uint8_t* data, const float* table, int64_t first, int64_t last, void* out,
                   int32_t type) {
  const uint8_t* blocks = data + HEADER;
  if (t.kind == CODEBOOK) {
    float* line = static_cast<float*>(__builtin_malloc(sizeof(float) * t.cols));
    for (int64_t r = first; r < last; ++r) {
      decode_codebook(t, blocks + r * t.block_bytes, r, line);
      write_floats(line, t.cols, out, type, (r - first) * t.cols);
    }
    __builtin_free(line);
    return;
  }
  uint8_t rows[LANES][CHUNK];
  float levels[LANES][256];
  for (int64_t row = first; row < last; row += LANES) {
    const uint8_t* block = blocks + row / LANES * t.block_bytes;
    const int64_t n = least(LANES, last - row);
    for (int64_t g = 0; g < t.groups; ++g) {
      const uint8_t* params = block + t.codes_bytes + g * t.group_bytes;
      const int scale_bytes = LANES * number_bytes(t.scale);
      float scale[LANES], zero[LANES] = {};
      V::store(scale, numbers(params, t.scale));
      if (t.kind == BINARY) {
        for (int r = 0; r < n; ++r)
          for (int code = 0; code < (1 << t.bits); ++code) {
            float v = 0;
            for (int b = 0; b < t.bits; ++b) {
              const float base = number(params + b * scale_bytes, t.scale, r);
              v += (code >> b) & 1 ? base : -base;
            }
            levels[r][code] = t.zero == NONE ? v : v + number(params + t.bits * scale_bytes, t.zero, r);
          }
      } else if (t.zero != NONE) {
        V::store(zero, numbers(params + scale_bytes, t.zero));
      } else {
        for (int r = 0; r < LANES; ++r) zero[r] = t.zero_constant;
      }
      Values values[LANES];
      for (int r = 0; r < n; ++r) {
        const float* own = t.kind == BINARY ? levels[r] : table;
        values[r] = {t.kind, t.bits, t.kind == BINARY ? 1.0f : scale[r], zero[r], own, V::set(0.0f)};
        if (own != nullptr) {
          float start[LANES];
          for (int i = 0; i < LANES; ++i) start[i] = i < (1 << t.bits) ? own[i] : 0.0f;
          values[r].low = V::floats(start);
        }
      }
      const int64_t columns = least(t.group, t.cols - g * t.group);
      for (int64_t k = 0; k < columns;) {
        const int64_t column = g * t.padded + k;
        const int at = static_cast<int>(column % CHUNK);
        const int64_t take = least(CHUNK - at, columns - k);
        chunk_codes(t, block + column / CHUNK * 64 * t.bits, rows);
        for (int r = 0; r < n; ++r) {
          const int64_t to = (row - first + r) * t.cols + g * t.group + k;
          if (take == CHUNK) {
            put(decoded(rows[r], values[r]), out, type, to);
            put(decoded(rows[r] + LANES, values[r]), out, type, to + LANES);
          } else {
            float some[CHUNK];
            V::store(some, decoded(rows[r], values[r]));
            V::store(some + LANES, decoded(rows[r] + LANES, values[r]));
            write_floats(some + at, take, out, type, to);
          }
        }
        k += take;
      }
    }
  }
}

static double read(const uint8_t* data, int64_t bytes) {
  auto a = V::as_int(V::load(data)), b = a, c = a, d = a;
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    V::prefetch(data + i + AHEAD);
    V::prefetch(data + i + AHEAD + 64);
    V::prefetch(data + i + AHEAD + 128);
    V::prefetch(data + i + AHEAD + 192);
    a = V::add(a, V::as_int(V::load(data + i)));
    b = V::add(b, V::as_int(V::load(data + i + 64)));
    c = V::add(c, V::as_int(V::load(data + i + 128)));
    d = V::add(d, V::as_int(V::load(data + i + 192)));
  }
  return V::total(V::to_float(V::add(V::add(a, b), V::add(c, d))));
}
