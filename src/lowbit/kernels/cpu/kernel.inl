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

// Codes of a chunk times the input, N products of it at once: integers of the chunk's columns, the next `stride` further.
template <int BITS, int N, int FIRST, int LAST>
static inline void dots(const uint8_t* chunk, const int8_t* x, int64_t stride, typename V::I (*acc)[N]) {
  constexpr int ACCS = in_flight<N>();
  unroll<FIRST, LAST>([&]<int Q>() {
    auto w = codes<BITS, Q>(chunk);
    for (int i = 0; i < N; ++i)
      acc[Q % ACCS][i] = V::template dot<BITS>(acc[Q % ACCS][i], w, x + i * stride + 4 * Q);
  });
}

// Where dot products take codes of 8 bits, fields of fewer need not be moved down first: each is masked where it is and has
// a sum of its own, a multiple of its place's power of two, which is divided out once a segment. Two instructions for 64
// weights. The price is registers, so that only few products at once are taken this way.
template <int BITS>
constexpr int fields() {
  return (BITS & 4 ? 2 : 0) + (BITS & 2 ? 4 : 0) + (BITS & 1 ? 8 : 0);
}

template <int BITS, int N>
constexpr bool in_place() {
  return V::takes_bytes && BITS < 8 && fields<BITS>() * N <= 24;
}

template <int WIDTH, int N, int FIRST, int LAST>
static inline void plane_dots(const uint8_t* plane, const int8_t* x, int64_t stride, typename V::I (*acc)[N]) {
  constexpr int count = 8 / WIDTH;
  unroll<FIRST, LAST>([&]<int Q>() {
    constexpr int field = Q % count;
    auto w = V::template field<0, (((1 << WIDTH) - 1) << (WIDTH * field))>(V::load(plane + 64 * (Q / count)));
    for (int i = 0; i < N; ++i) acc[field][i] = V::template dot<8>(acc[field][i], w, x + i * stride + 4 * Q);
  });
}

