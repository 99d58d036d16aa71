// What a token needs between products with packed weights. Included after kernel.inl, under its rules. Loops without a sum
// are left to the compiler, which knows the width of the file's instruction set.

static void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

static void add_typed(float* x, const void* y, int32_t type, int64_t offset, int64_t n) {
  float some[LANES];
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t take = least(LANES, n - i);
    read_floats(y, type, offset + i, take, some);
    for (int64_t j = 0; j < take; ++j) x[i + j] += some[j];
  }
}

static inline float dot_floats(const float* a, const float* b, int64_t n) {
  auto even = V::set(0.0f), odd = V::set(0.0f);
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    even = V::fma(V::floats(a + i), V::floats(b + i), even);
    odd = V::fma(V::floats(a + i + LANES), V::floats(b + i + LANES), odd);
  }
  for (; i + LANES <= n; i += LANES) even = V::fma(V::floats(a + i), V::floats(b + i), even);
  float sum = V::total(V::addf(even, odd));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

static void norm(const float* x, int64_t n, const void* gain, int32_t type, float gain_offset, float eps, float* out) {
  const float by = 1.0f / __builtin_sqrtf(dot_floats(x, x, n) / static_cast<float>(n) + eps);
  read_floats(gain, type, 0, n, out);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * by * (out[i] + gain_offset);
}

static void spread(const float* x, int64_t n, float* mean, float* variance) {
  const int64_t whole = n / LANES * LANES;
  auto sum = V::set(0.0f);
  for (int64_t i = 0; i < whole; i += LANES) sum = V::addf(sum, V::floats(x + i));
  float total = V::total(sum);
  for (int64_t i = whole; i < n; ++i) total += x[i];
  *mean = total / static_cast<float>(n);
  const auto middle = V::set(*mean);
  sum = V::set(0.0f);
  for (int64_t i = 0; i < whole; i += LANES) {
    const auto off = V::subf(V::floats(x + i), middle);
    sum = V::fma(off, off, sum);
  }
  total = V::total(sum);
  for (int64_t i = whole; i < n; ++i) total += (x[i] - *mean) * (x[i] - *mean);
  *variance = total / static_cast<float>(n);
}

// To about one unit in the last place, and without a branch, so that loops of it are vectorized. NaN stays NaN.
static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float n = __builtin_rintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t power = static_cast<int32_t>(n == n ? n : 0.0f);
  return p * from_bits(static_cast<uint32_t>(power + 127) << 23);
}

static void gate(float* g, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] = g[i] / (1.0f + exponential(-g[i])) * up[i];
}

template <int TYPE>
static inline typename V::F some_floats(const void* source, int64_t offset) {
  if constexpr (TYPE == F32) return V::floats(static_cast<const float*>(source) + offset);
  else if constexpr (TYPE == BF16) return V::bfloats(static_cast<const uint16_t*>(source) + offset);
  else return V::halves(static_cast<const uint16_t*>(source) + offset);
}

// ROWS rows at once: their sums do not wait for each other, and the input is loaded once.
template <int TYPE, int ROWS>
static inline void dense_rows(const void* weight, int64_t cols, const float* x, int64_t row, float* y) {
  constexpr int64_t size = TYPE == F32 ? 4 : 2;
  typename V::F sum[ROWS];
  for (int r = 0; r < ROWS; ++r) sum[r] = V::set(0.0f);
  const int64_t whole = cols / LANES * LANES;
  for (int64_t c = 0; c < whole; c += LANES) {
    const auto input = V::floats(x + c);
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = (row + r) * cols + c;
      V::prefetch(static_cast<const char*>(weight) + at * size + AHEAD);
      sum[r] = V::fma(some_floats<TYPE>(weight, at), input, sum[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    y[row + r] = V::total(sum[r]);
    for (int64_t c = whole; c < cols; ++c) {
      float w;
      read_floats(weight, TYPE, (row + r) * cols + c, 1, &w);
      y[row + r] += w * x[c];
    }
  }
}

template <int TYPE>
static void dense_of(const void* weight, int64_t cols, const float* x, int64_t first, int64_t last, float* y) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) dense_rows<TYPE, 4>(weight, cols, x, row, y);
  for (; row < last; ++row) dense_rows<TYPE, 1>(weight, cols, x, row, y);
}

static void dense(const void* weight, int32_t type, int64_t cols, const float* x, int64_t first, int64_t last, float* y) {
  (type == F32 ? dense_of<F32> : type == BF16 ? dense_of<BF16> : dense_of<F16>)(weight, cols, x, first, last, y);
}

// A row of keys or values as float32: where it lies, or in `buffer`.
static inline const float* float_row(const void* source, int32_t type, int64_t offset, int64_t n, float* buffer) {
  if (type == F32) return static_cast<const float*>(source) + offset;
  read_floats(source, type, offset, n, buffer);
  return buffer;
}

static void attend(const Attention& a) {
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float* key = float_row(a.keys, a.type, t * a.dim, a.dim, a.row);
    for (int64_t g = 0; g < a.group; ++g) a.scores[g * a.tokens + t] = dot_floats(a.q + g * a.dim, key, a.dim);
  }
  for (int64_t g = 0; g < a.group; ++g) {
    float* s = a.scores + g * a.tokens;
    float most = s[0];
    for (int64_t t = 1; t < a.tokens; ++t) most = s[t] > most || s[t] != s[t] ? s[t] : most;
    for (int64_t t = 0; t < a.tokens; ++t) s[t] = exponential(s[t] - most);
    float sum = 0;
    for (int64_t t = 0; t < a.tokens; ++t) sum += s[t];
    const float by = 1.0f / sum;
    for (int64_t t = 0; t < a.tokens; ++t) s[t] *= by;
  }
  for (int64_t i = 0; i < a.group * a.dim; ++i) a.out[i] = 0.0f;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float* value = float_row(a.values, a.type, t * a.dim, a.dim, a.row);
    for (int64_t g = 0; g < a.group; ++g) {
      const float p = a.scores[g * a.tokens + t];
      float* out = a.out + g * a.dim;
      for (int64_t d = 0; d < a.dim; ++d) out[d] += p * value[d];
    }
  }
}

static constexpr StepKernels step_kernels{add, add_typed, norm, spread, gate, dense, attend, read_floats, write_floats};
