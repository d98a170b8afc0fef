// Products of int8 weights and rows of numbers that are rounded to int8 as they come: what int8_linear.cpp and int8_rows.cpp share.
//
// weight   int8 [N/16][K/4][64]      byte 4r+j of a block: w[r][k+j], r of 16 outputs; zeros beyond N and K
// scale    float32 [N], sum int32 [N]: of each row of the weight; both as long as the weight is
//
// A row of x is moved up to uint8, because u8 x s8 is what VNNI multiplies; what that adds is 128 * sum. Without VNNI, where such
// products saturate, both are widened to 16 bits: x as it is quantized, the weight as it is read. The integers are the same.
#pragma once
#include "vectors.h"

namespace product {
namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool VNNI = true;
#else
constexpr bool VNNI = false;
#endif
constexpr int PANEL = 16;
constexpr int PARTS = PANEL / LANES;
constexpr int ROWS = LANES == 16 ? 6 : 4;
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int OUTPUTS = VECTORS * LANES;
constexpr int64_t BLOCK = 384;   // rows that are quantized before they are multiplied: an even number
constexpr int64_t DEPTH = VNNI ? 4096 : 512;  // columns at a time: so much of a panel stays in the L2, or widened in the L1
constexpr int64_t SOON = 2048;   // bytes ahead that weights are fetched which are read once
constexpr float SPLIT = 254;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Quantum = uint8_t;
using Wide = Ints;
INLINE Wide widened(Ints v) { return v; }
INLINE Wide all_quanta(const Quantum* q) { return all_four(q); }
INLINE Wide load_wide(const void* p) { return load_ints(p); }
INLINE void store_wide(void*, Wide) {}
INLINE void store_quanta(Quantum* q, Ints v) { store_bytes(q, v); }
#else
using Quantum = int16_t;  // of four in a row, those that a widened weight pairs: 0 2 1 3
INLINE void store_quanta(Quantum* q, Ints v) {
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storeu_si128((__m128i*)q, _mm_shufflehi_epi16(_mm_shufflelo_epi16(shorts, 0xd8), 0xd8));
}
struct Wide {
  Ints even, odd;
};
INLINE Wide widened(Ints v) { return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)}; }
INLINE Wide all_quanta(const Quantum* q) { return {all_four(q), all_four(q + 2)}; }
INLINE Wide load_wide(const void* p) { return {load_ints(p), load_ints((const Ints*)p + 1)}; }
INLINE void store_wide(void* p, Wide v) {
  store_ints(p, v.even);
  store_ints((Ints*)p + 1, v.odd);
}
INLINE Ints dot(Ints sum, Wide a, Wide b) {
  return add(add(sum, _mm256_madd_epi16(a.even, b.even)), _mm256_madd_epi16(a.odd, b.odd));
}
#endif
enum Activation { NONE, RELU, GELU, GELU_TANH, SILU };

struct Weight {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
  int64_t columns, outputs;
};

struct Quantized {
  Quantum* q;          // [rows][stride]
  float* scale;        // [rows]
  int32_t* zero;       // [rows]
  int64_t stride;
};