template <int BITS, int N, int FIRST, int LAST>
static inline void dots_in_place(const uint8_t* chunk, const int8_t* x, int64_t stride, typename V::I (*acc)[N]) {
  constexpr int twos = BITS & 4 ? 2 : 0, ones = twos + (BITS & 2 ? 4 : 0);
  if constexpr (BITS & 4) plane_dots<4, N, FIRST, LAST>(chunk, x, stride, acc);
  if constexpr (BITS & 2) plane_dots<2, N, FIRST, LAST>(chunk + 64 * (BITS & 4), x, stride, acc + twos);
  if constexpr (BITS & 1) plane_dots<1, N, FIRST, LAST>(chunk + 64 * (BITS & 6), x, stride, acc + ones);
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

template <int BITS, int D, int M, bool HALF>
static void uniform_block(const Job& job, const uint8_t* block, int64_t token, float* out) {
  constexpr int N = D * M;
  constexpr bool IN_PLACE = in_place<BITS, N>();
  constexpr int ACCS = IN_PLACE ? fields<BITS>() : in_flight<N>();
  constexpr int64_t chunk_bytes = 64 * BITS;
  auto multiply_add = []<int FIRST, int LAST>(const uint8_t* chunk, const int8_t* x, int64_t stride, auto acc) {
    if constexpr (IN_PLACE) dots_in_place<BITS, N, FIRST, LAST>(chunk, x, stride, acc);
    else dots<BITS, N, FIRST, LAST>(chunk, x, stride, acc);
  };
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols(), segments = t.segments(), groups = t.groups, padded = t.padded;
  const int64_t group_bytes = t.group_bytes, next = t.block_bytes, params_bytes = t.block_bytes - t.codes_bytes;
  const int32_t scale_kind = t.scale, zero_kind = t.zero;
  const int zero_at = LANES * number_bytes(scale_kind);
  // The input goes by as the codes do: a chunk, a segment and a group further each time.
  const int8_t* x = job.xq + token * D * plane;
  const float* by = job.xs + token * segments;
  const float* whole = job.xsum + token * groups;
  const uint8_t* chunk = block;
  const uint8_t* params = block + t.codes_bytes;
  // From here on what is AHEAD lies behind this block's parameters, which the block before has asked for.
  const uint8_t* late = params - AHEAD;
  typename V::F sum[M];
  for (int m = 0; m < M; ++m) sum[m] = V::set(0.0f);
  for (int64_t g = 0; g < groups; ++g, params += group_bytes, ++whole) {
    ask_for(params + next, group_bytes);
    const int64_t ahead = chunk < late ? AHEAD : AHEAD + params_bytes;
    typename V::F inner[M];
    for (int m = 0; m < M; ++m) inner[m] = V::set(0.0f);
    for (int64_t left = padded; left > 0; left -= SEGMENT, ++by) {
      typename V::I acc[ACCS][N];
      for (int a = 0; a < ACCS; ++a)
        for (int i = 0; i < N; ++i) acc[a][i] = V::izero();
      if constexpr (HALF) {  // quads are counted from the start of the chunk, the input from the start of the group
        if (g % 2 == 0) {
          multiply_add.template operator()<0, 4>(chunk, x, plane, acc);
        } else {
          multiply_add.template operator()<4, 8>(chunk, x - CHUNK / 2, plane, acc);
          chunk += chunk_bytes;
        }
        x += CHUNK / 2;
      } else {
        const uint8_t* stop = chunk + least(left, SEGMENT) / CHUNK * chunk_bytes;
        for (; chunk != stop; chunk += chunk_bytes, x += CHUNK) {
          for (int line = 0; line < BITS; ++line) V::prefetch(chunk + ahead + 64 * line);
          multiply_add.template operator()<0, 8>(chunk, x, plane, acc);
        }
      }
      if constexpr (IN_PLACE) {
        gather_fields<BITS, N>(acc);
      } else {
        for (int a = 1; a < ACCS; ++a)
          for (int i = 0; i < N; ++i) acc[0][i] = V::add(acc[0][i], acc[a][i]);
      }
      for (int m = 0; m < M; ++m) inner[m] = V::fma(joined<D>(acc[0] + m * D), V::set(by[m * segments]), inner[m]);
    }
    auto scale = numbers(params, scale_kind);
    auto zero = zero_kind == NONE ? V::set(t.zero_constant) : numbers(params + zero_at, zero_kind);
    for (int m = 0; m < M; ++m)
      sum[m] = V::fma(scale, V::fma(zero, V::set(-whole[m * groups]), inner[m]), sum[m]);
  }
  for (int m = 0; m < M; ++m) V::store(out + LANES * m, sum[m]);
}

// Two blocks at once, for many tokens: each quad of the input is spread over the lanes once for both. U is V.
template <int BITS, int N, class U>
static inline void pair_dots(const uint8_t* chunk, int64_t next, const int8_t* x, int64_t stride, typename U::I (*acc)[N]) {
  unroll<0, 8>([&]<int Q>() {
    const auto first = codes<BITS, Q>(chunk), second = codes<BITS, Q>(chunk + next);
    for (int i = 0; i < N; ++i) {
      const auto quad = U::quad(x + i * stride + 4 * Q);
      acc[0][i] = U::dot_quad(acc[0][i], first, quad);
      acc[1][i] = U::dot_quad(acc[1][i], second, quad);
    }
  });
}

template <int BITS, int D, int M, class U>
static void uniform_pair(const Job& job, const uint8_t* block, int64_t token, float* out) {
  constexpr int N = D * M;
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols(), segments = t.segments(), next = t.block_bytes;
  const int zero_at = LANES * number_bytes(t.scale);
  const int8_t* x = job.xq + token * D * plane;
  const float* by = job.xs + token * segments;
  const float* whole = job.xsum + token * t.groups;
  const uint8_t* chunk = block;
  const uint8_t* params = block + t.codes_bytes;
  typename U::F sum[2][M];
  for (int r = 0; r < 2; ++r)
    for (int m = 0; m < M; ++m) sum[r][m] = U::set(0.0f);
  for (int64_t g = 0; g < t.groups; ++g, params += t.group_bytes, ++whole) {
    typename U::F inner[2][M];
    for (int r = 0; r < 2; ++r)
      for (int m = 0; m < M; ++m) inner[r][m] = U::set(0.0f);
    for (int64_t left = t.padded; left > 0; left -= SEGMENT, ++by) {
      typename U::I acc[2][N];
      for (int r = 0; r < 2; ++r)
        for (int i = 0; i < N; ++i) acc[r][i] = U::izero();
      const uint8_t* stop = chunk + least(left, SEGMENT) / CHUNK * 64 * BITS;
      for (; chunk != stop; chunk += 64 * BITS, x += CHUNK) pair_dots<BITS, N, U>(chunk, next, x, plane, acc);
      for (int r = 0; r < 2; ++r)
        for (int m = 0; m < M; ++m)
          inner[r][m] = U::fma(joined<D>(acc[r] + m * D), U::set(by[m * segments]), inner[r][m]);
    }
    for (int r = 0; r < 2; ++r) {
      const uint8_t* own = params + r * next;
      const auto scale = numbers(own, t.scale);
      const auto zero = t.zero == NONE ? U::set(t.zero_constant) : numbers(own + zero_at, t.zero);
      for (int m = 0; m < M; ++m)
        sum[r][m] = U::fma(scale, U::fma(zero, U::set(-whole[m * t.groups]), inner[r][m]), sum[r][m]);
    }
  }
  for (int r = 0; r < 2; ++r)
    for (int m = 0; m < M; ++m) U::store(out + LANES * (r * M + m), sum[r][m]);
}

// Binary coding: a plane for each base, its dot products apart; M is 1.
template <int BITS, int D>
static void binary_block(const Job& job, const uint8_t* block, int64_t token, float* out) {
  constexpr int64_t chunk_bytes = 64 * BITS;
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols(), segments = t.segments(), step = t.segment();
  const uint8_t* params = block + t.codes_bytes;
  const int base_bytes = LANES * number_bytes(t.scale);
  auto sum = V::set(0.0f);
  int64_t column = 0, segment = 0;
  for (int64_t g = 0; g < t.groups; ++g, params += t.group_bytes) {
    ask_for(params + t.block_bytes, t.group_bytes);
    typename V::F inner[BITS];
    for (int b = 0; b < BITS; ++b) inner[b] = V::set(0.0f);
    for (int64_t begin = 0; begin < t.padded; begin += step, ++segment) {
      const int64_t end = least(begin + step, t.padded);
      typename V::I acc[BITS][D];
      for (int b = 0; b < BITS; ++b)
        for (int d = 0; d < D; ++d) acc[b][d] = V::izero();
      // A group that is half a chunk starts in the middle of one every other time.
      const bool late = column % CHUNK != 0;
      for (int64_t k = begin; k < end; k += CHUNK) {
        const uint8_t* chunk = block + column / CHUNK * chunk_bytes;
        const int8_t* x = job.xq + token * D * plane + column / CHUNK * CHUNK;
        for (int line = 0; line < BITS; ++line) V::prefetch(chunk + AHEAD + 64 * line);
        for (int b = 0; b < BITS; ++b) {
          auto quad = [&]<int Q>() {
            auto w = sign_bits<Q>(chunk + 64 * b);
            for (int d = 0; d < D; ++d) acc[b][d] = V::template dot<1>(acc[b][d], w, x + d * plane + 4 * Q);
          };
          if (!late) unroll<0, 4>(quad);
          if (late || end - k > CHUNK / 2) unroll<4, 8>(quad);
        }
        column += least(CHUNK, end - k);
      }
      auto by = V::set(job.xs[token * segments + segment]);
      for (int b = 0; b < BITS; ++b) inner[b] = V::fma(joined<D>(acc[b]), by, inner[b]);
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
  if (job.tiles->half()) uniform_block<BITS, D, M, true>(job, block, token, out);
  else uniform_block<BITS, D, M, false>(job, block, token, out);
}

using Block = void (*)(const Job&, const uint8_t*, int64_t, float*);

struct Choice {
  Block by8, by4, by2, by1;  // for so many tokens at once; null where there is none
  Block pair = nullptr;      // for two blocks and so many tokens
  int64_t pair_tokens = 0;
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

template <int BITS, int D>
static Choice uniform_choice(const Tiles& t) {
  Choice c = fitting<Uniform<BITS, D>::template Of, D>();
  if constexpr (V::pairs) {
    constexpr int M = D == 1 ? 8 : 4;
    if (!t.half()) c.pair = uniform_pair<BITS, D, M, V>, c.pair_tokens = M;
  }
  return c;
}

template <int BITS>
static Choice choice(const Tiles& t, int32_t input) {
  if (t.kind == TABLE) return fitting<Looked<BITS>::template Of, 2>();  // values and inputs in float take registers too
  if (t.kind == CODEBOOK) return fitting<Looked<BITS>::template Rows, 2>();
  if (t.kind == BINARY) return {nullptr, nullptr, nullptr, input == INT8 ? binary_block<BITS, 1> : binary_block<BITS, 3>};
  return input == INT8 ? uniform_choice<BITS, 1>(t) : uniform_choice<BITS, 3>(t);
}

static Choice choose(const Tiles& t, int32_t input) {
  switch (t.bits) {
    case 1: return choice<1>(t, input);
    case 2: return choice<2>(t, input);
    case 3: return choice<3>(t, input);
    case 4: return choice<4>(t, input);
    case 5: return choice<5>(t, input);
    case 6: return choice<6>(t, input);
    case 7: return choice<7>(t, input);
    default: return choice<8>(t, input);
  }
}

static void multiply(const Job& job, int64_t first, int64_t last) {
  const Tiles& t = *job.tiles;
  const Choice c = choose(t, job.input);
  const int64_t height = t.kind == CODEBOOK ? 1 : LANES;
  // Others than uniform weights have no sums; their inputs are symmetric, so that what is not zero there is NaN.
  const float* sums = t.kind == UNIFORM ? reinterpret_cast<const float*>(job.data + t.sums_offset) : nullptr;
  float out[2 * 8 * LANES];
  auto write = [&](int64_t b, int64_t token, int64_t batch, float* from) {
    const int64_t row = b * height, n = least(height, t.rows - row);
    for (int64_t m = 0; m < batch; ++m) {
      float* y = from + m * height;
      if (sums && job.act_bits && job.xzero[token + m] != 0.0f)
        for (int64_t i = 0; i < n; ++i) y[i] -= job.xzero[token + m] * sums[row + i];
      write_floats(y, n, job.y, job.y_type, (token + m) * t.rows + row);
    }
  };
  for (int64_t b = first; b < last;) {
    const int64_t together = c.pair && last - b > 1 ? 2 : 1;
    const uint8_t* block = job.data + HEADER + b * t.block_bytes;
    int64_t done = 0;
    for (; together == 2 && job.m - done >= c.pair_tokens; done += c.pair_tokens) {
      c.pair(job, block, done, out);
      write(b, done, c.pair_tokens, out);
      write(b + 1, done, c.pair_tokens, out + LANES * c.pair_tokens);
    }
    for (const int64_t stop = b + together; b < stop; ++b, block += t.block_bytes) {
      for (int64_t token = done; token < job.m;) {
        const int64_t left = job.m - token;
        const int64_t batch = left >= 8 && c.by8 ? 8 : left >= 4 && c.by4 ? 4 : left >= 2 && c.by2 ? 2 : 1;
        (batch == 8 ? c.by8 : batch == 4 ? c.by4 : batch == 2 ? c.by2 : c.by1)(job, block, token, out);
        write(b, token, batch, out);
        token += batch;
      }
    }
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
