// 256 bits: sixteen lanes are two registers. LOWBIT_VNNI: dot products of bytes in one instruction; without it, products
// of bytes are summed by pairs in 16 bits, which 7-bit codes just fit and 8-bit ones do not.

struct V {
  struct B { __m256i a, b; };
  struct I { __m256i a, b; };
  struct F { __m256 a, b; };
  static constexpr bool takes_bytes = false;  // with the dot products of AVX-VNNI too: 16 registers are too few
  static constexpr int products = 6;
  static constexpr bool fuses = true;
  static constexpr bool pairs = false;

  static __m256i half_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static B load(const void* p) { return {half_load(p), half_load(static_cast<const char*>(p) + 32)}; }
  static void store_all(uint8_t* p, B b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), b.b);
  }
  template <int SHIFT, int MASK>
  static __m256i half_field(__m256i b) {
    if constexpr (SHIFT > 0) b = _mm256_srli_epi32(b, SHIFT);
    if constexpr (SHIFT < 0) b = _mm256_slli_epi32(b, -SHIFT);
    return _mm256_and_si256(b, _mm256_set1_epi8(static_cast<char>(MASK)));
  }
  template <int SHIFT, int MASK>
  static B field(B b) { return {half_field<SHIFT, MASK>(b.a), half_field<SHIFT, MASK>(b.b)}; }
  static B either(B a, B b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }
  template <int BITS>
  static __m256i half_dot(__m256i acc, __m256i w, __m256i x) {
#ifdef LOWBIT_VNNI
    return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
    if constexpr (BITS == 8) {
      const __m256i low = _mm256_set1_epi8(0x0f);
      const __m256i l = _mm256_maddubs_epi16(_mm256_and_si256(w, low), x);
      const __m256i h = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi32(w, 4), low), x);
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(l, _mm256_set1_epi16(1)));
      return _mm256_add_epi32(acc, _mm256_madd_epi16(h, _mm256_set1_epi16(16)));
    } else {
      return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
    }
#endif
  }
  template <int BITS>
  static I dot(I acc, B w, const int8_t* x) {
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    const __m256i all = _mm256_set1_epi32(quad);
    return {half_dot<BITS>(acc.a, w.a, all), half_dot<BITS>(acc.b, w.b, all)};
  }
  static I as_int(B b) { return {b.a, b.b}; }
  template <int J, int BITS>
  static __m256i half_byte(__m256i a) {
    if constexpr (J > 0) a = _mm256_srli_epi32(a, 8 * J);
    return BITS > 4 ? _mm256_and_si256(a, _mm256_set1_epi32(0xff)) : a;
  }
  template <int J, int BITS>
  static I byte(I a) { return {half_byte<J, BITS>(a.a), half_byte<J, BITS>(a.b)}; }
  static __m256 half_lookup(F table, __m256i index) {  // 8 entries a permutation; bit 3 says which
    const __m256 low = _mm256_permutevar8x32_ps(table.a, index), high = _mm256_permutevar8x32_ps(table.b, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  static F lookup(F table, I index) { return {half_lookup(table, index.a), half_lookup(table, index.b)}; }
  static F gather(const float* table, I index) {
    return {_mm256_i32gather_ps(table, index.a, 4), _mm256_i32gather_ps(table, index.b, 4)};
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

  template <int BY>
  static I right(I a) {
    if constexpr (BY > 0) a = {_mm256_srli_epi32(a.a, BY), _mm256_srli_epi32(a.b, BY)};
    return a;
  }
  template <int BY>
  static I left(I a) { return {_mm256_slli_epi32(a.a, BY), _mm256_slli_epi32(a.b, BY)}; }
  static I low(I a, int mask) {
    const __m256i m = _mm256_set1_epi32(mask);
    return {_mm256_and_si256(a.a, m), _mm256_and_si256(a.b, m)};
  }
  static I either_int(I a, I b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }

  static I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I add(I a, I b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
  template <int POWER>
  static __m256i half_scaled(__m256i a) {
    if constexpr (POWER > 0) return _mm256_slli_epi32(a, POWER);
    if constexpr (POWER < 0) return _mm256_srai_epi32(a, -POWER);
    return a;
  }
  template <int POWER>
  static I scaled(I a) { return {half_scaled<POWER>(a.a), half_scaled<POWER>(a.b)}; }
  static I sub(I a, I b) { return {_mm256_sub_epi32(a.a, b.a), _mm256_sub_epi32(a.b, b.b)}; }
  static I signed_byte(I a) {
    return {_mm256_srai_epi32(_mm256_slli_epi32(a.a, 24), 24), _mm256_srai_epi32(_mm256_slli_epi32(a.b, 24), 24)};
  }
  static I next_byte(I a) { return {_mm256_srai_epi32(a.a, 8), _mm256_srai_epi32(a.b, 8)}; }
  static void store_bytes(int8_t* p, I a) {  // the values fit, so that saturation does nothing
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.a, a.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

  static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F f) {
    _mm256_storeu_ps(p, f.a);
    _mm256_storeu_ps(p + 8, f.b);
  }
  static __m256 half_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F bytes(const uint8_t* p) { return {half_bytes(p), half_bytes(p + 8)}; }
  static __m256i half_widened(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I widened(const uint8_t* p) { return {half_widened(p), half_widened(p + 8)}; }
  static F to_float(I a) { return {_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)}; }
  static I to_int(F a) { return {_mm256_cvtps_epi32(a.a), _mm256_cvtps_epi32(a.b)}; }
  static F round(F a) {
    return {_mm256_round_ps(a.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(a.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
  static F div(F a, F b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
  static F addf(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
  static F subf(F a, F b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
  static F min(F a, F b) { return {_mm256_min_ps(b.a, a.a), _mm256_min_ps(b.b, a.b)}; }  // a where b is NaN
  static F max(F a, F b) { return {_mm256_max_ps(b.a, a.a), _mm256_max_ps(b.b, a.b)}; }
  static F clamp(F a, float low, float high) {
    const __m256 l = _mm256_set1_ps(low), h = _mm256_set1_ps(high);
    return {_mm256_min_ps(_mm256_max_ps(a.a, l), h), _mm256_min_ps(_mm256_max_ps(a.b, l), h)};
  }
  static float total(F a) {
    const __m256 s = _mm256_add_ps(a.a, a.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
  }
  static F halves(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static F bfloats(const uint16_t* p) {
    const auto widened = [](const uint16_t* q) {
      const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
      return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    };
    return {widened(p), widened(p + 8)};
  }
  static __m256i half_bfloats(__m256 f) {
    const __m256i u = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  }
  static void store_bfloats(uint16_t* p, F f) {  // decoded weights: finite
    const __m256i words = _mm256_packus_epi32(half_bfloats(f.a), half_bfloats(f.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
  }
  static void store_halves(uint16_t* p, F f) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(f.a, how));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(f.b, how));
  }
};
