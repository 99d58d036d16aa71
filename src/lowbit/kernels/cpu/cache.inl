// Attention over packed tokens (cache.h). Included after step.inl, under kernel.inl's rules.
//
// Queries meet a tile's codes as they are unpacked; scales and zero points of tokens come after the sum over a group's
// channels, those of blocks go into the queries. Values likewise: a token's scale goes into its probabilities.

// Lane l of out[d]: the value of channel d of token l, in units of the scale.
template <int BITS>
static void unpack_tile(const PackedTokens& t, const uint32_t* words, float* out) {
  constexpr int together = BITS == 6 ? 2 : BITS % 2 ? 1 : BITS;  // of the bits, what divides 32
  constexpr int period = 32 / together, taken = BITS / together;
  constexpr int mask = (1 << BITS) - 1;
  float small[LANES];
  for (int i = 0; i < LANES; ++i) small[i] = t.table ? t.table[i & mask] : static_cast<float>(i & mask);
  const auto table = V::floats(small);
  const auto value = [&](typename V::I code) {  // above the code there may be other bits
    if constexpr (BITS <= 4) return V::lookup(table, code);
    code = V::low(code, mask);
    return t.table ? V::gather(t.table, code) : V::to_float(code);
  };
  int64_t d = 0;
  for (; d + period <= t.dim; d += period, words += taken * LANES) {
    unroll<0, period>([&]<int I>() {
      constexpr int bit = I * BITS, word = bit / 32, shift = bit % 32;
      auto code = V::template right<shift>(V::as_int(V::load(words + word * LANES)));
      if constexpr (shift + BITS > 32)
        code = V::either_int(code, V::template left<32 - shift>(V::as_int(V::load(words + (word + 1) * LANES))));
      V::store(out + (d + I) * LANES, value(code));
    });
  }
  for (int64_t bit = 0; d < t.dim; ++d, bit += BITS) {
    const uint32_t* word = words + bit / 32 * LANES;
    const int shift = static_cast<int>(bit % 32);
    for (int l = 0; l < LANES; ++l) {
      uint32_t code = word[l] >> shift;
      if (shift + BITS > 32) code |= word[l + LANES] << (32 - shift);
      code &= mask;
      out[d * LANES + l] = t.table ? t.table[code] : static_cast<float>(code);
    }
  }
}

static void unpack(const PackedTokens& t, int64_t tile, float* out) {
  const uint32_t* words = t.codes + tile * t.tile_words();
  switch (t.bits) {
    case 1: return unpack_tile<1>(t, words, out);
    case 2: return unpack_tile<2>(t, words, out);
    case 3: return unpack_tile<3>(t, words, out);
    case 4: return unpack_tile<4>(t, words, out);
    case 5: return unpack_tile<5>(t, words, out);
    case 6: return unpack_tile<6>(t, words, out);
    case 7: return unpack_tile<7>(t, words, out);
    default: return unpack_tile<8>(t, words, out);
  }
}

static inline typename V::F lanes_of(const void* numbers, int32_t number, int64_t at) {
  if (number == F16) return V::halves(static_cast<const uint16_t*>(numbers) + at);
  if (number == BF16) return V::bfloats(static_cast<const uint16_t*>(numbers) + at);
  return V::floats(static_cast<const float*>(numbers) + at);
}

// Calls f with a constant number of rows, at most MOST at a time, until all are done.
template <int MOST, class F>
static inline void by_rows(int64_t rows, F&& f) {
  int64_t r = 0;
  for (; r + MOST <= rows; r += MOST) f.template operator()<MOST>(r);
  if constexpr (MOST > 1) {
    if (r < rows) by_rows<MOST - 1>(rows - r, [&]<int ROWS>(int64_t more) { f.template operator()<ROWS>(r + more); });
  }
}

constexpr int CACHE_ROWS = V::products >= 4 ? 4 : V::products >= 2 ? 2 : 1;

// sums[r] = sum over channels of q[r][d] * tile[d]
template <int ROWS>
static inline void tile_scores(const float* q, int64_t pitch, const float* tile, int64_t dim, typename V::F* sum) {
  constexpr int chains = V::products >= 3 * ROWS ? 3 : 1;  // sums that do not wait for each other
  typename V::F some[chains][ROWS];
  for (auto& chain : some)
    for (auto& s : chain) s = V::set(0.0f);
  int64_t d = 0;
  for (; d + chains <= dim; d += chains)
    for (int c = 0; c < chains; ++c) {
      const auto x = V::floats(tile + (d + c) * LANES);
      for (int r = 0; r < ROWS; ++r) some[c][r] = V::fma(V::set(q[r * pitch + d + c]), x, some[c][r]);
    }
  for (; d < dim; ++d)
    for (int r = 0; r < ROWS; ++r) some[0][r] = V::fma(V::set(q[r * pitch + d]), V::floats(tile + d * LANES), some[0][r]);
  for (int r = 0; r < ROWS; ++r) {
    sum[r] = some[0][r];
    for (int c = 1; c < chains; ++c) sum[r] = V::addf(sum[r], some[c][r]);
  }
}