// The rational erf of Eigen, as in gelu.py.
constexpr float ERF_P[] = {-2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                           -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
constexpr float ERF_Q[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                           -1.42647390514189e-02f};
INLINE Floats gelu(Floats x) {
  const Floats y = smaller(larger(multiply(x, all(0.70710678118654752f)), all(-4.0f)), all(4.0f)), square = multiply(y, y);
  const Floats erf = quotient(multiply(y, polynomial(ERF_P, square)), polynomial(ERF_Q, square));
  return multiply(multiply(all(0.5f), x), add(all(1.0f), erf));
}

INLINE Floats activated(Floats x, Activation activation) {
  switch (activation) {
    case RELU: return larger(all(0.0f), x);
    case GELU: return gelu(x);
    case GELU_TANH: {
      const Floats cube = multiply(multiply(x, x), x);
      return multiply(x, sigmoid(multiply(all(1.5957691216057308f), multiply_add(cube, all(0.044715f), x))));
    }
    case SILU: return multiply(x, sigmoid(x));
    default: return x;
  }
}

// Columns [from, to) of rows [M] by V vectors, added to sums [M][OUTPUTS], or put there where they are the first. ahead: bytes from
// weights that are read to those that are fetched.
template <int M, int V, bool WIDENED>
INLINE void tile(const int8_t* const* w, const Quantum* x, int64_t stride, int64_t from, int64_t to, int64_t ahead, bool is_first,
                 int32_t* sums) {
  Ints total[M][V];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < V; v++) total[m][v] = is_first ? all(0) : load_ints(sums + m * OUTPUTS + v * LANES);
  for (int64_t k = from; k < to; k += 4) {
    Wide weight[V];
    UNROLL for (int v = 0; v < V; v++) {
      weight[v] = WIDENED ? load_wide(w[v] + 2 * k * PANEL) : widened(load_ints(w[v] + k * PANEL));
      if (!WIDENED && v % PARTS == 0) _mm_prefetch((const char*)w[v] + k * PANEL + ahead, _MM_HINT_T0);
    }
    UNROLL for (int m = 0; m < M; m++) {
      const Wide four = all_quanta(x + m * stride + k);
      UNROLL for (int v = 0; v < V; v++) total[m][v] = dot(total[m][v], four, weight[v]);
    }
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++) store_ints(sums + m * OUTPUTS + v * LANES, total[m][v]);
}

template <int V, bool WIDENED, typename... Rest>
INLINE void rows_of(int64_t rows, Rest... rest) {
  switch (rows) {
    case 6: tile<6, V, WIDENED>(rest...); break;
    case 5: tile<5, V, WIDENED>(rest...); break;
    case 4: tile<4, V, WIDENED>(rest...); break;
    case 3: tile<3, V, WIDENED>(rest...); break;
    case 2: tile<2, V, WIDENED>(rest...); break;
    case 1: tile<1, V, WIDENED>(rest...); break;
  }
}

// What follows the integers: rows [first, last) of x, a vector of outputs at n.
template <typename Number>
INLINE void finish(const Weight& w, const Quantized& x, bool is_split, int64_t first, int64_t last, int64_t n, const int32_t* sums,
                   const float* bias, Activation activation, Number* y) {
  if (n >= w.outputs) return;  // the second half of a panel that the weight does not fill
  const Ints column_sum = load_ints(w.sum + n);
  const Floats scale = load_floats(w.scale + n), added = bias ? load_floats(bias + n) : all(0.0f);
  for (int64_t row = first; row < last; row += 1 + is_split) {
    const Ints less = multiply(column_sum, all(x.zero[row]));
    Floats value = to_floats(subtract(load_ints(sums + (row - first) * OUTPUTS), less));
    if (is_split) {
      const Floats rest = to_floats(subtract(load_ints(sums + (row + 1 - first) * OUTPUTS), less));
      value = multiply_add(rest, all(1 / SPLIT), value);
    }
    value = activated(add(multiply(multiply(value, scale), all(x.scale[row])), added), activation);
    Number* out = y + (is_split ? row / 2 : row) * w.outputs + n;
    store_some(out, value, w.outputs - n);
  }
}

// Rows [first, last) of x by V vectors of outputs, from output n on.
template <int V, typename Number>
void outputs_of(const Weight& w, const Quantized& x, bool is_split, int64_t first, int64_t last, int64_t n, int32_t* sums,
                const float* bias, Activation activation, Number* y) {
  const int8_t* q[V];
  for (int v = 0; v < V; v++) {
    const int64_t vector = n / LANES + v;
    q[v] = w.q + vector / PARTS * w.columns * PANEL + vector % PARTS * LANES * 4;
  }
  // As few passes over the weight as there can be, alike in rows; both halves of a row are in one.
  const int times = 1 + is_split;
  const int64_t units = (last - first) / times, passes = (units * times + ROWS - 1) / ROWS;
  // A weight that fits into the L2 is gone through once, and what comes out is finished while it is in the L1.
  const bool is_whole = w.columns <= DEPTH;
  // Its weights are in the L1 after the first pass: what can be fetched then are the next ones.
  const int64_t ahead = is_whole && passes > 1 ? w.columns * V * LANES : SOON;
  const bool widens = !VNNI && passes > 2;
  int8_t buffer[VNNI ? 1 : DEPTH * PANEL * 2], *wide[V];
  for (int64_t from = 0; from < w.columns; from += DEPTH) {
    const int64_t to = w.columns - from < DEPTH ? w.columns : from + DEPTH;
    if (widens)
      for (int v = 0; v < V; v++) {
        wide[v] = buffer + v * LANES * 8 - 2 * from * PANEL;
        for (int64_t k = from; k < to; k += 4) store_wide(wide[v] + 2 * k * PANEL, widened(load_ints(q[v] + k * PANEL)));
      }
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t row = units * pass / passes * times, next = units * (pass + 1) / passes * times;
      const Quantum* at = x.q + (first + row) * x.stride;
      int32_t* into = is_whole ? sums : sums + row * OUTPUTS;
      if (widens)
        rows_of<V, true>(next - row, wide, at, x.stride, from, to, ahead, !from, into);
      else
        rows_of<V, false>(next - row, q, at, x.stride, from, to, ahead, !from, into);
      if (to == w.columns)
        for (int v = 0; v < V; v++)
          finish(w, x, is_split, first + row, first + next, n + v * LANES, into + v * LANES, bias, activation, y);
    }
  }
}

