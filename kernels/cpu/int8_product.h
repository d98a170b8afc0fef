// Products of int8 weights and rows of numbers that are rounded to int8 as they come: what int8_linear.cpp and int8_rows.cpp share.
//
// weight   int8 [N/16][K/4][64]      byte 4r+j of a block: w[r][k+j], r of 16 outputs; zeros beyond N and K
// scale    float32 [N], sum int32 [N]: of each row of the weight; both as long as the weight is
//
// A row of x is moved up to uint8, because u8 x s8 is what the CPU multiplies; what that adds is 128 * sum.
#pragma once
#include "vectors.h"

namespace product {
namespace {

constexpr int PANEL = 16;
constexpr int PARTS = PANEL / LANES;
constexpr int ROWS = LANES == 16 ? 6 : 4;
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int OUTPUTS = VECTORS * LANES;
constexpr int64_t BLOCK = 384;   // rows that are quantized before they are multiplied: an even number
constexpr int64_t DEPTH = 4096;  // columns at a time: so much of a panel stays in the L2
constexpr int64_t SOON = 2048;   // bytes ahead that weights are fetched which are read once
constexpr float SPLIT = 254;
enum Activation { NONE, RELU, GELU, GELU_TANH, SILU };

struct Weight {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
  int64_t columns, outputs;
};

struct Quantized {
  uint8_t* q;          // [rows][stride]
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
template <int M, int V>
INLINE void tile(const int8_t* const* w, const uint8_t* x, int64_t stride, int64_t from, int64_t to, int64_t ahead, bool is_first,
                 int32_t* sums) {
  Ints total[M][V];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < V; v++) total[m][v] = is_first ? all(0) : load_ints(sums + m * OUTPUTS + v * LANES);
  for (int64_t k = from; k < to; k += 4) {
    Ints weight[V];
    UNROLL for (int v = 0; v < V; v++) {
      weight[v] = load_ints(w[v] + k * PANEL);
      if (v % PARTS == 0) _mm_prefetch((const char*)w[v] + k * PANEL + ahead, _MM_HINT_T0);
    }
    UNROLL for (int m = 0; m < M; m++) {
      const Ints four = all_four(x + m * stride + k);
      UNROLL for (int v = 0; v < V; v++) total[m][v] = dot(total[m][v], four, weight[v]);
    }
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++) store_ints(sums + m * OUTPUTS + v * LANES, total[m][v]);
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
  for (int64_t from = 0; from < w.columns; from += DEPTH) {
    const int64_t to = w.columns - from < DEPTH ? w.columns : from + DEPTH;
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t row = units * pass / passes * times, next = units * (pass + 1) / passes * times;
      const uint8_t* at = x.q + (first + row) * x.stride;
      int32_t* into = is_whole ? sums : sums + row * OUTPUTS;
      switch (next - row) {
        case 6: tile<6, V>(q, at, x.stride, from, to, ahead, !from, into); break;
        case 5: tile<5, V>(q, at, x.stride, from, to, ahead, !from, into); break;
        case 4: tile<4, V>(q, at, x.stride, from, to, ahead, !from, into); break;
        case 3: tile<3, V>(q, at, x.stride, from, to, ahead, !from, into); break;
        case 2: tile<2, V>(q, at, x.stride, from, to, ahead, !from, into); break;
        case 1: tile<1, V>(q, at, x.stride, from, to, ahead, !from, into); break;
      }
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
void quantize(const Number* x, int64_t columns, uint8_t* q, float* scale, int32_t* zero) {
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
    store_bytes(q + i, clamp(rounded(v), 0, 255));
  }
  *scale = sum_of(odd) == 0 ? step : __builtin_nanf("");
  *zero = (int32_t)z + 128;
}

template <typename Number>
void quantize_split(const Number* x, int64_t columns, uint8_t* first, uint8_t* rest, float* scale, int32_t* zero) {
  Floats most = all(0.0f), odd = all(0.0f);
  for (int64_t i = 0; i < columns; i += LANES) {
    const Floats v = load_some(x + i, columns - i);
    most = larger(most, magnitude(v));
    odd = multiply_add(v, all(0.0f), odd);
  }
  const float range = largest_of(most), step = range <= 1e-30f ? 1 : range / 127, inverse = 1 / step;
  for (int64_t i = 0; i < columns; i += LANES) {
    const Floats v = multiply(load_some(x + i, columns - i), all(inverse)), q = whole(v);
    store_bytes(first + i, clamp(rounded(add(q, all(128.0f))), 0, 255));
    store_bytes(rest + i, clamp(rounded(add(whole(multiply(subtract(v, q), all(SPLIT))), all(128.0f))), 0, 255));
  }
  *scale = sum_of(odd) == 0 ? step : __builtin_nanf("");
  *zero = 128;
}

int64_t stride_of(int64_t columns) { return (columns + 63) / 64 * 64; }

}  // namespace
}  // namespace product