// ---- codes as integers ------------------------------------------------------------------------------------------------

// Whether no code crosses a word and no word has channels of two groups.
static inline bool whole_words(const PackedTokens& t) {
  return 32 % t.bits == 0 && (t.groups == 1 || t.width * t.bits % 32 == 0);
}

// Calls f with the bits of a code, which divide 32, as a constant.
template <class F>
static inline void by_bits(int32_t bits, F&& f) {
  if (bits == 1) f.template operator()<1>();
  else if (bits == 2) f.template operator()<2>();
  else if (bits == 4) f.template operator()<4>();
  else f.template operator()<8>();
}

// A query as integers of 22 bits, which is float32 for all purposes, in three planes of bytes. Bytes lie in the order in which
// words meet them: four codes, 8 / bits channels apart, at a time.
struct IntegerQuery {
  int8_t* plane[3];  // [words * 32 / bits] each, the highest first
  float unit;
};

static inline int64_t plane_of(const PackedTokens& t) { return t.words * 32 / t.bits; }

static inline IntegerQuery query_at(const PackedTokens& t, int8_t* planes, int64_t row) {
  const int64_t n = plane_of(t);
  int8_t* first = planes + 3 * row * n;
  return {{first, first + n, first + 2 * n}, 0.0f};
}

template <int FIELDS>
static inline void reorder(const int8_t* from, int8_t* to) {
  for (int f = 0; f < FIELDS; ++f)
    for (int j = 0; j < 4; ++j) to[f * 4 + j] = from[j * FIELDS + f];
}

template <int BITS>
static void to_integers(const PackedTokens& t, const float* q, float* room, IntegerQuery& out) {
  constexpr int64_t fields = 8 / BITS, channels = 32 / BITS;
  float most = 0;
  int64_t seen = 0;
  if (t.dim >= LANES) {
    auto lanes = V::set(0.0f);
    for (; seen + LANES <= t.dim; seen += LANES) {
      const auto x = V::floats(q + seen);
      lanes = V::max(lanes, V::max(x, V::subf(V::set(0.0f), x)));
    }
    float some[LANES];
    V::store(some, lanes);
    for (float x : some) most = x > most ? x : most;
  }
  for (; seen < t.dim; ++seen) most = __builtin_fabsf(q[seen]) > most ? __builtin_fabsf(q[seen]) : most;
  out.unit = most / 2080768.0f;  // 127 * 2**14
  const float by = most > 0.0f ? 2080768.0f / most : 0.0f;
  int8_t* const plain = reinterpret_cast<int8_t*>(room);  // three planes, channels in order
  const int64_t n = plane_of(t), whole = (n + LANES - 1) / LANES * LANES;
  for (int64_t d = 0; d < n; d += LANES) {
    float some[LANES] = {};
    const bool all = d + LANES <= t.dim;
    for (int64_t i = 0; i < LANES && !all; ++i) some[i] = d + i < t.dim ? q[d + i] : 0.0f;
    auto x = V::round(V::mul(V::floats(all ? q + d : some), V::set(by)));
    const auto high = V::round(V::mul(x, V::set(0x1p-14f)));
    x = V::subf(x, V::mul(high, V::set(0x1p14f)));
    const auto middle = V::round(V::mul(x, V::set(0x1p-7f)));
    V::store_bytes(plain + d, V::to_int(high));
    V::store_bytes(plain + whole + d, V::to_int(middle));
    V::store_bytes(plain + 2 * whole + d, V::to_int(V::subf(x, V::mul(middle, V::set(0x1p7f)))));
  }
  for (int p = 0; p < 3; ++p) {
    const int8_t* from = plain + p * whole;
    if constexpr (BITS == 8) {
      __builtin_memcpy(out.plane[p], from, n);
    } else if constexpr (BITS == 2 || BITS == 4) {
      int64_t w = 0;
      for (; w + 16 <= n; w += 16) {
        using Bytes = int8_t __attribute__((vector_size(16)));
        Bytes x;
        __builtin_memcpy(&x, from + w, 16);
        if constexpr (BITS == 4) x = __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        else x = __builtin_shufflevector(x, x, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        __builtin_memcpy(out.plane[p] + w, &x, 16);
      }
      for (; w < n; w += channels) reorder<fields>(from + w, out.plane[p] + w);
    } else {
      for (int64_t w = 0; w < n; w += channels) reorder<fields>(from + w, out.plane[p] + w);
    }
  }
}

// sum[r] = sum over the channels of `count` words, from `first`, of query r's integers times a tile's codes
template <int BITS, int ROWS>
static inline void integer_scores(const uint32_t* words, int64_t first, int64_t count, const IntegerQuery* q, typename V::F* sum) {
  constexpr int fields = 8 / BITS, mask = (1 << BITS) - 1;
  typename V::I part[3][ROWS];
  for (auto& each : part)
    for (auto& i : each) i = V::izero();
  for (int64_t w = first; w < first + count; ++w) {
    const auto word = V::load(words + w * LANES);
    unroll<0, fields>([&]<int F>() {
      const auto codes = V::template field<F * BITS, mask>(word);
      const int64_t at = (w * fields + F) * 4;
      for (int p = 0; p < 3; ++p)
        for (int r = 0; r < ROWS; ++r) part[p][r] = V::template dot<BITS>(part[p][r], codes, q[r].plane[p] + at);
    });
  }
  for (int r = 0; r < ROWS; ++r) {
    auto all = V::fma(V::to_float(part[1][r]), V::set(0x1p7f), V::to_float(part[2][r]));
    all = V::fma(V::to_float(part[0][r]), V::set(0x1p14f), all);
    sum[r] = V::mul(all, V::set(q[r].unit));
  }
}

// sums[r][channel] += p[tile][r] * the values of the channels of one word of each tile, lane by lane.
template <int BITS, int ROWS>
static inline void mix_word(const PackedTokens& t, const uint32_t* word, const float* p, int64_t p_pitch, int64_t count,
                            float* sums, int64_t pitch) {
  constexpr int channels = 32 / BITS, room = V::pairs ? 24 : V::products, fit = room / ROWS > 0 ? room / ROWS : 1;
  constexpr int some = fit >= channels ? channels : fit >= 8 && channels % 8 == 0 ? 8 : fit >= 4 && channels % 4 == 0 ? 4 : fit >= 2 ? 2 : 1;
  constexpr int mask = (1 << BITS) - 1;
  float small[LANES];
  for (int i = 0; i < LANES; ++i) small[i] = t.table ? t.table[i & mask] : static_cast<float>(i & mask);
  const auto table = V::floats(small);
  unroll<0, channels / some>([&]<int PART>() {
    typename V::F sum[ROWS][some];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < some; ++c) sum[r][c] = V::floats(sums + r * pitch + (PART * some + c) * LANES);
    for (int64_t n = 0; n < count; ++n) {
      const auto codes = V::as_int(V::load(word + n * t.tile_words()));
      typename V::F weight[ROWS];
      for (int r = 0; r < ROWS; ++r) weight[r] = V::floats(p + n * p_pitch + r * LANES);
      unroll<0, some>([&]<int C>() {
        const auto code = V::template right<(PART * some + C) * BITS>(codes);
        typename V::F x;
        if constexpr (BITS <= 4) x = V::lookup(table, code);
        else x = V::to_float(V::low(code, mask));
        for (int r = 0; r < ROWS; ++r) sum[r][C] = V::fma(weight[r], x, sum[r][C]);
      });
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < some; ++c) V::store(sums + r * pitch + (PART * some + c) * LANES, sum[r][c]);
  });
}

