// The loops of solve.h. Included after kernel.inl, under its rules. Lanes are candidates in a search, rows in columns; loops
// over them have a fixed length and are left to the compiler, which knows the width of the file's instruction set.

// ---- listed levels ----------------------------------------------------------------------------------------------------

// Registers of whichever width the file has: the ranks of many levels stay in them.
#if defined(__AVX2__)
constexpr int64_t WIDE = 8;
#else
constexpr int64_t WIDE = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * WIDE)));
typedef int32_t Counts __attribute__((vector_size(4 * WIDE)));

// How many of `count` midpoints are below each of LANES numbers. OWN: every lane has its own, `pitch` apart.
template <bool OWN>
static inline void rank(const float* x, const float* midpoints, int64_t pitch, int64_t count, int32_t* ranks) {
  constexpr int64_t parts = LANES / WIDE;
  Floats v[parts];
  Counts below[parts];
  for (int64_t i = 0; i < parts; ++i) {
    __builtin_memcpy(&v[i], x + i * WIDE, sizeof(Floats));
    below[i] = Counts{};
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < parts; ++i) {
      Floats edge;
      if constexpr (OWN) __builtin_memcpy(&edge, midpoints + j * pitch + i * WIDE, sizeof(Floats));
      else edge = midpoints[j] - Floats{};
      below[i] -= v[i] > edge;
    }
  }
  for (int64_t i = 0; i < parts; ++i) __builtin_memcpy(ranks + i * WIDE, &below[i], sizeof(Counts));
}

// ---- the search -------------------------------------------------------------------------------------------------------

constexpr int64_t TRIED = LANES;   // candidates side by side
constexpr int64_t VALUES = 16;     // of a granule between two looks at the sums; short sums are exact enough in float32
constexpr int64_t ORDERED = 1024;  // values of a granule that are put in order, at most
constexpr float SMALLEST = 1.17549435e-38f;  // normal number

struct Tried {
  float scale[TRIED], before[TRIED], after[TRIED], zero[TRIED];
};

