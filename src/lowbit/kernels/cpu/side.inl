// Side terms: rows of few float16 values beside the codes, added to a product that is there. One token goes by the values of
// a row, sixteen at a time; more go together, a lane each, value by value. As everything here, it knows V only.

// The columns of `n` values from `i` on, of a row that starts at `from`.
static inline void side_columns(const Side& s, int64_t from, int64_t i, int64_t n, int32_t* at) {
  const int64_t place = s.start ? i : i - from;
  if (s.column_bytes == 2) {
    auto p = static_cast<const int16_t*>(s.column) + place;
    for (int64_t j = 0; j < n; ++j) at[j] = p[j];
  } else if (s.column_bytes == 4) {
    __builtin_memcpy(at, static_cast<const int32_t*>(s.column) + place, n * 4);
  } else {
    for (int64_t j = 0; j < n; ++j) at[j] = static_cast<int32_t>(place + j);
  }
}

static inline typename V::F side_values(const Side& s, int64_t i, int64_t n) {
  if (n == LANES) return V::halves(s.value + i);
  uint16_t rest[LANES] = {};
  __builtin_memcpy(rest, s.value + i, n * 2);
  return V::halves(rest);
}

static inline float side_of_one(const Side& s, int64_t from, int64_t to) {
  int32_t at[LANES];
  float x[LANES] = {};
  auto sum = V::set(0.0f);
  for (int64_t i = from; i < to; i += LANES) {
    const int64_t n = least(LANES, to - i);
    if (n == LANES && s.column_bytes == 0) {
      sum = V::fma(side_values(s, i, n), V::floats(s.x + i - from), sum);
      continue;
    }
    side_columns(s, from, i, n, at);
    if (n == LANES) {
      sum = V::fma(side_values(s, i, n), V::gather(s.x, V::as_int(V::load(at))), sum);
    } else {
      for (int64_t j = 0; j < n; ++j) x[j] = s.x[at[j]];
      sum = V::fma(side_values(s, i, n), V::floats(x), sum);
    }
  }
  return V::total(sum);
}

static inline typename V::F side_of_many(const Side& s, int64_t from, int64_t to) {
  int32_t at[LANES];
  float value[LANES];
  auto sum = V::set(0.0f);
  for (int64_t i = from; i < to; i += LANES) {
    const int64_t n = least(LANES, to - i);
    side_columns(s, from, i, n, at);
    V::store(value, side_values(s, i, n));
    for (int64_t j = 0; j < n; ++j) sum = V::fma(V::set(value[j]), V::floats(s.x + at[j] * int64_t{LANES}), sum);
  }
  return sum;
}

static void side(const Side& given, int64_t first, int64_t last) {
  Side s = given;
  // Columns that all rows share are brought together once: gathering costs as much as the rest of a row.
  constexpr int64_t most = 1024;
  float together[most];
  if (s.tokens == 1 && !s.start && s.column && s.width <= most) {
    int32_t at[LANES];
    for (int64_t i = 0; i < s.width; i += LANES) {
      const int64_t n = least(LANES, s.width - i);
      side_columns(s, 0, i, n, at);
      for (int64_t j = 0; j < n; ++j) together[i + j] = s.x[at[j]];
    }
    s.x = together;
    s.column = nullptr;
    s.column_bytes = 0;
  }
  float sums[LANES][LANES], line[LANES];
  for (int64_t row = first; row < last; row += LANES) {
    const int64_t n = least(LANES, last - row);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t from = s.start ? s.start[row + r] : (row + r) * s.width, to = s.start ? s.start[row + r + 1] : from + s.width;
      if (s.tokens == 1) {
        sums[0][r] = side_of_one(s, from, to);
      } else {
        V::store(line, side_of_many(s, from, to));
        for (int64_t t = 0; t < s.tokens; ++t) sums[t][r] = line[t];
      }
    }
    for (int64_t t = 0; t < s.tokens; ++t) {
      const int64_t at = t * s.rows + row;
      read_floats(s.y, s.y_type, at, n, line);
      for (int64_t r = 0; r < n; ++r) line[r] += sums[t][r];
      write_floats(line, n, s.y, s.y_type, at);
    }
  }
}

// Columns [first, last) of what side() reads, from x [tokens, cols].
static void side_input(const Side& s, const void* x, int32_t type, int64_t cols, float* out, int64_t first, int64_t last) {
  if (s.tokens == 1) return read_floats(x, type, first, last - first, out + first);
  float line[LANES];
  for (int64_t c = first; c < last; c += LANES) {
    const int64_t n = least(LANES, last - c);
    for (int64_t t = 0; t < LANES; ++t) {
      if (t < s.tokens) {
        read_floats(x, type, t * cols + c, n, line);
      } else {
        V::store(line, V::set(0.0f));
      }
      for (int64_t j = 0; j < n; ++j) out[(c + j) * LANES + t] = line[j];
    }
  }
}