// ---- scores -----------------------------------------------------------------------------------------------------------

// scores [rows, pitch] from `at` on; writes up to LANES beyond the last.
static void scores_of_tokens(const CacheAttention& a, float* scores, int64_t pitch, int64_t at, float* sums, float* tile,
                             int8_t* planes) {
  const PackedTokens& t = a.keys.packed;
  const bool shifts = t.zero != nullptr || t.middle != 0.0f;
  for (int64_t r = 0; r < a.rows && shifts; ++r)
    for (int64_t g = 0; g < t.groups; ++g) {
      float sum = 0;
      for (int64_t d = g * t.width; d < least(t.dim, (g + 1) * t.width); ++d) sum += a.packed_q[r * t.dim + d];
      sums[r * t.groups + g] = sum;
    }
  const bool integers = whole_words(t) && !t.table;
  IntegerQuery query[CACHE_QUERIES];
  for (int64_t r = 0; r < a.rows && integers; ++r) {
    query[r] = query_at(t, planes, r);
    by_bits(t.bits, [&]<int BITS>() { to_integers<BITS>(t, a.packed_q + r * t.dim, tile, query[r]); });
  }
  for (int64_t first = 0; first < t.length; first += LANES) {
    const int64_t number = first / LANES;
    if (!integers) unpack(t, number, tile);
    by_rows<CACHE_ROWS>(a.rows, [&]<int ROWS>(int64_t r) {
      typename V::F total[ROWS], sum[ROWS];
      for (int i = 0; i < ROWS; ++i) total[i] = V::set(a.constant ? a.constant[r + i] : 0.0f);
      for (int64_t g = 0; g < t.groups; ++g) {
        const int64_t d = g * t.width, params = (number * t.groups + g) * LANES;
        if (integers) {
          const int64_t word = d * t.bits / 32, count = t.groups == 1 ? t.words : least(t.width * t.bits / 32, t.words - word);
          by_bits(t.bits, [&]<int BITS>() {
            integer_scores<BITS, ROWS>(t.codes + number * t.tile_words(), word, count, query + r, sum);
          });
        } else {
          tile_scores<ROWS>(a.packed_q + r * t.dim + d, t.dim, tile + d * LANES, least(t.width, t.dim - d), sum);
        }
        const auto scale = lanes_of(t.scale, t.number, params);
        const auto zero = t.zero ? lanes_of(t.zero, t.number, params) : V::set(t.middle);
        for (int i = 0; i < ROWS; ++i) {
          if (shifts) sum[i] = V::subf(sum[i], V::mul(zero, V::set(sums[(r + i) * t.groups + g])));
          total[i] = V::fma(sum[i], scale, total[i]);
        }
      }
      for (int i = 0; i < ROWS; ++i) V::store(scores + (r + i) * pitch + at + first, total[i]);
    });
  }
}

