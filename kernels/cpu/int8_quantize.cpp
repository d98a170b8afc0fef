// Rounds rows of numbers to 127 levels on both sides of zero, each row with the scale of its largest number: fxc/schemes/int8.py
// says what is computed, to the same bits.
#include "vectors.h"

namespace {

template <typename Number>
int quantize(const Number* weight, int64_t rows, int64_t columns, float zero_row, int8_t* levels, float* scales, int threads) {
  int are_finite = 1;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(& : are_finite)
  for (int64_t r = 0; r < rows; r++) {
    const Number* row = weight + r * columns;
    Floats most = all(0.0f), odd = all(0.0f);
    for (int64_t i = 0; i < columns; i += LANES) {
      const Floats x = load_some(row + i, columns - i);
      most = larger(most, magnitude(x));
      odd = multiply_add(x, all(0.0f), odd);  // a number that is not finite gives NaN
    }
    if (sum_of(odd) != 0) { are_finite = 0; continue; }
    const float largest = largest_of(most), scale = largest <= zero_row ? 1.0f : largest / 127.0f;
    scales[r] = scale;
    int8_t* out = levels + r * columns;
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) store_bytes((uint8_t*)out + i, rounded(divide(load_as_floats(row + i), all(scale))));
    if (i < columns) {
      uint8_t some[LANES];
      store_bytes(some, rounded(divide(load_some(row + i, columns - i), all(scale))));
      memcpy(out + i, some, columns - i);
    }
  }
  return are_finite;
}

}  // namespace

// weight, levels: rows * columns numbers; scales: one for each row. Returns 0 where a number is none.
extern "C" int int8_quantize(const void* weight, int is_bfloat16, int64_t rows, int64_t columns, float zero_row, int8_t* levels,
                             float* scales, int threads) {
  if (is_bfloat16) return quantize((const uint16_t*)weight, rows, columns, zero_row, levels, scales, threads);
  return quantize((const float*)weight, rows, columns, zero_row, levels, scales, threads);
}
