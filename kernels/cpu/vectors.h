// Vectors as wide as the instructions that this file is compiled for: AVX512-VNNI, AVX-VNNI or AVX2.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512VNNI__)

using Ints = __m512i;
using Floats = __m512;
constexpr int LANES = 16;

INLINE Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
INLINE void store_ints(void* p, Ints v) { _mm512_storeu_si512(p, v); }
INLINE Ints all(int32_t v) { return _mm512_set1_epi32(v); }
INLINE Ints low_nibbles(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE Ints high_nibbles(Ints v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
INLINE Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
INLINE Ints clamp(Ints v, int32_t lo, int32_t hi) { return _mm512_min_epi32(_mm512_max_epi32(v, all(lo)), all(hi)); }
// sum + the four products of unsigned and signed bytes in each lane. The intrinsic makes GCC 12 copy the sums in every step.
INLINE Ints dot(Ints sum, Ints unsigned_bytes, Ints signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
}
// a * b, both within 16 bits.
INLINE Ints multiply_short(Ints a, Ints b) { return _mm512_madd_epi16(a, _mm512_and_si512(b, all(0xffff))); }
INLINE Ints from_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_bytes(uint8_t* p, Ints v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
INLINE Ints rounded(Floats v) { return _mm512_cvtps_epi32(v); }

INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats all(float v) { return _mm512_set1_ps(v); }
INLINE Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats magnitude(Floats v) { return _mm512_abs_ps(v); }
INLINE Floats whole(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
INLINE Ints as_ints(Floats v) { return _mm512_castps_si512(v); }
INLINE Floats from_bfloat16(const uint16_t* p) {
  return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
// value, or 0 in the lanes where x is below least.
INLINE Floats zero_below(Floats value, Floats x, float least) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(least), _CMP_NLT_UQ), value);
}
// Whether a lane is not below the bound; one that is no number is not.
INLINE bool any_from(Floats v, float bound) { return _mm512_cmp_ps_mask(v, all(bound), _CMP_NLT_UQ) != 0; }
INLINE Ints shift_left(Ints v, int bits) { return _mm512_slli_epi32(v, bits); }
INLINE Ints shift_right(Ints v, int bits) { return _mm512_srli_epi32(v, bits); }
INLINE Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
INLINE void store_shorts(uint16_t* p, Ints v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v)); }

// Pairs of bfloat16. The instructions are written out because not every CPU of this level has them: who calls these has asked.
INLINE Floats dot_pairs(Floats sum, Ints a, Ints b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
// All of `low`, then all of `high`.
INLINE Ints to_bfloat16(Floats low, Floats high) {
  Ints both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
  return both;
}
INLINE void transpose(Ints (&r)[16]) {
  Ints t[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4)
    UNROLL for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  UNROLL for (int i = 0; i < 4; i++)
    UNROLL for (int j = 0; j < 2; j++) {
      t[8 * j + i] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + i + 4], 0x88);
      t[8 * j + i + 4] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + i + 4], 0xdd);
    }
  UNROLL for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

#else

using Ints = __m256i;
using Floats = __m256;
constexpr int LANES = 8;

INLINE Ints load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void store_ints(void* p, Ints v) { _mm256_storeu_si256((__m256i*)p, v); }
INLINE Ints all(int32_t v) { return _mm256_set1_epi32(v); }
INLINE Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE Ints high_nibbles(Ints v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
INLINE Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
INLINE Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
INLINE Ints clamp(Ints v, int32_t lo, int32_t hi) { return _mm256_min_epi32(_mm256_max_epi32(v, all(lo)), all(hi)); }
#if defined(__AVXVNNI__)
INLINE Ints dot(Ints sum, Ints unsigned_bytes, Ints signed_bytes) { return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes); }
#else
// Exact only where two products next to each other fit into 16 bits, as those of 4 and 8 bits do.
INLINE Ints dot(Ints sum, Ints unsigned_bytes, Ints signed_bytes) {
  return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_bytes, signed_bytes), _mm256_set1_epi16(1)));
}
#endif
INLINE Ints multiply_short(Ints a, Ints b) { return _mm256_madd_epi16(a, _mm256_and_si256(b, all(0xffff))); }
INLINE Ints from_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE void store_bytes(uint8_t* p, Ints v) {
  __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  // Of 0..255 and of -128..127 alike: the low byte of each.
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(_mm_and_si128(shorts, _mm_set1_epi16(255)), shorts));
}
INLINE Ints rounded(Floats v) { return _mm256_cvtps_epi32(v); }

INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
INLINE Floats all(float v) { return _mm256_set1_ps(v); }
INLINE Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
INLINE Floats whole(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats as_floats(Ints v) { return _mm256_castsi256_ps(v); }
INLINE Ints as_ints(Floats v) { return _mm256_castps_si256(v); }
INLINE Floats magnitude(Floats v) { return as_floats(_mm256_and_si256(as_ints(v), all(0x7fffffff))); }
INLINE Floats from_bfloat16(const uint16_t* p) {
  return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE Floats zero_below(Floats value, Floats x, float least) {
  return _mm256_and_ps(_mm256_cmp_ps(x, all(least), _CMP_NLT_UQ), value);
}
INLINE bool any_from(Floats v, float bound) { return _mm256_movemask_ps(_mm256_cmp_ps(v, all(bound), _CMP_NLT_UQ)) != 0; }
INLINE Ints shift_left(Ints v, int bits) { return _mm256_slli_epi32(v, bits); }
INLINE Ints shift_right(Ints v, int bits) { return _mm256_srli_epi32(v, bits); }
INLINE Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
INLINE void store_shorts(uint16_t* p, Ints v) {
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
INLINE void transpose(Ints (&r)[8]) {
  Ints t[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4)
    UNROLL for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}

#endif

typedef int32_t __attribute__((may_alias, aligned(1))) Four;  // bytes
INLINE Ints all_four(const void* p) { return all(*(const Four*)p); }

INLINE Floats load_as_floats(const float* p) { return load_floats(p); }
INLINE Floats load_as_floats(const uint16_t* p) { return from_bfloat16(p); }

INLINE void store_as(float* p, Floats v) { store_floats(p, v); }
// To bfloat16, halves to even. A NaN has to be the one that arithmetic gives, or this takes it for a number.
INLINE void store_as(uint16_t* p, Floats v) {
  Ints bits = as_ints(v);
  Ints up = add(all(0x7fff), both(shift_right(bits, 16), all(1)));
  store_shorts(p, shift_right(add(bits, up), 16));
}

// The first `count` numbers at x, zeros behind them; and to y no more than so many.
template <typename Number>
INLINE Floats load_some(const Number* x, int64_t count) {
  if (count >= LANES) return load_as_floats(x);
  Number some[LANES] = {};
  memcpy(some, x, count * sizeof(Number));
  return load_as_floats(some);
}

template <typename Number>
INLINE void store_some(Number* y, Floats value, int64_t count) {
  if (count >= LANES) return store_as(y, value);
  Number some[LANES];
  store_as(some, value);
  memcpy(y, some, count * sizeof(Number));
}

INLINE float sum_of(Floats v) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_add_ps(v);
#else
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
}
INLINE float largest_of(Floats v) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_max_ps(v);
#else
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
}
INLINE int32_t sum_of(Ints v) {
  int32_t each[LANES], sum = 0;
  store_ints(each, v);
  for (int i = 0; i < LANES; i++) sum += each[i];
  return sum;
}

template <int N>
INLINE Floats polynomial(const float (&coefficients)[N], Floats x) {
  Floats value = all(coefficients[0]);
  UNROLL for (int i = 1; i < N; i++) value = multiply_add(value, x, all(coefficients[i]));
  return value;
}

// exp, between -87 and 88: 2^n * a polynomial of the rest, as in Cephes' expf.
constexpr float EXP[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
INLINE Floats exponential(Floats x) {
  x = smaller(larger(x, all(-87.0f)), all(88.0f));
  const Floats n = whole(multiply(x, all(1.44269504088896341f)));
  const Floats r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), x));
  const Floats y = multiply_add(multiply(polynomial(EXP, r), r), r, add(r, all(1.0f)));
  return multiply(y, as_floats(shift_left(add(rounded(n), all(127)), 23)));
}

// a / b, to the last bit or two; b is neither zero nor so small or large that its reciprocal is none.
INLINE Floats quotient(Floats a, Floats b) {
#if defined(__AVX512VNNI__)
  const Floats near = _mm512_rcp14_ps(b);
  return multiply(a, _mm512_fmadd_ps(near, _mm512_fnmadd_ps(b, near, all(1.0f)), near));
#else
  return divide(a, b);
#endif
}

INLINE Floats sigmoid(Floats x) { return divide(all(1.0f), add(all(1.0f), exponential(subtract(all(0.0f), x)))); }