// All outputs of rows [first, last) of x, on one thread.
template <typename Number>
void outputs(const Weight& w, const Quantized& x, bool is_split, int64_t first, int64_t last, const float* bias,
             Activation activation, Number* y) {
  int32_t sums[BLOCK * OUTPUTS];
  const int64_t padded = (w.outputs + PANEL - 1) / PANEL * PANEL;
  int64_t n = 0;
  for (; n + OUTPUTS <= padded; n += OUTPUTS) outputs_of<VECTORS>(w, x, is_split, first, last, n, sums, bias, activation, y);
  for (; n < w.outputs; n += LANES) outputs_of<1>(w, x, is_split, first, last, n, sums, bias, activation, y);
}

template <typename Number>
void quantize(const Number* x, int64_t columns, Quantum* q, float* scale, int32_t* zero) {
  Floats least = all(0.0f), most = all(0.0f), odd = all(0.0f);
  for (int64_t i = 0; i < columns; i += LANES) {
    const Floats v = load_some(x + i, columns - i);
    least = smaller(least, v);
    most = larger(most, v);
    odd = multiply_add(v, all(0.0f), odd);  // a number that is not finite gives NaN
  }
  const float lo = -largest_of(subtract(all(0.0f), least)), span = largest_of(most) - lo;
  const float step = span <= 1e-30f ? 1 : span / 255, inverse = 1 / step;
  const float z = __builtin_nearbyintf(-128 - lo * inverse);
  const Floats up = all(z + 128);
  for (int64_t i = 0; i < columns; i += LANES) {
    const Floats v = add(whole(multiply(load_some(x + i, columns - i), all(inverse))), up);
    store_quanta(q + i, clamp(rounded(v), 0, 255));
  }
  *scale = sum_of(odd) == 0 ? step : __builtin_nanf("");
  *zero = (int32_t)z + 128;
}

template <typename Number>
void quantize_split(const Number* x, int64_t columns, Quantum* first, Quantum* rest, float* scale, int32_t* zero) {
  Floats most = all(0.0f), odd = all(0.0f);
  for (int64_t i = 0; i < columns; i += LANES) {
    const Floats v = load_some(x + i, columns - i);
    most = larger(most, magnitude(v));
    odd = multiply_add(v, all(0.0f), odd);
  }
  const float range = largest_of(most), step = range <= 1e-30f ? 1 : range / 127, inverse = 1 / step;
  for (int64_t i = 0; i < columns; i += LANES) {
    const Floats v = multiply(load_some(x + i, columns - i), all(inverse)), q = whole(v);
    store_quanta(first + i, clamp(rounded(add(q, all(128.0f))), 0, 255));
    store_quanta(rest + i, clamp(rounded(add(whole(multiply(subtract(v, q), all(SPLIT))), all(128.0f))), 0, 255));
  }
  *scale = sum_of(odd) == 0 ? step : __builtin_nanf("");
  *zero = 128;
}

int64_t stride_of(int64_t columns) { return (columns + 63) / 64 * 64; }
int64_t bytes_of(int64_t rows, int64_t columns) { return rows * (stride_of(columns) * (int64_t)sizeof(Quantum) + 8); }

}  // namespace
}  // namespace product