static void scores_of_blocks(const CacheAttention& a, float* scores, int64_t pitch, int64_t at, float* scaled, float* constant,
                             float* tile, int8_t* planes) {
  const PackedTokens& t = a.keys.packed;
  const bool integers = 32 % t.bits == 0 && !t.table;  // scales are in the queries: groups do not matter
  IntegerQuery query[CACHE_QUERIES];
  float scale[LANES], zero[LANES];
  for (int64_t b = 0; b < t.blocks; ++b) {
    for (int64_t r = 0; r < a.rows; ++r) constant[r] = a.constant ? a.constant[r] : 0.0f;
    int64_t d = 0;
    if (t.width == 1)
      for (; d + LANES <= t.dim; d += LANES) {
        const auto by = lanes_of(t.scale, t.number, b * t.groups + d);
        const auto from = t.zero ? lanes_of(t.zero, t.number, b * t.groups + d) : V::set(t.middle);
        for (int64_t r = 0; r < a.rows; ++r) {
          const auto x = V::mul(V::floats(a.packed_q + r * t.dim + d), by);
          V::store(scaled + r * t.dim + d, x);
          constant[r] -= V::total(V::mul(x, from));
        }
      }
    while (d < t.dim) {  // scales of up to LANES channels at a time
      const int64_t n = t.width == 1 ? least(LANES, t.dim - d) : least(t.width, t.dim - d), param = b * t.groups + d / t.width;
      read_floats(t.scale, t.number, param, t.width == 1 ? n : 1, scale);
      if (t.zero) read_floats(t.zero, t.number, param, t.width == 1 ? n : 1, zero);
      for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t i = 0; i < n; ++i) {
          const int64_t p = t.width == 1 ? i : 0;
          const float by = a.packed_q[r * t.dim + d + i] * scale[p];
          scaled[r * t.dim + d + i] = by;
          constant[r] -= by * (t.zero ? zero[p] : t.middle);
        }
      d += n;
    }
    for (int64_t r = 0; r < a.rows && integers; ++r) {
      query[r] = query_at(t, planes, r);
      by_bits(t.bits, [&]<int BITS>() { to_integers<BITS>(t, scaled + r * t.dim, tile, query[r]); });
    }
    for (int64_t in = 0; in < t.counts[b]; in += LANES) {
      const int64_t number = b * t.block_tiles() + in / LANES;
      if (!integers) unpack(t, number, tile);
      by_rows<CACHE_ROWS>(a.rows, [&]<int ROWS>(int64_t r) {
        typename V::F sum[ROWS];
        if (integers) {
          by_bits(t.bits, [&]<int BITS>() {
            integer_scores<BITS, ROWS>(t.codes + number * t.tile_words(), 0, t.words, query + r, sum);
          });
        } else {
          tile_scores<ROWS>(scaled + r * t.dim, t.dim, tile, t.dim, sum);
        }
        for (int i = 0; i < ROWS; ++i) V::store(scores + (r + i) * pitch + at + in, V::addf(sum[i], V::set(constant[r + i])));
      });
    }
    at += t.counts[b];
  }
}

// to[d] = sum over e of rotation[d][e] * from[e], of tiles
static void rotate_tile(const float* rotation, const float* from, int64_t dim, float* to) {
  constexpr int together = 8;
  int64_t d = 0;
  const auto some = [&]<int SOME>() {
    typename V::F sum[SOME];
    for (auto& s : sum) s = V::set(0.0f);
    for (int64_t e = 0; e < dim; ++e) {
      const auto x = V::floats(from + e * LANES);
      for (int i = 0; i < SOME; ++i) sum[i] = V::fma(V::set(rotation[(d + i) * dim + e]), x, sum[i]);
    }
    for (int i = 0; i < SOME; ++i) V::store(to + (d + i) * LANES, sum[i]);
    d += SOME;
  };
  while (d + together <= dim) some.template operator()<together>();
  while (d < dim) some.template operator()<1>();
}

