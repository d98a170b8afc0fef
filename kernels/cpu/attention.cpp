// softmax(scale * q @ k^T + mask) @ v, a few rows of q at a time over all keys at once: for as many keys as caches hold, where
// torch's flash attention, which goes through them in blocks, is half as fast.
#include "attention.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace {

using namespace attend;

constexpr int64_t FEW = 1 << 17;  // products, below which a second thread costs more than it does

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
  const Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[19], sizes[20]};
  return floats_of(p) * threads * 4;
}

// sizes: batch, heads, heads of k and v, queries, keys, depth (a multiple of 16), then the strides of q, k, v and of the
// mask, then whether there are few queries, and whether products may be of bfloat16.
void attention(const void* q, const void* k, const void* v, const void* mask, int is_bfloat16, int mask_kind, int is_causal,
               float scale, const int64_t* sizes, void* y, float* scratch, int threads) {
  Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[19], sizes[20], q, k, v, mask};
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
