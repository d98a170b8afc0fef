// y = x @ w^T + bias over int4 weights in groups along K, with x rounded to int8 by runs of 32 or 64 numbers.
//
// weight   uint8 [N/16][K/8][64]     byte 4r+j of a block: low half q[r][k+j], high half q[r][k+4+j], r of 16 outputs
// scale    [N/16][K/group][16]       float32 or bfloat16
// zero     uint8, as scale           or null: 8 everywhere
//
// Sixteen outputs lie beside each other, so that no sum goes across a vector, and a product of bytes is u4 x s8, which does not
// saturate in 16 bits either. The layout is that of ik_llama.cpp's Q4_0_R16 without its scales between.
#include "vectors.h"

namespace {

constexpr int PANEL = 16;               // outputs beside each other
constexpr int PARTS = PANEL / LANES;    // vectors in a panel
constexpr int ROWS = LANES == 16 ? 6 : 3;  // rows of x at a time, as many as registers hold
constexpr int64_t BLOCK = 384;          // rows that are quantized before they are multiplied

struct Weight {
  const uint8_t* q;
  const void* scale;  // float32 or bfloat16
  const uint8_t* zero;
  int64_t columns, outputs;
  int group;
};

struct Quantized {
  const int8_t* q;       // [rows][columns]
  const float* scale;    // [rows][columns / run]
  const int32_t* sum;    // as scale
  int run;
};

// Rows [M] by V vectors of outputs, from output n on, into sums [M][V * LANES].
template <int M, int V, typename Scale>
INLINE void tile(const Weight& w, const Quantized& x, int64_t row, int64_t n, float* sums) {
  const int64_t groups = w.columns / w.group, runs = w.columns / x.run, per_group = w.group / x.run;
  const uint8_t* q[V];
  int64_t at[V];
  UNROLL for (int v = 0; v < V; v++) {
    const int64_t vector = n / LANES + v, panel = vector / PARTS, part = vector % PARTS * LANES;
    q[v] = w.q + panel * w.columns * 8 + part * 4;
    at[v] = panel * groups * PANEL + part;
  }
  const int8_t* from[M];
  UNROLL for (int m = 0; m < M; m++) from[m] = x.q + (row + m) * w.columns;
  Floats total[M][V];
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++) total[m][v] = all(0.0f);
  for (int64_t g = 0; g < groups; g++) {
    Floats scale[V];
    UNROLL for (int v = 0; v < V; v++) scale[v] = load_as_floats((const Scale*)w.scale + at[v] + g * PANEL);
    for (int64_t r = g * per_group; r < (g + 1) * per_group; r++) {
      Ints low[M][V], high[M][V];
      UNROLL for (int m = 0; m < M; m++) {
        const Ints less = all(-x.sum[(row + m) * runs + r]);
        UNROLL for (int v = 0; v < V; v++) {
          low[m][v] = w.zero ? multiply_short(from_bytes(w.zero + at[v] + g * PANEL), less) : shift_left(less, 3);
          if (M * V < 8) high[m][v] = all(0);
        }
      }
      for (int64_t k = r * x.run; k < (r + 1) * x.run; k += 8) {
        Ints even[V], odd[V];
        UNROLL for (int v = 0; v < V; v++) {
          const Ints both = load_ints(q[v] + k * 8);
          if (v % PARTS == 0) _mm_prefetch((const char*)q[v] + k * 8 + 2048, _MM_HINT_T0);
          even[v] = low_nibbles(both);
          odd[v] = high_nibbles(both);
        }
        UNROLL for (int m = 0; m < M; m++) {
          const Ints first = all_four(from[m] + k), second = all_four(from[m] + k + 4);
          UNROLL for (int v = 0; v < V; v++) low[m][v] = dot(low[m][v], even[v], first);
          UNROLL for (int v = 0; v < V; v++) {
            Ints& other = M * V < 8 ? high[m][v] : low[m][v];
            other = dot(other, odd[v], second);
          }
        }
      }
      UNROLL for (int m = 0; m < M; m++) {
        const Floats run_scale = all(x.scale[(row + m) * runs + r]);
        UNROLL for (int v = 0; v < V; v++) {
          const Ints sum = M * V < 8 ? add(low[m][v], high[m][v]) : low[m][v];
          total[m][v] = multiply_add(to_floats(sum), multiply(scale[v], run_scale), total[m][v]);
        }
      }
    }
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++) store_floats(sums + (m * V + v) * LANES, total[m][v]);
}

template <int M, int V, typename Scale, typename Number>
void rows_by_outputs(const Weight& w, const Quantized& x, int64_t row, int64_t n, const float* bias, Number* y) {
  float sums[M * V * LANES];
  tile<M, V, Scale>(w, x, row, n, sums);
  for (int m = 0; m < M; m++) {
    Number* out = y + (row + m) * w.outputs + n;
    float* sum = sums + m * V * LANES;
    if (bias) for (int i = 0; i < V * LANES && n + i < w.outputs; i++) sum[i] += bias[n + i];
    for (int v = 0; v < V; v++) store_some(out + v * LANES, load_floats(sum + v * LANES), w.outputs - n - v * LANES);
  }
}

