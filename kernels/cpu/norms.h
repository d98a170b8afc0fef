// Norms of one row, with the residual sum in front of them: what between.cpp and int8_rows.cpp share.
#pragma once
#include "vectors.h"

namespace norms {
namespace {

INLINE Floats as_stored(float, Floats v) { return v; }
INLINE Floats as_stored(uint16_t, Floats v) {
  uint16_t some[LANES];
  store_as(some, v);
  return load_as_floats(some);
}

// A row of x + other, rounded as it is stored, into sum where there is one; returns it in floats in `row`.
template <typename Number>
INLINE void added(const Number* x, const Number* other, int64_t columns, Number* sum, float* row) {
  for (int64_t i = 0; i < columns; i += LANES) {
    Floats value = load_some(x + i, columns - i);
    if (other) value = as_stored(Number(), add(value, load_some(other + i, columns - i)));
    if (sum) store_some(sum + i, value, columns - i);
    store_floats(row + i, value);
  }
}

// other, sum, and the gains of a layer norm: null where there is none. row: floats, `columns` rounded up to LANES.
template <typename Number>
INLINE void rms_norm(const Number* x, const Number* other, const Number* weight, float eps, int64_t columns, Number* y, Number* sum,
                     float* row) {
  added(x, other, columns, sum, row);
  Floats squares = all(0.0f);
  for (int64_t i = 0; i < columns; i += LANES) squares = multiply_add(load_floats(row + i), load_floats(row + i), squares);
  const Floats inverse = all(1 / __builtin_sqrtf(sum_of(squares) / columns + eps));
  for (int64_t i = 0; i < columns; i += LANES) {
    const Floats normed = as_stored(Number(), multiply(load_floats(row + i), inverse));
    store_some(y + i, multiply(load_some(weight + i, columns - i), normed), columns - i);
  }
}

template <typename Number>
INLINE void layer_norm(const Number* x, const Number* other, const Number* weight, const Number* bias, float eps, int64_t columns,
                       Number* y, Number* sum, float* row) {
  added(x, other, columns, sum, row);
  Floats total = all(0.0f), squares = all(0.0f);
  for (int64_t i = 0; i < columns; i += LANES) total = add(total, load_floats(row + i));
  const float mean = sum_of(total) / columns;
  for (int64_t i = 0; i < columns; i += LANES) {
    Floats value = subtract(load_floats(row + i), all(mean));
    store_floats(row + i, value);
    if (columns - i < LANES) {
      float some[LANES] = {};
      memcpy(some, row + i, (columns - i) * sizeof(float));
      value = load_floats(some);
    }
    squares = multiply_add(value, value, squares);
  }
  const Floats inverse = all(1 / __builtin_sqrtf(sum_of(squares) / columns + eps));
  for (int64_t i = 0; i < columns; i += LANES) {
    const int64_t left = columns - i;
    Floats value = multiply(load_floats(row + i), inverse);
    if (weight) value = multiply(value, load_some(weight + i, left));
    if (bias) value = add(value, load_some(bias + i, left));
    store_some(y + i, value, left);
  }
}

}  // namespace
}  // namespace norms
