// softmax(scale * q @ k^T + mask) @ v, a few rows of q at a time over all keys at once: what attention.cpp and int8_rows.cpp share.
#pragma once
#include "vectors.h"

namespace attend {
namespace {

constexpr int ROWS = LANES == 16 ? 6 : 4;
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr float NONE = -3.0e38f;  // below every score, and finite, so that it can be subtracted

// Strides in numbers; of each tensor the last dimension is contiguous. mask: bool, true for keys that are seen, or numbers that
// are added; null for none. Its strides are zero along what it does not depend on.
struct Problem {
  int64_t batch, heads, kv_heads, queries, keys, depth;
  int64_t is_few;    // so few queries that to lay keys and values out anew does not pay
  int64_t is_rough;  // products may be of bfloat16, which this CPU multiplies
  const void *q, *k, *v, *mask;
  int64_t q_strides[3], k_strides[3], v_strides[3], mask_strides[4];
  int mask_kind;  // 0 none, 1 bool, 2 of the type of q
  int is_causal;
  float scale;
  void* y;  // [batch][queries][heads][depth]
};

int64_t padded(int64_t keys) { return (keys + VECTORS * LANES - 1) / (VECTORS * LANES) * (VECTORS * LANES); }
int64_t floats_of(const Problem& p) {
  // Few rows: the scores of one, the row, what comes out. More: keys and values laid out anew, and the scores of ROWS.
  return p.is_few ? padded(p.keys) + 2 * p.depth : padded(p.keys) * (2 * p.depth + ROWS) + ROWS * p.depth;
}

INLINE float as_float(float x) { return x; }
INLINE float as_float(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <int M>
INLINE void scores_of(const float* q, const float* kt, int64_t depth, int64_t width, int64_t keys, float* scores) {
  for (int64_t j = 0; j < keys; j += VECTORS * LANES) {
    Floats sum[M][VECTORS];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < VECTORS; v++) sum[m][v] = all(0.0f);
    for (int64_t d = 0; d < depth; d++) {
      Floats key[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; v++) key[v] = load_floats(kt + d * width + j + v * LANES);
      UNROLL for (int m = 0; m < M; m++) {
        const Floats one = all(q[m * depth + d]);
        UNROLL for (int v = 0; v < VECTORS; v++) sum[m][v] = multiply_add(one, key[v], sum[m][v]);
      }
    }
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int v = 0; v < VECTORS; v++) store_floats(scores + m * width + j + v * LANES, sum[m][v]);
  }
}

template <int M, int V, typename Number>
INLINE void values_of(const float* weights, int64_t width, const float* v, int64_t depth, int64_t keys, const float* shares,
                      Number* y, int64_t stride) {
  Floats sum[M][V];
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int i = 0; i < V; i++) sum[m][i] = all(0.0f);
  for (int64_t j = 0; j < keys; j++) {
    Floats value[V];
    UNROLL for (int i = 0; i < V; i++) value[i] = load_floats(v + j * depth + i * LANES);
    UNROLL for (int m = 0; m < M; m++) {
      const Floats weight = all(weights[m * width + j]);
      UNROLL for (int i = 0; i < V; i++) sum[m][i] = multiply_add(weight, value[i], sum[m][i]);
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int i = 0; i < V; i++) store_as(y + m * stride + i * LANES, multiply(sum[m][i], all(shares[m])));
}

// with(scores[j], mask[j * step]) for all keys, which can be vectors where step is 1.
template <typename Number, typename Masked>
INLINE void masked(float* scores, int64_t keys, const Number* mask, int64_t step, Masked with) {
  if (step == 1)
    for (int64_t j = 0; j < keys; j++) scores[j] = with(scores[j], mask[j]);
  else
    for (int64_t j = 0; j < keys; j++) scores[j] = with(scores[j], mask[j * step]);
}

// Adds the mask to the scores of one query, makes them weights, and returns one over their sum; 0 where no key is seen.
template <typename Number>
float softmax(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t keys, int64_t width, float* scores) {
  if (p.mask_kind) {
    const int64_t at = b * p.mask_strides[0] + h * p.mask_strides[1] + i * p.mask_strides[2], step = p.mask_strides[3];
    if (p.mask_kind == 1) {
      masked(scores, keys, (const uint8_t*)p.mask + at, step, [](float score, uint8_t seen) { return seen ? score : NONE; });
    } else {
      masked(scores, keys, (const Number*)p.mask + at, step, [](float score, Number added) {
        const float sum = score + as_float(added);
        return sum < NONE ? NONE : sum;
      });
    }
  }
  for (int64_t j = keys; j < width; j++) scores[j] = NONE;
  Floats most = all(NONE), sum = all(0.0f), odd = all(0.0f);
  for (int64_t j = 0; j < width; j += LANES) {
    const Floats score = load_floats(scores + j);
    most = larger(most, score);
    odd = multiply_add(score, all(0.0f), odd);  // a number that is not finite gives NaN
  }
  if (sum_of(odd) != 0) return __builtin_nanf("");
  const float largest = largest_of(most);
  if (largest == NONE) {
    memset(scores, 0, width * sizeof(float));
    return 0;
  }
  for (int64_t j = 0; j < width; j += LANES) {
    const Floats less = subtract(load_floats(scores + j), all(largest));
    // Below exp's range a weight is zero, and so is that of a key that is not seen.
    const Floats weight = zero_below(exponential(less), less, -87.0f);
    store_floats(scores + j, weight);
    sum = add(sum, weight);
  }
  return 1 / sum_of(sum);
}

template <int M, typename Number>
void rows_of(const Problem& p, int64_t b, int64_t h, int64_t i, const float* kt, const float* v, float* scratch) {
  const int64_t width = padded(p.keys), last = p.is_causal && i + M < p.keys ? i + M : p.keys;
  float *scores = scratch, *q = scratch + ROWS * width, shares[M];
  for (int m = 0; m < M; m++) {
    const Number* from = (const Number*)p.q + b * p.q_strides[0] + h * p.q_strides[1] + (i + m) * p.q_strides[2];
    for (int64_t d = 0; d < p.depth; d++) q[m * p.depth + d] = as_float(from[d]) * p.scale;
  }
  scores_of<M>(q, kt, p.depth, width, last, scores);
  for (int m = 0; m < M; m++) {
    const int64_t seen = p.is_causal && i + m + 1 < last ? i + m + 1 : last;
    shares[m] = softmax<Number>(p, b, h, i + m, seen, padded(last), scores + m * width);
  }
  const int64_t stride = p.heads * p.depth;
  Number* y = (Number*)p.y + ((b * p.queries + i) * p.heads + h) * p.depth;
  int64_t d = 0;
  for (; d + VECTORS * LANES <= p.depth; d += VECTORS * LANES)
    values_of<M, VECTORS>(scores, width, v + d, p.depth, last, shares, y + d, stride);
  for (; d + 2 * LANES <= p.depth; d += 2 * LANES) values_of<M, 2>(scores, width, v + d, p.depth, last, shares, y + d, stride);
  for (; d < p.depth; d += LANES) values_of<M, 1>(scores, width, v + d, p.depth, last, shares, y + d, stride);
}

#if defined(__AVX512VNNI__)

// The same with products of bfloat16. `keys` [depth / 2][width] and `values` [width / 2][depth] are pairs: of neighbours in depth,
// and of neighbouring keys.
constexpr int64_t TALL = 12;   // rows at a time
constexpr int64_t PAIRED = 32;  // what depth has to be a multiple of

INLINE Ints load_paired(const float* p) { return to_bfloat16(load_floats(p), load_floats(p + LANES)); }
INLINE Ints load_paired(const uint16_t* p) { return load_ints(p); }
INLINE Ints load_two(const float* a, const float* b) { return to_bfloat16(load_floats(a), load_floats(b)); }
INLINE Ints load_two(const uint16_t* a, const uint16_t* b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)), _mm256_loadu_si256((const __m256i*)b), 1);
}

