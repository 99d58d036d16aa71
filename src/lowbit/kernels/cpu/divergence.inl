// Two rows of logits compared: see Compare in solve.h. Included by solve.inl. The rows are read twice, three times with a
// gradient, and nothing of their size is made.

// The largest of n values; NaN is passed over.
static float largest(const float* x, int64_t n) {
  float most[LANES];
  for (int64_t i = 0; i < LANES; ++i) most[i] = -__builtin_inff();
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES)
    for (int64_t i = 0; i < LANES; ++i) most[i] = x[k + i] > most[i] ? x[k + i] : most[i];
  for (; k < n; ++k) most[0] = x[k] > most[0] ? x[k] : most[0];
  for (int64_t i = 1; i < LANES; ++i) most[0] = most[i] > most[0] ? most[i] : most[0];
  return most[0];
}

// The largest of n values and where it is first.
static float largest(const float* x, int64_t n, int64_t* where) {
  float best = -__builtin_inff();
  int64_t block = 0;
  for (int64_t start = 0; start < n; start += SUMMED) {
    const float most = largest(x + start, least(SUMMED, n - start));
    if (most > best) best = most, block = start;
  }
  for (*where = block; *where + 1 < n && x[*where] != best;) ++*where;
  return best;
}

// What n values up to LANES add to the sums. A token that the original excludes adds nothing to the divergence from it.
static inline void add_compared(const float* p, const float* q, int64_t n, float p_most, float q_most, float* p_sum, float* q_sum,
                                float* forward, float* reverse) {
  for (int64_t i = 0; i < n; ++i) {
    const float a = p[i] - p_most, b = q[i] - q_most, e = exponential(a), f = exponential(b);
    const float apart = p[i] == -__builtin_inff() ? 0.0f : a - b;
    p_sum[i] += e;
    q_sum[i] += f;
    forward[i] += e * apart;
    reverse[i] += f * (b - a);
  }
}

static void compare(const Compare& c, int64_t row) {
  const float *p = c.p + row * c.size, *q = c.q + row * c.size;
  int64_t p_at = 0, q_at = 0;
  const float p_most = largest(p, c.size, &p_at), q_most = largest(q, c.size, &q_at);
  double p_sum = 0.0, q_sum = 0.0, forward = 0.0, reverse = 0.0;
  for (int64_t start = 0; start < c.size; start += SUMMED) {
    const int64_t end = least(c.size, start + SUMMED);
    float p_part[LANES] = {}, q_part[LANES] = {}, forward_part[LANES] = {}, reverse_part[LANES] = {};
    int64_t k = start;
    for (; k + LANES <= end; k += LANES)
      add_compared(p + k, q + k, LANES, p_most, q_most, p_part, q_part, forward_part, reverse_part);
    add_compared(p + k, q + k, end - k, p_most, q_most, p_part, q_part, forward_part, reverse_part);
    for (int64_t i = 0; i < LANES; ++i) {
      p_sum += static_cast<double>(p_part[i]);
      q_sum += static_cast<double>(q_part[i]);
      forward += static_cast<double>(forward_part[i]);
      reverse += static_cast<double>(reverse_part[i]);
    }
  }
  const double p_log = __builtin_log(p_sum), q_log = __builtin_log(q_sum);
  double* found = c.found + row * COMPARED;
  found[0] = forward / p_sum + (q_log - p_log);
  found[1] = reverse / q_sum + (p_log - q_log);
  found[2] = static_cast<double>(p_most) + p_log;
  found[3] = static_cast<double>(q_most) + q_log;
  c.same[row] = p_at == q_at;
  if (!c.gradient) return;
  float* g = c.gradient + row * c.size;
  const float of_p = static_cast<float>(1.0 / p_sum), of_q = static_cast<float>(1.0 / q_sum);
  const float straight = (1.0f - c.reverse) * c.weight, back = c.reverse * c.weight;
  if (back == 0.0f) {
    for (int64_t k = 0; k < c.size; ++k)
      g[k] = straight * (exponential(q[k] - q_most) * of_q - exponential(p[k] - p_most) * of_p);
    return;
  }
  const float off = static_cast<float>(p_log - q_log - found[1]);  // log q - log p - reverse, less b - a
  for (int64_t k = 0; k < c.size; ++k) {
    const float a = p[k] - p_most, b = q[k] - q_most, q_is = exponential(b) * of_q;
    g[k] = straight * (q_is - exponential(a) * of_p) + back * q_is * (b - a + off);
  }
}
