// What products by lanes (kernel.inl) and products by matrix tiles (amx.cpp) share: codes of a chunk, numbers in and out, and
// the input as integers. As everything here, it stands in its includer's namespace and knows V only.

// Codes are asked for so many bytes ahead, into the second-level cache: memory answers late, and few bits are used up
// quickly. Measured in turns at 4096x4096 on two processors: from 6 KB to 24 KB nothing changes down to 2 bits, and 1 bit
// loses a fifth where that is more than a block; 1.5 KB ahead into the first level loses up to a fifth at 1 and 2 bits.
constexpr int64_t AHEAD = 6144;

// Parameters lie apart from codes and are asked for a block ahead, a group at a time.
static inline void ask_for(const uint8_t* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) V::prefetch(p + at);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- codes ----------------------------------------------------------------------------------------------------------

// Quad Q of a chunk: 16 rows by 4 columns of codes, a byte each.
template <int BITS, int Q>
static inline typename V::B codes(const uint8_t* chunk) {
  if constexpr (BITS == 8) {
    return V::load(chunk + 64 * Q);
  } else {
    typename V::B v{};
    constexpr int fours = BITS & 4, twos = BITS & 2, ones = BITS & 1;
    if constexpr (fours != 0) v = V::template field<4 * (Q % 2), 0x0f>(V::load(chunk + 64 * (Q / 2)));
    if constexpr (twos != 0) {
      constexpr int at = fours;  // bits below
      auto w = V::template field<2 * (Q % 4) - at, 3 << at>(V::load(chunk + 256 * (fours / 4) + 64 * (Q / 4)));
      v = at ? V::either(v, w) : w;
    }
    if constexpr (ones != 0) {
      constexpr int at = fours + twos;
      auto w = V::template field<Q - at, 1 << at>(V::load(chunk + 256 * (fours / 4) + 128 * (twos / 2)));
      v = at ? V::either(v, w) : w;
    }
    return v;
  }
}

// Plane P of a binary-coded chunk, bits apart.
template <int Q>
static inline typename V::B sign_bits(const uint8_t* unit) {
  return V::template field<Q, 1>(V::load(unit));
}

template <int FIRST, int LAST, class F>
static inline void unroll(F&& f) {
  if constexpr (FIRST < LAST) {
    f.template operator()<FIRST>();
    unroll<FIRST + 1, LAST>(f);
  }
}

// Sixteen numbers of one kind, one a row.
static inline typename V::F numbers(const uint8_t* p, int32_t number) {
  if (number == F16) return V::halves(reinterpret_cast<const uint16_t*>(p));
  if (number == F32) return V::floats(reinterpret_cast<const float*>(p));
  return V::bytes(p);
}

template <int BITS>
static inline typename V::F looked_up(typename V::F low, const float* table, typename V::I index) {
  if constexpr (BITS <= 4) return V::lookup(low, index);
  return V::gather(table, index);
}

// ---- numbers in and out -----------------------------------------------------------------------------------------------

static inline float from_bits(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

static inline uint32_t to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

// To nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bfloat(float x) {
  const uint32_t u = to_bits(x);
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline void read_floats(const void* source, int32_t type, int64_t offset, int64_t n, float* out) {
  if (type == F32) {
    __builtin_memcpy(out, static_cast<const float*>(source) + offset, n * 4);
  } else if (type == BF16) {
    auto p = static_cast<const uint16_t*>(source) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = from_bits(static_cast<uint32_t>(p[i]) << 16);
  } else {
    auto p = static_cast<const uint16_t*>(source) + offset;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) V::store(out + i, V::halves(p + i));
    if (i < n) {
      uint16_t rest[LANES] = {};
      float values[LANES];
      __builtin_memcpy(rest, p + i, (n - i) * 2);
      V::store(values, V::halves(rest));
      __builtin_memcpy(out + i, values, (n - i) * 4);
    }
  }
}