INLINE void scores_of_pairs(const uint16_t* q, const uint32_t* keys, int64_t depth, int64_t width, int64_t count, float* scores) {
  constexpr int M = 6, V = 4;
  for (int64_t j = 0; j < count; j += V * LANES) {
    Floats sum[M][V];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++) sum[m][v] = all(0.0f);
    for (int64_t d = 0; d < depth / 2; d++) {
      Ints key[V];
      UNROLL for (int v = 0; v < V; v++) key[v] = load_ints(keys + d * width + j + v * LANES);
      UNROLL for (int m = 0; m < M; m++) {
        const Ints two = all_four(q + m * depth + 2 * d);
        UNROLL for (int v = 0; v < V; v++) sum[m][v] = dot_pairs(sum[m][v], two, key[v]);
      }
    }
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int v = 0; v < V; v++) store_floats(scores + m * width + j + v * LANES, sum[m][v]);
  }
}

// Of `rows` rows, which may be fewer than M.
template <int M, int V, typename Number>
INLINE void values_of_pairs(const uint16_t* weights, int64_t width, const uint32_t* values, int64_t depth, int64_t keys,
                            const float* shares, int64_t rows, Number* y, int64_t stride) {
  Floats sum[M][V];
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int i = 0; i < V; i++) sum[m][i] = all(0.0f);
  for (int64_t j = 0; j < (keys + 1) / 2; j++) {
    Ints value[V];
    UNROLL for (int i = 0; i < V; i++) value[i] = load_ints(values + j * depth + i * LANES);
    UNROLL for (int m = 0; m < M; m++) {
      const Ints two = all_four(weights + m * width + 2 * j);
      UNROLL for (int i = 0; i < V; i++) sum[m][i] = dot_pairs(sum[m][i], two, value[i]);
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    if (m < rows) UNROLL for (int i = 0; i < V; i++) store_as(y + m * stride + i * LANES, multiply(sum[m][i], all(shares[m])));
}

// As `softmax`, into weights of bfloat16: 2^x needs no more terms than these show. Numbers that are none stay so.
constexpr float EXP2[] = {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
template <typename Number>
INLINE float softmax_of_pairs(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t keys, int64_t width, float* scores,
                              uint16_t* weights) {
  const int64_t at = b * p.mask_strides[0] + h * p.mask_strides[1] + i * p.mask_strides[2], step = p.mask_strides[3];
  const bool is_bool = p.mask_kind == 1 && step == 1, is_number = p.mask_kind == 2 && step == 1;
  const Floats none = all(NONE), scale = all(p.scale);
  Floats most = none;
  if (p.mask_kind && step != 1) {
    for (int64_t j = 0; j < keys; j++) {
      float score = scores[j] * p.scale;
      if (p.mask_kind == 1)
        score = ((const uint8_t*)p.mask)[at + j * step] ? score : NONE;
      else
        score += as_float(((const Number*)p.mask)[at + j * step]);
      scores[j] = score < NONE ? NONE : score;
    }
  }
  for (int64_t j = 0; j < width; j += LANES) {
    const int64_t left = keys - j;
    const __mmask16 there = left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
    Floats score = load_floats(scores + j);
    if (!p.mask_kind || step == 1) score = multiply(score, scale);
    __mmask16 seen = there;
    if (is_bool) {
      const __m128i bytes = _mm_maskz_loadu_epi8(there, (const uint8_t*)p.mask + at + j);
      seen = _mm_test_epi8_mask(bytes, bytes);
    } else if (is_number) {
      Floats added;
      if (sizeof(Number) == 4)
        added = _mm512_maskz_loadu_ps(there, (const float*)p.mask + at + j);
      else
        added = as_floats(shift_left(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, (const uint16_t*)p.mask + at + j)), 16));
      score = add(score, added);
      seen = _mm512_mask_cmp_ps_mask(there, score, none, _CMP_NLT_UQ);
    }
    score = _mm512_mask_mov_ps(none, seen, score);
    store_floats(scores + j, score);
    most = larger(most, score);
  }
  const float largest = _mm512_reduce_max_ps(most);
  if (largest == NONE) {
    memset(weights, 0, width * 2);
    return 0;
  }
  Floats sum = all(0.0f);
  const auto weight = [&](int64_t j) {
    const Floats less = multiply(subtract(load_floats(scores + j), all(largest)), all(1.44269504f)), n = whole(less);
    const Floats power = _mm512_scalef_ps(polynomial(EXP2, subtract(less, n)), n);
    const Floats found = zero_below(power, less, -125.0f);
    sum = add(sum, found);
    return found;
  };
  for (int64_t j = 0; j < width; j += 2 * LANES) {
    const Floats low = weight(j), high = weight(j + LANES);
    store_ints(weights + j, to_bfloat16(low, high));
  }
  return 1 / sum_of(sum);
}

