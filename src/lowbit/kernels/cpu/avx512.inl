// Sixteen lanes of AVX-512 with VNNI: a register is 16 rows by 4 columns. V is described in portable.cpp.

struct V {
  using B = __m512i;
  using I = __m512i;
  using F = __m512;
  static constexpr bool takes_bytes = true;
  static constexpr int products = 12;
  static constexpr bool fuses = true;
  static constexpr bool pairs = true;

  static B load(const void* p) { return _mm512_loadu_si512(p); }
  static void store_all(uint8_t* p, B b) { _mm512_storeu_si512(p, b); }
  template <int SHIFT, int MASK>
  static B field(B b) {
    if constexpr (SHIFT > 0) b = _mm512_srli_epi32(b, SHIFT);
    if constexpr (SHIFT < 0) b = _mm512_slli_epi32(b, -SHIFT);
    return _mm512_and_si512(b, _mm512_set1_epi8(static_cast<char>(MASK)));
  }
  static B either(B a, B b) { return _mm512_or_si512(a, b); }
  template <int BITS>
  static I dot(I acc, B w, const int8_t* x) {
#if defined(__GNUC__) && !defined(__clang__)
    // Sum in place, quad straight from memory: left to itself, g++ 12 moves the sums around and one of them to the stack.
    using Quad = const int32_t __attribute__((may_alias));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<Quad*>(x)));
    return acc;
#else
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(quad));
#endif
  }
  static B quad(const int8_t* x) {
    int32_t q;
    __builtin_memcpy(&q, x, 4);
    return _mm512_set1_epi32(q);
  }
  static I dot_quad(I acc, B w, B quad) {
#if defined(__GNUC__) && !defined(__clang__)
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(quad));
    return acc;
#else
    return _mm512_dpbusd_epi32(acc, w, quad);
#endif
  }
  static I as_int(B b) { return b; }
  template <int J, int BITS>
  static I byte(I a) {  // a lookup of 16 reads 4 bits only
    if constexpr (J > 0) a = _mm512_srli_epi32(a, 8 * J);
    if constexpr (BITS > 4) a = _mm512_and_si512(a, _mm512_set1_epi32(0xff));
    return a;
  }
  static F lookup(F table, I index) { return _mm512_permutexvar_ps(index, table); }
  static F gather(const float* table, I index) { return _mm512_i32gather_ps(index, table, 4); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

  template <int BY>
  static I right(I a) { if constexpr (BY > 0) a = _mm512_srli_epi32(a, BY); return a; }
  template <int BY>
  static I left(I a) { return _mm512_slli_epi32(a, BY); }
  static I low(I a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
  static I either_int(I a, I b) { return _mm512_or_si512(a, b); }

  static I izero() { return _mm512_setzero_si512(); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  template <int POWER>
  static I scaled(I a) {
    if constexpr (POWER > 0) return _mm512_slli_epi32(a, POWER);
    if constexpr (POWER < 0) return _mm512_srai_epi32(a, -POWER);
    return a;
  }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I signed_byte(I a) { return _mm512_srai_epi32(_mm512_slli_epi32(a, 24), 24); }
  static I next_byte(I a) { return _mm512_srai_epi32(a, 8); }
  static void store_bytes(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }

  static F set(float x) { return _mm512_set1_ps(x); }
  static F floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
  static F bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static I widened(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F addf(F a, F b) { return _mm512_add_ps(a, b); }
  static F subf(F a, F b) { return _mm512_sub_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(b, a); }  // a where b is NaN
  static F max(F a, F b) { return _mm512_max_ps(b, a); }
  static F clamp(F a, float low, float high) {
    return _mm512_min_ps(_mm512_max_ps(a, _mm512_set1_ps(low)), _mm512_set1_ps(high));
  }
  static float total(F a) { return _mm512_reduce_add_ps(a); }
  static F halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F bfloats(const uint16_t* p) {
    const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store_bfloats(uint16_t* p, F f) {  // decoded weights: finite
    const I u = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  static void store_halves(uint16_t* p, F f) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};