static inline void write_floats(const float* source, int64_t n, void* target, int32_t type, int64_t offset) {
  if (type == F32) {
    __builtin_memcpy(static_cast<float*>(target) + offset, source, n * 4);
  } else if (type == BF16) {
    auto p = static_cast<uint16_t*>(target) + offset;
    for (int64_t i = 0; i < n; ++i) p[i] = to_bfloat(source[i]);
  } else {
    auto p = static_cast<uint16_t*>(target) + offset;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) V::store_halves(p + i, V::floats(source + i));
    if (i < n) {
      float values[LANES] = {};
      uint16_t rest[LANES];
      __builtin_memcpy(values, source + i, (n - i) * 4);
      V::store_halves(rest, V::floats(values));
      __builtin_memcpy(p + i, rest, (n - i) * 2);
    }
  }
}

// ---- the input --------------------------------------------------------------------------------------------------------

// Integers of one segment: digits of base 256 from -128 to 127, the least first, planes apart; their sum is returned.
template <int D>
static inline float integers(const float* x, int64_t n, float inverse, float low, float high, float shift, int8_t* q,
                             int64_t plane) {
  auto sum = V::izero();
  const auto by = V::set(inverse);
  for (int64_t i = 0; i < n; i += LANES) {
    auto v = V::to_int(V::clamp(V::mul(V::floats(x + i), by), low, high));
    if constexpr (D == 1) {
      (void)shift;
      V::store_bytes(q + i, v);
      sum = V::add(sum, v);
    } else {
      sum = V::add(sum, v);
      for (int d = 0; d < D; ++d) {
        auto digit = V::signed_byte(v);
        V::store_bytes(q + d * plane + i, digit);
        v = V::next_byte(V::sub(v, digit));
      }
    }
  }
  return V::total(V::to_float(sum));
}

struct Extremes {
  float low, high;
  bool finite;
};

static inline Extremes extremes(const float* x, int64_t n) {
  auto low = V::set(0.0f), high = V::set(0.0f), nothing = V::set(0.0f);
  for (int64_t i = 0; i < n; i += LANES) {
    auto v = V::floats(x + i);
    low = V::min(low, v);
    high = V::max(high, v);
    nothing = V::fma(v, V::set(0.0f), nothing);  // NaN where x is NaN or infinite
  }
  float lows[LANES], highs[LANES];
  V::store(lows, low);
  V::store(highs, high);
  Extremes e{0.0f, 0.0f, V::total(nothing) == 0.0f};
  for (int i = 0; i < LANES; ++i) {
    if (lows[i] < e.low) e.low = lows[i];
    if (highs[i] > e.high) e.high = highs[i];
  }
  return e;
}

// The scale and zero point of the recipe, fitted as lowbit.numerics.Int fits them.
static inline void fit(const Extremes& e, int bits, bool symmetric, float* scale, float* zero) {
  const float most = static_cast<float>((1 << bits) - 1);
  const float nothing = 7.888609052210118e-31f;  // 2**-100
  if (symmetric) {
    const float absmax = -e.low > e.high ? -e.low : e.high;
    *scale = absmax / static_cast<float>(((1 << bits) - 1) / 2);
    *zero = static_cast<float>(1 << (bits - 1));
    if (!(*scale > 0)) *scale = nothing;
  } else {
    *scale = (e.high - e.low) / most;
    if (!(*scale > 0)) *scale = nothing;
    const float z = __builtin_rintf(-e.low / *scale);
    *zero = z < 0 ? 0 : z > most ? most : z;
  }
}

template <int D>
static inline void prepare_dynamic(const Job& job, int64_t token, const float* x, int8_t* q) {
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols(), segments = t.group_segments();
  const float most = D == 1 ? 127.0f : 127.0f * 65536.0f;
  for (int64_t g = 0; g < t.groups; ++g) {
    float sum = 0;
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t begin = g * t.padded + s * t.segment(), n = least(t.segment(), (g + 1) * t.padded - begin);
      const Extremes e = extremes(x + begin, n);
      const float absmax = -e.low > e.high ? -e.low : e.high;
      float scale = absmax / most;
      const bool tiny = !(scale > 1e-37f);  // its inverse would overflow: such a segment is zero next to anything
      if (tiny) scale = 0.0f;
      const float total = integers<D>(x + begin, n, tiny ? 0.0f : 1.0f / scale, -most, most, 0.0f, q + begin, plane);
      if (!e.finite) scale = __builtin_nanf("");
      job.xs[token * t.segments() + g * segments + s] = scale;
      sum += scale * total;
    }
    job.xsum[token * t.groups + g] = sum;
  }
  job.xzero[token] = 0.0f;
}