template <typename Number>
void some_rows_of_pairs(const Problem& p, int64_t b, int64_t group, int64_t from, int64_t to, float* scratch) {
  const int64_t width = padded(p.keys), times = p.heads / p.kv_heads, depth = p.depth;
  uint32_t *keys = (uint32_t*)scratch, *values = keys + width * depth / 2;
  float* scores = (float*)(values + width * depth / 2);
  uint16_t *weights = (uint16_t*)(scores + TALL * width), *q = weights + TALL * width;
  const Number* key = (const Number*)p.k + b * p.k_strides[0] + group * p.k_strides[1];
  const Number* value = (const Number*)p.v + b * p.v_strides[0] + group * p.v_strides[1];
  for (int64_t j = 0; j < width; j += LANES)
    for (int64_t d = 0; d < depth; d += PAIRED) {
      Ints r[16];
      for (int i = 0; i < 16; i++) r[i] = j + i < p.keys ? load_paired(key + (j + i) * p.k_strides[2] + d) : all(0);
      transpose(r);
      for (int i = 0; i < 16; i++) store_ints(keys + (d / 2 + i) * width + j, r[i]);
    }
  uint16_t order[32];
  for (int i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
  Number zeros[LANES] = {};
  for (int64_t j = 0; j < p.keys; j += 2)
    for (int64_t d = 0; d < depth; d += LANES) {
      const Number* second = j + 1 < p.keys ? value + (j + 1) * p.v_strides[2] + d : zeros;
      store_ints(values + j / 2 * depth + d, _mm512_permutexvar_epi16(load_ints(order), load_two(value + j * p.v_strides[2] + d, second)));
    }
  const int64_t stride = p.heads * depth;
  for (int64_t h = group * times; h < (group + 1) * times; h++)
    for (int64_t i = from; i < to; i += TALL) {
      const int64_t rows = to - i < TALL ? to - i : TALL, last = p.is_causal && i + rows < p.keys ? i + rows : p.keys;
      float shares[TALL];
      for (int64_t m = 0; m < (rows + 5) / 6 * 6; m++) {
        const Number* one = (const Number*)p.q + b * p.q_strides[0] + h * p.q_strides[1] + (i + (m < rows ? m : 0)) * p.q_strides[2];
        for (int64_t d = 0; d < depth; d += PAIRED) store_ints(q + m * depth + d, load_paired(one + d));
      }
      for (int64_t m = 0; m < rows; m += 6) scores_of_pairs(q + m * depth, keys, depth, width, last, scores + m * width);
      for (int64_t m = 0; m < rows; m++) {
        const int64_t seen = p.is_causal && i + m + 1 < last ? i + m + 1 : last;
        shares[m] = softmax_of_pairs<Number>(p, b, h, i + m, seen, padded(last), scores + m * width, weights + m * width);
      }
      Number* y = (Number*)p.y + ((b * p.queries + i) * p.heads + h) * depth;
      int64_t d = 0;
      for (; d + 4 * LANES <= depth; d += 4 * LANES)
        for (int64_t m = 0; m < rows; m += 6)
          values_of_pairs<6, 4>(weights + m * width, width, values + d, depth, last, shares + m, rows - m, y + m * stride + d, stride);
      for (; d < depth; d += 2 * LANES) {
        if (rows > 6)
          values_of_pairs<12, 2>(weights, width, values + d, depth, last, shares, rows, y + d, stride);
        else
          values_of_pairs<6, 2>(weights, width, values + d, depth, last, shares, rows, y + d, stride);
      }
    }
}

#endif

template <typename Number>
void some_rows(const Problem& p, int64_t b, int64_t group, int64_t from, int64_t to, float* scratch) {
#if defined(__AVX512VNNI__)
  if (p.is_rough && p.depth % PAIRED == 0) return some_rows_of_pairs<Number>(p, b, group, from, to, scratch);
#endif
  const int64_t width = padded(p.keys), times = p.heads / p.kv_heads;
  float *kt = scratch, *v = kt + width * p.depth, *rest = v + width * p.depth;
  const Number* key = (const Number*)p.k + b * p.k_strides[0] + group * p.k_strides[1];
  const Number* value = (const Number*)p.v + b * p.v_strides[0] + group * p.v_strides[1];
  for (int64_t j = 0; j < width; j += LANES)
    for (int64_t d = 0; d < p.depth; d += LANES) {
      Ints r[LANES];
      for (int i = 0; i < LANES; i++) r[i] = j + i < p.keys ? as_ints(load_as_floats(key + (j + i) * p.k_strides[2] + d)) : all(0);
      transpose(r);
      for (int i = 0; i < LANES; i++) store_ints(kt + (d + i) * width + j, r[i]);
    }
  for (int64_t j = 0; j < p.keys; j++)
    for (int64_t d = 0; d < p.depth; d += LANES) store_floats(v + j * p.depth + d, load_as_floats(value + j * p.v_strides[2] + d));
  for (int64_t h = group * times; h < (group + 1) * times; h++) {
    int64_t i = from;
    for (; i + ROWS <= to; i += ROWS) rows_of<ROWS, Number>(p, b, h, i, kt, v, rest);
    for (; i < to; i++) rows_of<1, Number>(p, b, h, i, kt, v, rest);
  }
}

}  // namespace
}  // namespace attend