// The keys of a tile, whose first token has the number `token` among the packed ones, as the model computes them. `rotated`: room.
static void turned_tile(const PackedTokens& t, const Turning& turning, int64_t number, int64_t block, int64_t token, float* tile,
                        float* rotated) {
  unpack(t, number, tile);
  float scales[LANES], zeros[LANES];  // of as many groups of a block
  for (float& zero : zeros) zero = t.middle;
  for (int64_t g = 0; g < t.groups; ++g) {
    typename V::F scale, zero;
    if (t.rows > 1) {
      const int64_t i = g % LANES, n = least(LANES, t.groups - g);
      if (i == 0) {
        read_floats(t.scale, t.number, block * t.groups + g, n, scales);
        if (t.zero) read_floats(t.zero, t.number, block * t.groups + g, n, zeros);
      }
      scale = V::set(scales[i]), zero = V::set(zeros[i]);
    } else {
      const int64_t params = (number * t.groups + g) * LANES;
      scale = lanes_of(t.scale, t.number, params);
      zero = t.zero ? lanes_of(t.zero, t.number, params) : V::set(t.middle);
    }
    for (int64_t d = g * t.width; d < least(t.dim, (g + 1) * t.width); ++d)
      V::store(tile + d * LANES, V::mul(V::subf(V::floats(tile + d * LANES), zero), scale));
  }
  if (turning.rotation) {
    rotate_tile(turning.rotation, tile, t.dim, rotated);
    __builtin_memcpy(tile, rotated, t.dim * LANES * sizeof(float));
  }
  for (int64_t d = 0; d < t.dim && (turning.scale || turning.shift); ++d) {
    const auto by = V::set(turning.scale ? turning.scale[d] : 1.0f), more = V::set(turning.shift ? turning.shift[d] : 0.0f);
    V::store(tile + d * LANES, V::fma(V::floats(tile + d * LANES), by, more));
  }
  const int64_t at = turning.position + token;
  for (int64_t d = 0; d < turning.turned; ++d) {
    const auto cos = V::floats(turning.cos + d * turning.room + at), sin = V::floats(turning.sin + d * turning.room + at);
    float *first = tile + d * LANES, *second = tile + (d + turning.turned) * LANES;
    const auto x = V::floats(first), y = V::floats(second);
    V::store(first, V::subf(V::mul(x, cos), V::mul(y, sin)));
    V::store(second, V::fma(x, sin, V::mul(y, cos)));
  }
}

static void scores_of_turned(const CacheAttention& a, float* scores, int64_t pitch, int64_t at, float* tile, float* rotated) {
  const PackedTokens& t = a.keys.packed;
  const bool blocks = t.rows > 1;
  int64_t token = 0;
  for (int64_t b = 0; b < (blocks ? t.blocks : 1); ++b) {
    const int64_t count = blocks ? t.counts[b] : t.length;
    for (int64_t in = 0; in < count; in += LANES) {
      const int64_t number = (blocks ? b * t.block_tiles() : 0) + in / LANES;
      turned_tile(t, a.turning, number, b, token + in, tile, rotated);
      by_rows<CACHE_ROWS>(a.rows, [&]<int ROWS>(int64_t r) {
        typename V::F sum[ROWS];
        tile_scores<ROWS>(a.q + r * t.dim, t.dim, tile, t.dim, sum);
        for (int i = 0; i < ROWS; ++i) V::store(scores + (r + i) * pitch + at + token + in, sum[i]);
      });
    }
    token += count;
  }
}

static void scores_of_floats(const CacheAttention& a, const FloatTokens& t, float* scores, int64_t pitch, int64_t at, float* row) {
  const int64_t dim = a.keys.packed.dim;
  for (int64_t i = 0; i < t.length; ++i) {
    const float* key = float_row(t.data, a.keys.type, i * dim, dim, row);
    for (int64_t r = 0; r < a.rows; ++r) scores[r * pitch + at + i] = dot_floats(a.q + r * dim, key, dim);
  }
}

static inline float sum_of(const float* s, int64_t n) {
  auto even = V::set(0.0f), odd = V::set(0.0f);
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    even = V::addf(even, V::floats(s + i));
    odd = V::addf(odd, V::floats(s + i + LANES));
  }
  float sum = V::total(V::addf(even, odd));
  for (; i < n; ++i) sum += s[i];
  return sum;
}

static inline float most_of(const float* s, int64_t n) {
  auto most = V::set(-__builtin_inff());
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) most = V::max(most, V::floats(s + i));
  float lanes[LANES], found = -__builtin_inff();
  V::store(lanes, most);
  for (float x : lanes) found = x > found ? x : found;
  for (; i < n; ++i) found = s[i] > found ? s[i] : found;
  return found;
}