template <int V, typename Scale, typename Number>
void outputs_of(const Weight& w, const Quantized& x, int64_t rows, int64_t n, const float* bias, Number* y) {
  // As few passes over the weight as there can be, alike in rows.
  const int64_t passes = (rows + ROWS - 1) / ROWS;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t row = rows * pass / passes;
    switch (rows * (pass + 1) / passes - row) {
      case 6: rows_by_outputs<6, V, Scale>(w, x, row, n, bias, y); break;
      case 5: rows_by_outputs<5, V, Scale>(w, x, row, n, bias, y); break;
      case 4: rows_by_outputs<4, V, Scale>(w, x, row, n, bias, y); break;
      case 3: rows_by_outputs<3, V, Scale>(w, x, row, n, bias, y); break;
      case 2: rows_by_outputs<2, V, Scale>(w, x, row, n, bias, y); break;
      case 1: rows_by_outputs<1, V, Scale>(w, x, row, n, bias, y); break;
    }
  }
}

// One run of a row: the largest magnitude at 127.
template <typename Number>
INLINE void quantize(const Number* x, int run, int8_t* q, float* scale, int32_t* sum) {
  Floats most = all(0.0f), odd = all(0.0f);
  for (int i = 0; i < run; i += LANES) {
    const Floats v = load_as_floats(x + i);
    most = larger(most, magnitude(v));
    odd = multiply_add(v, all(0.0f), odd);  // a number that is not finite gives NaN
  }
  const bool is_finite = sum_of(odd) == 0;
  const float range = largest_of(most), inverse = range > 1e-30f ? 127 / range : 0;
  Ints total = all(0);
  for (int i = 0; i < run; i += LANES) {
    const Ints v = clamp(rounded(multiply(load_as_floats(x + i), all(inverse))), -127, 127);
    store_bytes((uint8_t*)q + i, v);
    total = add(total, v);
  }
  *scale = is_finite ? range / 127 : __builtin_nanf("");
  *sum = sum_of(total);
}

template <typename Scale, typename Number>
void linear(const Weight& w, const Number* x, int64_t rows, const float* bias, Number* y, uint8_t* scratch, int threads) {
  const int run = w.group < 64 ? w.group : 64;
  const int64_t runs = w.columns / run, vectors = (w.outputs + LANES - 1) / LANES;
  const int64_t most = rows < BLOCK ? rows : BLOCK;
  float* scale = (float*)scratch;
  int32_t* sum = (int32_t*)(scale + most * runs);
  int8_t* q = (int8_t*)(sum + most * runs);
  const Quantized quantized{q, scale, sum, run};
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < rows; first += BLOCK) {
    const int64_t count = rows - first < BLOCK ? rows - first : BLOCK;
    const Number* from = x + first * w.columns;
    Number* to = y + first * w.outputs;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count * runs; i++) quantize(from + i * run, run, q + i * run, scale + i, sum + i);
    // One row is bound by the memory, from which four streams at a time come fastest; more rows by the registers.
    if (count == 1) {
#pragma omp for schedule(static)
      for (int64_t v = 0; v < vectors / 4; v++) rows_by_outputs<1, 4, Scale>(w, quantized, 0, v * 4 * LANES, bias, to);
#pragma omp for schedule(static)
      for (int64_t v = vectors / 4 * 4; v < vectors; v++) rows_by_outputs<1, 1, Scale>(w, quantized, 0, v * LANES, bias, to);
    } else {
#pragma omp for schedule(static)
      for (int64_t v = 0; v < vectors / 2; v++) outputs_of<2, Scale>(w, quantized, count, v * 2 * LANES, bias, to);
      if (vectors % 2) {
#pragma omp single
        outputs_of<1, Scale>(w, quantized, count, (vectors - 1) * LANES, bias, to);
      }
    }
  }
}

}  // namespace

extern "C" {

// Bytes of scratch for so many rows.
int64_t int4_linear_scratch(int64_t rows, int64_t columns, int group) {
  const int64_t run = group < 64 ? group : 64, most = rows < BLOCK ? rows : BLOCK;
  return most * (columns + columns / run * 8);
}

// x [rows][columns], y [rows][outputs]: float32, or bfloat16 where x_is_bfloat16. bias: float32 [outputs] or null.
void int4_linear(const void* x, int x_is_bfloat16, int64_t rows, int64_t columns, int64_t outputs, int group, const uint8_t* q,
                 const void* scale, int scale_is_bfloat16, const uint8_t* zero, const float* bias, void* y, uint8_t* scratch,
                 int threads) {
  const Weight w{q, scale, zero, columns, outputs, group};
  if (x_is_bfloat16 && scale_is_bfloat16)
    linear<uint16_t>(w, (const uint16_t*)x, rows, bias, (uint16_t*)y, scratch, threads);
  else if (x_is_bfloat16)
    linear<float>(w, (const uint16_t*)x, rows, bias, (uint16_t*)y, scratch, threads);
  else if (scale_is_bfloat16)
    linear<uint16_t>(w, (const float*)x, rows, bias, (float*)y, scratch, threads);
  else
    linear<float>(w, (const float*)x, rows, bias, (float*)y, scratch, threads);
}

}