// x / by, clamped far beyond any code. Division is several times slower than its correction by a fused product: that is as
// exact as long as nothing under- or overflows.
static inline typename V::F quotient(typename V::F x, typename V::F by, typename V::F inverse) {
  const auto near = V::clamp(V::mul(x, inverse), -1048576.0f, 1048576.0f);
  return V::fma(V::fma(V::mul(near, V::set(-1.0f)), by, x), inverse, near);
}

// As the recipe says: code = clamp(round(x / scale) + zero); what is multiplied is the code minus the middle one.
static inline void prepare_static(const Job& job, int64_t token, const float* x, int8_t* q) {
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols(), segments = t.group_segments();
  const float middle = static_cast<float>(1 << (job.act_bits - 1)), most = static_cast<float>((1 << job.act_bits) - 1);
  float scale, zero;
  const Extremes e = extremes(x, plane);
  if (job.act_scale != nullptr) {
    const int64_t at = job.act_shared ? 0 : token;
    scale = job.act_scale[at];
    zero = job.act_zero != nullptr ? job.act_zero[at] : middle;
  } else {
    fit({e.low * job.act_reach, e.high * job.act_reach, e.finite}, job.act_bits, job.act_symmetric, &scale, &zero);
  }
  // A given range clips infinity; of a fitted one it leaves nothing. NaN stays NaN.
  bool known = e.finite;
  if (!known && job.act_scale != nullptr) {
    known = true;
    for (int64_t i = 0; i < plane; ++i) known = known && x[i] == x[i];
  }
  const float kept = known ? scale : __builtin_nanf("");
  // Where the zero is the middle it is added before rounding, as the reference does: it matters at ties.
  const auto by = V::set(scale), inverse = V::set(1.0f / scale), before = V::set(job.act_symmetric ? middle : 0.0f);
  const bool quick = V::fuses && scale > 1e-31f && scale < 1e31f;
  const auto after = V::set(job.act_symmetric ? -middle : zero - middle);
  for (int64_t g = 0; g < t.groups; ++g) {
    auto sum = V::izero();
    const int64_t columns = least(t.group, t.cols - g * t.group);
    int8_t* out = q + g * t.padded;
    for (int64_t i = 0; i < t.padded; i += LANES) {
      const auto value = V::floats(x + g * t.padded + i), ratio = quick ? quotient(value, by, inverse) : V::div(value, by);
      auto level = V::addf(V::round(V::addf(ratio, before)), after);
      auto v = V::to_int(V::clamp(level, -middle, most - middle));
      V::store_bytes(out + i, v);
      sum = V::add(sum, v);
    }
    // Columns that only fill up are zero, not the code of zero.
    float excess = 0;
    for (int64_t i = columns; i < t.padded; ++i) {
      excess += out[i];
      out[i] = 0;
    }
    job.xsum[token * t.groups + g] = kept * (V::total(V::to_float(sum)) - excess);
    for (int64_t s = 0; s < segments; ++s) job.xs[token * t.segments() + g * segments + s] = kept;
  }
  job.xzero[token] = kept * (zero - middle);
}

// One token: its numbers to x [padded columns], as integers to q [planes, padded columns], its scales and sums to the job.
static inline void prepare_token(const Job& job, int64_t token, float* x, int8_t* q) {
  const Tiles& t = *job.tiles;
  const int64_t plane = t.padded_cols() * (t.kind == CODEBOOK ? LANES : 1);
  if (t.kind == CODEBOOK || t.padded == t.group) {
    read_floats(job.x, job.x_type, token * t.cols, t.cols, x);
    for (int64_t i = t.cols; i < plane; ++i) x[i] = 0.0f;
  } else {
    for (int64_t g = 0; g < t.groups; ++g) {
      const int64_t n = least(t.group, t.cols - g * t.group);
      read_floats(job.x, job.x_type, token * t.cols + g * t.group, n, x + g * t.padded);
      for (int64_t i = n; i < t.padded; ++i) x[g * t.padded + i] = 0.0f;
    }
  }
  if (job.input == INT8 && job.act_bits) prepare_static(job, token, x, q);
  else if (job.input == INT8) prepare_dynamic<1>(job, token, x, q);
  else if (job.input == FIXED) prepare_dynamic<3>(job, token, x, q);
}