// Probabilities in place; keys that a query does not see get 0. The logarithm of what they were divided by is `most` + log(`total`).
static void soften(float* s, int64_t begin, int64_t end, int64_t length, float* most_seen, float* total) {
  begin = begin < 0 ? 0 : begin;
  end = least(end, length);
  for (int64_t i = 0; i < least(begin, length); ++i) s[i] = 0.0f;
  for (int64_t i = end < begin ? begin : end; i < length; ++i) s[i] = 0.0f;
  *most_seen = -__builtin_inff();
  *total = 0.0f;
  if (begin >= end) return;
  const float most = most_of(s + begin, end - begin);  // of numbers; what is not a number remains none, and so does the sum
  for (int64_t i = begin; i < end; ++i) s[i] = exponential(s[i] - most);
  *most_seen = most;
  *total = sum_of(s + begin, end - begin);
  const float by = 1.0f / *total;
  for (int64_t i = begin; i < end; ++i) s[i] *= by;
}

// sums[r][d] += p[tile][r] * tiles[tile][d], lane by lane, for channels that share a scale.
template <int ROWS>
static inline void mix_tiles(const float* tiles, int64_t tile_pitch, const float* p, int64_t p_pitch, int64_t count, int64_t dim,
                             float* sums, int64_t pitch) {
  constexpr int some = V::products / ROWS > 0 ? V::products / ROWS : 1;
  const auto channels = [&]<int SOME>(int64_t d) {
    typename V::F sum[ROWS][SOME];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < SOME; ++c) sum[r][c] = V::floats(sums + r * pitch + (d + c) * LANES);
    for (int64_t n = 0; n < count; ++n) {
      typename V::F x[SOME];
      for (int c = 0; c < SOME; ++c) x[c] = V::floats(tiles + n * tile_pitch + (d + c) * LANES);
      for (int r = 0; r < ROWS; ++r) {
        const auto weight = V::floats(p + n * p_pitch + r * LANES);
        for (int c = 0; c < SOME; ++c) sum[r][c] = V::fma(weight, x[c], sum[r][c]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < SOME; ++c) V::store(sums + r * pitch + (d + c) * LANES, sum[r][c]);
  };
  int64_t d = 0;
  for (; d + some <= dim; d += some) channels.template operator()<some>(d);
  for (; d < dim; ++d) channels.template operator()<1>(d);
}

static void mix_packed(const CacheAttention& a, const float* probabilities, int64_t pitch, float* tiles, float* scaled, float* sums,
                       float* zeros) {
  const PackedTokens& t = a.values.packed;
  const bool shifts = t.zero != nullptr || t.middle != 0.0f;
  const bool words = whole_words(t) && (t.bits <= 4 || !t.table);
  const int64_t dim = t.dim + 32;  // a word may end beyond the last channel
  for (int64_t i = 0; i < a.rows * dim * LANES; ++i) sums[i] = 0.0f;
  for (int64_t i = 0; i < a.rows * t.groups * LANES; ++i) zeros[i] = 0.0f;
  const int64_t tile_pitch = t.dim * LANES;
  for (int64_t first = 0; first < t.length; first += CACHE_TILES * LANES) {
    const int64_t count = least(CACHE_TILES, (t.length - first + LANES - 1) / LANES), number = first / LANES;
    for (int64_t n = 0; n < count && !words; ++n) unpack(t, number + n, tiles + n * tile_pitch);
    for (int64_t g = 0; g < t.groups; ++g) {
      for (int64_t n = 0; n < count; ++n) {
        const int64_t params = ((number + n) * t.groups + g) * LANES, at = first + n * LANES, held = least(LANES, t.length - at);
        const auto scale = lanes_of(t.scale, t.number, params);
        const auto zero = t.zero ? lanes_of(t.zero, t.number, params) : V::set(t.middle);
        for (int64_t r = 0; r < a.rows; ++r) {
          const float* p = probabilities + r * pitch + at;
          float some[LANES];
          if (held < LANES) {
            for (int64_t l = 0; l < LANES; ++l) some[l] = l < held ? p[l] : 0.0f;
            p = some;
          }
          const auto weight = V::mul(V::floats(p), scale);
          V::store(scaled + (n * a.rows + r) * LANES, weight);
          float* shift = zeros + (r * t.groups + g) * LANES;
          if (shifts) V::store(shift, V::fma(weight, zero, V::floats(shift)));
        }
      }
      const int64_t d = g * t.width;
      by_rows<CACHE_ROWS>(a.rows, [&]<int ROWS>(int64_t r) {
        if (words) {
          by_bits(t.bits, [&]<int BITS>() {
            constexpr int64_t channels = 32 / BITS;
            for (int64_t c = d; c < least(t.dim, d + t.width); c += channels)
              mix_word<BITS, ROWS>(t, t.codes + number * t.tile_words() + c / channels * LANES, scaled + r * LANES, a.rows * LANES, count,
                                   sums + (r * dim + c) * LANES, dim * LANES);
          });
          return;
        }
        mix_tiles<ROWS>(tiles + d * LANES, tile_pitch, scaled + r * LANES, a.rows * LANES, count, least(t.width, t.dim - d),
                        sums + (r * dim + d) * LANES, dim * LANES);
      });
    }
  }
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t d = 0; d < t.dim; ++d) {
      const float shift = shifts ? V::total(V::floats(zeros + (r * t.groups + d / t.width) * LANES)) : 0.0f;
      a.packed_out[r * t.dim + d] = V::total(V::floats(sums + (r * dim + d) * LANES)) - shift;
    }
}

