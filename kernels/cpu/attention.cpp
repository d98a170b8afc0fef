// softmax(scale * q @ k^T + mask) @ v, a few rows of q at a time over all keys at once: for as many keys as caches hold, where
// torch's flash attention, which goes through them in blocks, is half as fast.
#include "vectors.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int ROWS = LANES == 16 ? 6 : 3;
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr float NONE = -3.0e38f;  // below every score, and finite, so that it can be subtracted

constexpr int64_t FEW = 1 << 17;  // products, below which a second thread costs more than it does

// Strides in numbers; of each tensor the last dimension is contiguous. mask: bool, true for keys that are seen, or numbers that
// are added; null for none. Its strides are zero along what it does not depend on.
struct Problem {
  int64_t batch, heads, kv_heads, queries, keys, depth;
  int64_t is_few;  // so few queries that to lay keys and values out anew does not pay
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

template <typename Number>
void some_rows(const Problem& p, int64_t b, int64_t group, int64_t from, int64_t to, float* scratch) {
  const int64_t width = padded(p.keys), times = p.heads / p.kv_heads;
  float *kt = scratch, *v = kt + width * p.depth, *rest = v + width * p.depth;
  const Number* key = (const Number*)p.k + b * p.k_strides[0] + group * p.k_strides[1];
  const Number* value = (const Number*)p.v + b * p.v_strides[0] + group * p.v_strides[1];
  for (int64_t j = 0; j < width; j += LANES)
    for (int64_t d = 0; d < p.depth; d++)
      for (int64_t l = 0; l < LANES; l++) kt[d * width + j + l] = j + l < p.keys ? as_float(key[(j + l) * p.k_strides[2] + d]) : 0;
  for (int64_t j = 0; j < p.keys; j++)
    for (int64_t d = 0; d < p.depth; d += LANES) store_floats(v + j * p.depth + d, load_as_floats(value + j * p.v_strides[2] + d));
  for (int64_t h = group * times; h < (group + 1) * times; h++) {
    int64_t i = from;
    for (; i + ROWS <= to; i += ROWS) rows_of<ROWS, Number>(p, b, h, i, kt, v, rest);
    for (; i < to; i++) rows_of<1, Number>(p, b, h, i, kt, v, rest);
  }
}

// The heads of a group, where there are few queries: keys and values are read as they are.
template <typename Number>
void few_rows(const Problem& p, int64_t b, int64_t group, float* scratch) {
  const int64_t times = p.heads / p.kv_heads, width = padded(p.keys);
  float *q = scratch + width, *y = q + p.depth;
  const Number* key = (const Number*)p.k + b * p.k_strides[0] + group * p.k_strides[1];
  const Number* value = (const Number*)p.v + b * p.v_strides[0] + group * p.v_strides[1];
  for (int64_t h = group * times; h < (group + 1) * times; h++)
    for (int64_t i = 0; i < p.queries; i++) {
      const Number* from = (const Number*)p.q + b * p.q_strides[0] + h * p.q_strides[1] + i * p.q_strides[2];
      const int64_t seen = p.is_causal && i + 1 < p.keys ? i + 1 : p.keys;
      for (int64_t d = 0; d < p.depth; d += LANES) store_floats(q + d, multiply(load_as_floats(from + d), all(p.scale)));
      constexpr int AT_ONCE = 4;
      for (int64_t j = 0; j < seen; j += AT_ONCE) {
        Floats sum[AT_ONCE];
        UNROLL for (int n = 0; n < AT_ONCE; n++) sum[n] = all(0.0f);
        for (int64_t d = 0; d < p.depth; d += LANES) {
          const Floats part = load_floats(q + d);
          UNROLL for (int n = 0; n < AT_ONCE; n++) {
            const int64_t row = j + n < seen ? j + n : seen - 1;
            sum[n] = multiply_add(part, load_as_floats(key + row * p.k_strides[2] + d), sum[n]);
          }
        }
        UNROLL for (int n = 0; n < AT_ONCE; n++) scratch[j + n] = sum_of(sum[n]);
      }
      const Floats share = all(softmax<Number>(p, b, h, i, seen, padded(seen), scratch));
      for (int64_t d = 0; d < p.depth; d += LANES) {
        Floats one = all(0.0f), other = all(0.0f);
        int64_t j = 0;
        for (; j + 2 <= seen; j += 2) {
          one = multiply_add(all(scratch[j]), load_as_floats(value + j * p.v_strides[2] + d), one);
          other = multiply_add(all(scratch[j + 1]), load_as_floats(value + (j + 1) * p.v_strides[2] + d), other);
        }
        if (j < seen) one = multiply_add(all(scratch[j]), load_as_floats(value + j * p.v_strides[2] + d), one);
        store_floats(y + d, multiply(add(one, other), share));
      }
      Number* to = (Number*)p.y + ((b * p.queries + i) * p.heads + h) * p.depth;
      for (int64_t d = 0; d < p.depth; d += LANES) store_as(to + d, load_floats(y + d));
    }
}

template <typename Number>
void attention(const Problem& p, float* scratch, int threads) {
  const int64_t pairs = p.batch * p.kv_heads;
  int64_t shares = (2 * threads + pairs - 1) / pairs;
  if (threads == 1 || shares > p.queries / (8 * ROWS)) shares = threads > 1 && p.queries / (8 * ROWS) > 1 ? p.queries / (8 * ROWS) : 1;
  const int64_t size = floats_of(p);
  if (p.is_few) {
    const int64_t work = p.batch * p.heads * p.queries * p.keys * p.depth;
#pragma omp parallel for num_threads(threads) if (threads > 1 && work > FEW) schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++)
      few_rows<Number>(p, pair / p.kv_heads, pair % p.kv_heads, scratch + omp_get_thread_num() * size);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    float* own = scratch + omp_get_thread_num() * size;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < pairs * shares; job++) {
      const int64_t pair = job / shares, share = job % shares;
      some_rows<Number>(p, pair / p.kv_heads, pair % p.kv_heads, p.queries * share / shares, p.queries * (share + 1) / shares, own);
    }
  }
}

}  // namespace

extern "C" {

// Bytes of scratch.
int64_t attention_scratch(const int64_t* sizes, int threads) {
  const Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[19]};
  return floats_of(p) * threads * 4;
}

// sizes: batch, heads, heads of k and v, queries, keys, depth (a multiple of 16), then the strides of q, k, v and of the
// mask, then whether there are few queries.
void attention(const void* q, const void* k, const void* v, const void* mask, int is_bfloat16, int mask_kind, int is_causal,
               float scale, const int64_t* sizes, void* y, float* scratch, int threads) {
  Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[19], q, k, v, mask};
  for (int i = 0; i < 3; i++) {
    p.q_strides[i] = sizes[6 + i];
    p.k_strides[i] = sizes[9 + i];
    p.v_strides[i] = sizes[12 + i];
  }
  for (int i = 0; i < 4; i++) p.mask_strides[i] = sizes[15 + i];
  p.mask_kind = mask_kind;
  p.is_causal = is_causal;
  p.scale = scale;
  p.y = y;
  if (is_bfloat16)
    attention<uint16_t>(p, scratch, threads);
  else
    attention<float>(p, scratch, threads);
}

}