// a**p to 3e-6 of it, for normal numbers a with |p log2 a| up to 126; nearer as |p log2 a| is smaller. Both polynomials are
// summed by halves, for the processor to work on several terms at once.
static inline float power(float a, float p) {
  const uint32_t u = to_bits(a);
  const int32_t e = static_cast<int32_t>(u - 0x3f3504f3u) >> 23;  // the rest is from sqrt(1/2) to sqrt(2)
  const float t = from_bits(u - (static_cast<uint32_t>(e) << 23)) - 1.0f, t2 = t * t, t4 = t2 * t2;
  const float low = (1.442694958e+00f - 7.213527588e-01f * t) + (4.809240386e-01f - 3.602419859e-01f * t) * t2;
  const float high = (2.870756112e-01f - 2.488218056e-01f * t) + (2.342098512e-01f - 1.462035342e-01f * t) * t2;
  const float y = p * (static_cast<float>(e) + t * (low + high * t4));
  const float n = __builtin_rintf(y), r = y - n, r2 = r * r;
  const float x = (1.000000075e+00f + 6.931472067e-01f * r) +
                  r2 * ((2.402210736e-01f + 5.550327214e-02f * r) + r2 * (9.676037098e-03f + 1.340043217e-03f * r));
  return x * from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// Adds what n values lose under each candidate. Squared errors are raised to `half`, unless it is one, and are up to `most`, to
// which float32 can do so.
template <bool SQUARED>
static inline void add_losses(const Grid& grid, const Tried& t, const float* x, const float* importance, int64_t n, float unit,
                              float half, float most, float* lost) {
  for (int64_t k = 0; k < n; ++k) {
    const float value = x[k] * unit, weight = importance ? importance[k] : 1.0f;
    const auto v = V::set(value), minus = V::set(-value);
    float error[TRIED];
    if (grid.count == 0) {
      const auto scale = V::floats(t.scale);
      const auto level = V::addf(V::round(V::addf(V::div(v, scale), V::floats(t.before))), V::floats(t.after));
      V::store(error, V::fma(V::subf(V::clamp(level, 0.0f, grid.most), V::floats(t.zero)), scale, minus));
    } else {
      float ratio[TRIED];
      int32_t ranks[TRIED];
      V::store(ratio, V::div(v, V::floats(t.scale)));
      rank<false>(ratio, grid.midpoints, 0, grid.count - 1, ranks);
      for (int64_t i = 0; i < TRIED; ++i) error[i] = grid.values[ranks[i]] * t.scale[i] - value;
    }
    const auto e = V::floats(error), squared = V::mul(e, e);
    if constexpr (SQUARED) {
      V::store(lost, V::fma(V::set(weight), squared, V::floats(lost)));
    } else {
      V::store(error, V::clamp(squared, 1.0f / most, most));
      for (int64_t i = 0; i < TRIED; ++i) lost[i] += weight * power(error[i], half);
    }
  }
}

// The largest magnitude of a granule; NaN where a value is not finite.
static inline float reach_of(const float* x, int64_t n) {
  float most = 0.0f, nothing = 0.0f;
  for (int64_t k = 0; k < n; ++k) {
    most = __builtin_fabsf(x[k]) > most ? __builtin_fabsf(x[k]) : most;
    nothing += x[k] * 0.0f;
  }
  return most + nothing;
}

template <bool SQUARED>
static void search_of(const Search& s, int64_t granule, int64_t part) {
  const float* x = s.x + granule * s.size;
  const float* importance = s.importance ? s.importance + granule * s.importance_step : nullptr;
  const int64_t tiles = (s.tried + TRIED - 1) / TRIED, from = tiles * part / s.parts;
  const float reach = reach_of(x, s.size), infinite = __builtin_inff();
  const int64_t to = reach < infinite ? tiles * (part + 1) / s.parts : from;
  // Where logarithms are taken, a power of two brings the values near one: they then have more digits.
  const int32_t binade = static_cast<int32_t>(to_bits(reach) >> 23) - 127;
  const float unit = SQUARED || binade < -60 || binade > 60 ? 1.0f : from_bits(static_cast<uint32_t>(127 - binade) << 23);
  const float half = s.norm / 2, most = half > 1.0f ? power(2.0f, 126.0f / half) : from_bits(253u << 23);
  // Large values first: where a range clips them, it has lost before the others are looked at.
  float large_first[ORDERED], its_importance[ORDERED];
  if (s.size <= ORDERED && from < to) {
    int64_t front = 0, back = s.size;
    for (int64_t k = 0; k < s.size; ++k) {
      const int64_t place = __builtin_fabsf(x[k]) > 0.5f * reach ? front++ : --back;
      large_first[place] = x[k];
      its_importance[place] = importance ? importance[k] : 1.0f;
    }
    x = large_first;
    importance = its_importance;
  }
  double best = __builtin_inf();
  int64_t at = -1;
  for (int64_t tile = from; tile < to; ++tile) {
    const int64_t first = tile * TRIED, many = least(TRIED, s.tried - first);
    double total[TRIED];
    Tried t;
    for (int64_t i = 0; i < TRIED; ++i) {
      const int64_t c = granule * s.tried + first + least(i, many - 1);
      const float scale = s.scale[c] * unit;
      total[i] = scale < infinite ? 0.0 : __builtin_inf();
      t.scale[i] = scale > SMALLEST ? scale : SMALLEST;
      t.zero[i] = s.zero ? s.zero[c] : s.grid.middle;
      t.before[i] = s.grid.whole ? 0.0f : t.zero[i];
      t.after[i] = s.grid.whole ? t.zero[i] : 0.0f;
    }
    bool wins = true;  // whether a candidate may: sums never fall
    for (int64_t k = 0; k < s.size && wins; k += VALUES) {
      float lost[TRIED] = {};
      add_losses<SQUARED>(s.grid, t, x + k, importance ? importance + k : nullptr, least(VALUES, s.size - k), unit, half, most, lost);
      wins = false;
      for (int64_t i = 0; i < TRIED; ++i) {
        total[i] += static_cast<double>(lost[i]);
        wins |= total[i] < best;
      }
    }
    for (int64_t i = 0; i < many && wins; ++i)
      if (total[i] < best) best = total[i], at = first + i;
  }
  s.loss[granule * s.parts + part] = best;
  s.best[granule * s.parts + part] = static_cast<int32_t>(at);
}

static void search(const Search& s, int64_t granule, int64_t part) {
  if (s.norm == 2.0f) search_of<true>(s, granule, part);
  else search_of<false>(s, granule, part);
}

// ---- columns ----------------------------------------------------------------------------------------------------------

// The parameters of a strip's rows.
struct Placed {
  float scale[STRIP], before[STRIP], after[STRIP], zero[STRIP];
  float* midpoints;                     // of rows that have their own: midpoint by midpoint, STRIP rows each
  int64_t levels[STRIP];                // where the values and codes of a row start
  float base[STRIP], base_code[STRIP];  // of the value zero
};

static inline void load_rows(const float* from, int64_t n, float missing, float* to) {
  if (n == STRIP) {
    __builtin_memcpy(to, from, STRIP * 4);
  } else {
    for (int64_t r = 0; r < STRIP; ++r) to[r] = r < n ? from[r] : missing;
  }
}

// LANES rows: nearest value and code, as a number.
static inline void round_rows(const Grid& grid, const Placed& p, int64_t row, const float* v, float* value, float* code) {
  const float* scale = p.scale + row;
  if (grid.count == 0) {
    const float most = grid.most;
    for (int64_t r = 0; r < LANES; ++r) {
      float level = __builtin_rintf(v[r] / scale[r] + p.before[row + r]) + p.after[row + r];
      level = level < 0.0f ? 0.0f : level > most ? most : level;
      code[r] = level;
      value[r] = (level - p.zero[row + r]) * scale[r];
    }
    return;
  }
  float ratio[LANES];
  int32_t ranks[LANES];
  for (int64_t r = 0; r < LANES; ++r) ratio[r] = v[r] / scale[r];
  if (grid.own) rank<true>(ratio, p.midpoints + row, STRIP, grid.count - 1, ranks);
  else rank<false>(ratio, grid.midpoints, 0, grid.count - 1, ranks);
  for (int64_t r = 0; r < LANES; ++r) {
    const int64_t at = p.levels[row + r] + ranks[r];
    value[r] = grid.values[at] * scale[r];
    code[r] = grid.codes[at];
  }
}

static void place_rows(const Columns& c, int64_t set, int64_t row, int64_t n, Placed& p) {
  const Grid& grid = c.grid;
  for (int64_t r = 0; r < STRIP; ++r) {
    const int64_t at = set * c.rows + row + r;
    p.scale[r] = c.scale && r < n ? c.scale[at] : 1.0f;
    p.zero[r] = c.zero && r < n ? c.zero[at] : grid.middle;
    p.before[r] = grid.whole ? 0.0f : p.zero[r];
    p.after[r] = grid.whole ? p.zero[r] : 0.0f;
  }
  for (int64_t r = 0; r < STRIP; ++r) {
    const int64_t table = grid.own ? set * c.rows + row + least(r, n - 1) : 0;
    p.levels[r] = table * grid.count;
    for (int64_t j = 0; grid.own && j + 1 < grid.count; ++j) p.midpoints[j * STRIP + r] = grid.midpoints[table * (grid.count - 1) + j];
  }
  if (c.kept) {
    const float zeros[LANES] = {};
    for (int64_t r = 0; r < STRIP; r += LANES) round_rows(grid, p, r, zeros, p.base + r, p.base_code + r);
  }
}

// The recursion, on LANES of the n rows from `row` on. v: the corrected weights; then what they move.
static inline void recur_rows(const Columns& c, const Placed& p, int64_t i, int64_t row, int64_t in_strip, int64_t n, float* v) {
  float value[LANES], code[LANES];
  round_rows(c.grid, p, in_strip, v, value, code);
  const int64_t at = i * c.pitch + row;
  const float divisor = c.divisor[i];
  if (c.kept) {
    float kept[LANES] = {}, beside[LANES];
    for (int64_t r = 0; r < n; ++r) kept[r] = c.kept[at + r];
    for (int64_t r = 0; r < LANES; ++r) {
      const float moved = (v[r] - value[r]) / divisor;
      kept[r] = c.limit >= 0.0f && moved * moved > c.limit ? 1.0f : kept[r];
      beside[r] = kept[r] != 0.0f ? v[r] - p.base[in_strip + r] : 0.0f;
    }
    uint16_t halves[LANES];
    V::store_halves(halves, V::floats(beside));
    V::store(beside, V::halves(halves));
    for (int64_t r = 0; r < LANES; ++r) {
      value[r] = kept[r] != 0.0f ? p.base[in_strip + r] + beside[r] : value[r];
      code[r] = kept[r] != 0.0f ? p.base_code[in_strip + r] : code[r];
    }
    for (int64_t r = 0; r < n; ++r) {
      c.kept[at + r] = kept[r] != 0.0f;
      c.value[at + r] = beside[r];
    }
  }
  for (int64_t r = 0; r < LANES; ++r) v[r] = (v[r] - value[r]) / divisor;
  for (int64_t r = 0; r < n; ++r) c.codes[at + r] = static_cast<uint8_t>(static_cast<int32_t>(code[r]));
}

// Descent, likewise. v: the corrected gradient; then the change of the value. True if a code changed.
static inline bool descend_rows(const Columns& c, const Placed& p, int64_t i, int64_t row, int64_t in_strip, int64_t n, float* v) {
  float before[LANES] = {}, target[LANES] = {}, wanted[LANES], value[LANES], code[LANES];
  const int64_t at = i * c.pitch + row;
  for (int64_t r = 0; r < n; ++r) {
    target[r] = c.target[at + r];
    before[r] = c.error[at + r] + target[r];
  }
  const float divisor = c.divisor[i];
  for (int64_t r = 0; r < LANES; ++r) wanted[r] = before[r] - v[r] / divisor;
  round_rows(c.grid, p, in_strip, wanted, value, code);
  bool any = false;
  for (int64_t r = 0; r < LANES; ++r) v[r] = 0.0f;
  for (int64_t r = 0; r < n; ++r) {
    const auto number = static_cast<uint8_t>(static_cast<int32_t>(code[r]));
    if (number == c.codes[at + r] || (c.kept && c.kept[at + r])) continue;
    c.codes[at + r] = number;
    c.error[at + r] = value[r] - target[r];
    v[r] = value[r] - before[r];
    any = true;
  }
  return any;
}

static bool columns(const Columns& c, int64_t strip, float* room) {
  const int64_t row = strip * STRIP, rows = least(STRIP, c.rows - row);
  float* moved = room;
  Placed p;
  p.midpoints = room + c.columns * STRIP;
  bool changed = false;
  for (int64_t i = 0; i < c.columns; ++i) {
    if (i == 0 || c.set[i] != c.set[i - 1]) place_rows(c, c.set[i], row, rows, p);
    float* own = moved + i * STRIP;
    load_rows(c.input + i * c.pitch + row, rows, 0.0f, own);
    typename V::F sum[STRIP / LANES];
    for (int64_t l = 0; l < STRIP / LANES; ++l) sum[l] = V::floats(own + l * LANES);
    const float* mix = c.mix + i * c.columns;
    for (int64_t k = 0; k < i; ++k) {
      const auto by = V::set(mix[k]);
      for (int64_t l = 0; l < STRIP / LANES; ++l) sum[l] = V::fma(by, V::floats(moved + k * STRIP + l * LANES), sum[l]);
    }
    for (int64_t l = 0; l < STRIP / LANES; ++l) {
      const int64_t from = l * LANES, n = least(LANES, rows - from);
      V::store(own + from, sum[l]);
      if (n <= 0) {
        for (int64_t r = 0; r < LANES; ++r) own[from + r] = 0.0f;
      } else if (c.target) {
        changed |= descend_rows(c, p, i, row + from, from, n, own + from);
      } else {
        recur_rows(c, p, i, row + from, from, n, own + from);
      }
    }
    if (!c.target) __builtin_memcpy(c.moved + i * c.pitch + row, own, rows * 4);
  }
  return changed;
}

#include "fake.inl"

#include "divergence.inl"

static constexpr SolveKernels solve_kernels{search, columns, fake_forward, fake_backward, extremes, extremes_backward, compare};