static void mix_floats(const CacheAttention& a, const FloatTokens& t, const float* probabilities, int64_t pitch, int64_t at,
                       float* row) {
  const int64_t dim = a.values.packed.dim;
  for (int64_t i = 0; i < t.length; ++i) {
    const float* value = float_row(t.data, a.values.type, i * dim, dim, row);
    for (int64_t r = 0; r < a.rows; ++r) {
      const float p = probabilities[r * pitch + at + i];
      for (int64_t d = 0; d < dim; ++d) a.out[r * dim + d] += p * value[d];
    }
  }
}

static void attend_cache(const CacheAttention& a) {
  const CacheSide &k = a.keys, &v = a.values;
  const int64_t length = k.length(), pitch = length + 2 * LANES, most = k.packed.groups > v.packed.groups ? k.packed.groups : v.packed.groups;
  float* scores = a.room;
  float* queries = scores + a.rows * pitch;
  float* sums = queries + a.rows * k.packed.dim;
  float* tiles = sums + a.rows * (most + 1);
  float* scaled = tiles + CACHE_TILES * ((k.packed.dim > v.packed.dim ? k.packed.dim : v.packed.dim) + 32) * LANES;
  float* mixtures = scaled + CACHE_TILES * a.rows * LANES;
  float* zeros = mixtures + a.rows * (v.packed.dim + 32) * LANES;
  float* row = zeros + a.rows * v.packed.groups * LANES;
  auto* planes = reinterpret_cast<int8_t*>(row + (k.packed.dim > v.packed.dim ? k.packed.dim : v.packed.dim) + 2 * LANES);
  // In this order, because packed scores are written in whole tiles.
  scores_of_floats(a, k.kept, scores, pitch, 0, row);
  if (k.packed.length && a.turning.cos) scores_of_turned(a, scores, pitch, k.kept.length, tiles, tiles + (k.packed.dim + 32) * LANES);
  else if (k.packed.length && k.packed.rows > 1) scores_of_blocks(a, scores, pitch, k.kept.length, queries, sums, tiles, planes);
  else if (k.packed.length) scores_of_tokens(a, scores, pitch, k.kept.length, sums, tiles, planes);
  scores_of_floats(a, k.waiting, scores, pitch, k.kept.length + k.packed.length, row);
  const int64_t packed = v.kept.length, waiting = packed + v.packed.length;
  for (int64_t r = 0; r < a.rows; ++r) {
    soften(scores + r * pitch, a.begin[r], a.end[r], length, a.most + r, a.total + r);
    a.weight[r] = sum_of(scores + r * pitch + packed, waiting - packed);
  }
  for (int64_t i = 0; i < a.rows * v.packed.dim; ++i) a.out[i] = a.packed_out[i] = 0.0f;
  mix_floats(a, v.kept, scores, pitch, 0, row);
  if (v.packed.length) mix_packed(a, scores + packed, pitch, tiles, scaled, mixtures, zeros);
  mix_floats(a, v.waiting, scores, pitch, waiting, row);
}

static void decode_slots(const PackedTokens& t, int64_t tile, float* out, float* room) {
  unpack(t, tile, room);
  for (int64_t g = 0; g < t.groups; ++g) {
    const bool blocks = t.rows > 1;
    const int64_t params = blocks ? tile / t.block_tiles() * t.groups + g : (tile * t.groups + g) * LANES;
    float one_scale = 0, one_zero = t.middle;
    if (blocks) {
      read_floats(t.scale, t.number, params, 1, &one_scale);
      if (t.zero) read_floats(t.zero, t.number, params, 1, &one_zero);
    }
    const auto scale = blocks ? V::set(one_scale) : lanes_of(t.scale, t.number, params);
    const auto zero = blocks || !t.zero ? V::set(one_zero) : lanes_of(t.zero, t.number, params);
    for (int64_t d = g * t.width; d < least(t.dim, (g + 1) * t.width); ++d) {
      float value[LANES];
      V::store(value, V::mul(V::subf(V::floats(room + d * LANES), zero), scale));
      for (int64_t l = 0; l < LANES; ++l) out[l * t.dim + d] = value[l];
    }
  }
}

