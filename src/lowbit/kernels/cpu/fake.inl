// Simulated quantization on evenly spaced levels, for learning: see Fake in solve.h. Included by solve.inl. The operations and
// their order are those of torch, so that results are equal; sums of gradients are not.

struct Level {
  float scale, before, after, zero, most;
};

static inline Level level_of(const Fake& f, int64_t granule) {
  const float zero = f.zero ? f.zero[granule] : f.grid.middle;
  return {f.scale[granule], f.grid.whole ? 0.0f : zero, f.grid.whole ? zero : 0.0f, zero, f.grid.most};
}

static inline float clamped(float level, float most) { return level < 0.0f ? 0.0f : level > most ? most : level; }  // NaN stays

static void fake_forward(const Fake& f, int64_t granule, int64_t from, int64_t to) {
  const Level l = level_of(f, granule);
  const float* x = f.x + granule * f.size;
  float* y = f.y + granule * f.size;
  for (int64_t k = from; k < to; ++k) {
    const float level = clamped(__builtin_rintf(x[k] / l.scale + l.before) + l.after, l.most);
    y[k] = (level - l.zero) * l.scale;
  }
}

// n values up to LANES: adds to the sums what the scale and the zero point gain.
static inline void add_gradients(const Level& l, const float* x, const float* g, float* of_x, int64_t n, float* scales, float* zeros) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = x[i] / l.scale, level = __builtin_rintf(v + l.before) + l.after;
    const bool inside = level >= 0.0f && level <= l.most;
    const float kept = clamped(level, l.most) - l.zero, passed = inside ? g[i] : 0.0f;
    scales[i] += g[i] * kept - passed * v;
    zeros[i] += passed - g[i];
    if (of_x) of_x[i] = passed;
  }
}

static void fake_backward(const Fake& f, int64_t granule) {
  const Level l = level_of(f, granule);
  const float *x = f.x + granule * f.size, *g = f.g + granule * f.size;
  float* of_x = f.of_x ? f.of_x + granule * f.size : nullptr;
  double scale = 0.0, zero = 0.0;
  for (int64_t start = 0; start < f.size; start += SUMMED) {
    const int64_t end = least(f.size, start + SUMMED);
    float scales[LANES] = {}, zeros[LANES] = {};
    int64_t k = start;
    if (of_x) {
      for (; k + LANES <= end; k += LANES) add_gradients(l, x + k, g + k, of_x + k, LANES, scales, zeros);
    } else {
      for (; k + LANES <= end; k += LANES) add_gradients(l, x + k, g + k, nullptr, LANES, scales, zeros);
    }
    add_gradients(l, x + k, g + k, of_x ? of_x + k : nullptr, end - k, scales, zeros);
    for (int64_t i = 0; i < LANES; ++i) {
      scale += static_cast<double>(scales[i]);
      zero += static_cast<double>(zeros[i]);
    }
  }
  f.of_scale[granule] = static_cast<float>(scale);
  if (f.of_zero) f.of_zero[granule] = static_cast<float>(zero) * l.scale;
}

// Lowest and highest of each granule; NaN where a value is.
static void extremes(const float* x, int64_t n, float* lo, float* hi) {
  float least_of[LANES], most_of[LANES], bad[LANES] = {};
  for (int64_t i = 0; i < LANES; ++i) least_of[i] = most_of[i] = x[0];
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    for (int64_t i = 0; i < LANES; ++i) {
      const float v = x[k + i];
      least_of[i] = v < least_of[i] ? v : least_of[i];
      most_of[i] = v > most_of[i] ? v : most_of[i];
      bad[i] = v == v ? bad[i] : 1.0f;
    }
  }
  for (int64_t i = 0; k + i < n; ++i) {
    const float v = x[k + i];
    least_of[i] = v < least_of[i] ? v : least_of[i];
    most_of[i] = v > most_of[i] ? v : most_of[i];
    bad[i] = v == v ? bad[i] : 1.0f;
  }
  *lo = least_of[0];
  *hi = most_of[0];
  float any = 0.0f;
  for (int64_t i = 0; i < LANES; ++i) {
    *lo = least_of[i] < *lo ? least_of[i] : *lo;
    *hi = most_of[i] > *hi ? most_of[i] : *hi;
    any += bad[i];
  }
  if (any > 0.0f) *lo = *hi = __builtin_nanf("");
}

// What the values gain from the gradients of their granule's extremes, in equal parts where several are extreme.
static void extremes_backward(const float* x, int64_t n, float lo, float hi, float of_lo, float of_hi, float* of_x) {
  int32_t lows[LANES] = {}, highs[LANES] = {};
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    for (int64_t i = 0; i < LANES; ++i) {
      lows[i] += x[k + i] == lo;
      highs[i] += x[k + i] == hi;
    }
  }
  int32_t low = 0, high = 0;
  for (; k < n; ++k) low += x[k] == lo, high += x[k] == hi;
  for (int64_t i = 0; i < LANES; ++i) low += lows[i], high += highs[i];
  const float each_low = of_lo / static_cast<float>(low), each_high = of_hi / static_cast<float>(high);
  for (k = 0; k < n; ++k) of_x[k] = (x[k] == lo ? each_low : 0.0f) + (x[k] == hi ? each_high : 0.0f);
}