// ---- packing ----------------------------------------------------------------------------------------------------------

static inline void write_number(void* numbers, int32_t number, int64_t at, float x, float* stored) {
  write_floats(&x, 1, numbers, number, at);
  read_floats(numbers, number, at, 1, stored);
}

// The range of `count` numbers, `step` apart, as Int.from_range places it, stored at `at`; their codes to `codes`.
static bool pack_range(const PackedTokens& t, const float* x, int64_t step, int64_t count, int64_t inner, int64_t inner_step, int64_t at,
                       bool symmetric, bool whole, uint8_t* codes) {
  const float most = static_cast<float>((1 << t.bits) - 1);
  float low = x[0], high = x[0];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < inner; ++j) {
      const float y = x[i * step + j * inner_step];
      low = y < low || y != y ? y : low;
      high = y > high || y != y ? y : high;
    }
  float scale, zero = t.middle;
  if (symmetric) {
    const float largest = __builtin_fabsf(low) > __builtin_fabsf(high) ? __builtin_fabsf(low) : __builtin_fabsf(high);
    scale = t.bits == 1 ? largest * 2.0f : largest / static_cast<float>(((1 << t.bits) - 1) / 2);
    if (!(scale > 0.0f)) scale = largest != largest ? largest : 0x1p-100f;
  } else {
    if (whole) {
      low = low > 0.0f ? 0.0f : low;
      high = high < 0.0f ? 0.0f : high;
    }
    scale = (high - low) / most;
    const float largest = __builtin_fabsf(low) > __builtin_fabsf(high) ? __builtin_fabsf(low) : __builtin_fabsf(high);
    if (scale <= (whole ? 0.0f : largest * 0x1p-15f)) scale = high != 0.0f ? __builtin_fabsf(high) : 0x1p-100f;
    zero = -low / scale;
    if (whole) zero = __builtin_rintf(zero) < 0.0f ? 0.0f : __builtin_rintf(zero) > most ? most : __builtin_rintf(zero);
  }
  float kept;
  write_number(t.scale, t.number, at, scale, &kept);
  const float least_scale = t.number == F16 ? 0x1p-24f : 0x1p-126f;  // the smallest that storage holds
  if (__builtin_fabsf(kept) < least_scale) write_number(t.scale, t.number, at, least_scale, &kept);
  scale = kept;
  if (!symmetric) {
    if (whole) write_number(t.zero, t.number, at, zero, &kept);
    else write_number(t.zero, t.number, at, zero, &zero);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < inner; ++j) {
      const float y = x[i * step + j * inner_step] / scale;
      float level = !symmetric && whole ? __builtin_rintf(y) + zero : __builtin_rintf(y + zero);
      level = level < 0.0f ? 0.0f : level > most ? most : level;
      codes[i * step + j * inner_step] = level == level ? static_cast<uint8_t>(level) : 0;
    }
  return scale - scale == 0.0f && zero - zero == 0.0f;
}

static void put_codes(const PackedTokens& t, int64_t slot, const uint8_t* codes) {
  uint32_t* word = t.codes + slot / LANES * t.tile_words() + slot % LANES;
  for (int64_t w = 0; w < t.words; ++w) word[w * LANES] = 0;
  for (int64_t d = 0, bit = 0; d < t.dim; ++d, bit += t.bits) {
    const uint32_t code = codes[d];
    word[bit / 32 * LANES] |= code << bit % 32;
    if (bit % 32 + t.bits > 32) word[(bit / 32 + 1) * LANES] |= code >> (32 - bit % 32);
  }
}

static bool pack_tokens(const PackedTokens& t, const float* x, int64_t count, bool symmetric, bool whole, float* room) {
  auto* codes = reinterpret_cast<uint8_t*>(room);  // [rows of a block, dim]
  bool finite = true;
  for (int64_t n = 0; n < count; n += t.rows) {
    const float* from = x + n * t.dim;
    int64_t slot = t.length + n;
    if (t.rows > 1) {
      const int64_t block = t.blocks + n / t.rows;
      for (int64_t g = 0; g < t.groups; ++g)
        finite &= pack_range(t, from + g * t.width, t.dim, t.rows, least(t.width, t.dim - g * t.width), 1, block * t.groups + g, symmetric, whole,
                   codes + g * t.width);
      slot = block * t.block_tiles() * LANES;
    } else {
      for (int64_t g = 0; g < t.groups; ++g)
        finite &= pack_range(t, from + g * t.width, t.dim, 1, least(t.width, t.dim - g * t.width), 1,
                   (slot / LANES * t.groups + g) * LANES + slot % LANES, symmetric, whole, codes + g * t.width);
    }
    for (int64_t i = 0; i < t.rows; ++i) put_codes(t, slot + i, codes + i * t.dim);
  }
  return finite;
}

static constexpr CacheKernels cache_kernels{attend_cache, decode_slots, pack_tokens};
