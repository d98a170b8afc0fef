// What goes row by row between products: RMS and layer norms with the residual sum in front of them, rotary embedding, gates.
// Numbers are float32 or bfloat16, computed in float32; where aten rounds between its steps, this rounds at the end, but for what
// it returns and for RMS norms, which models round before their gain.
#include "norms.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int64_t FEW = 1 << 15;  // numbers, below which a second thread costs more than it does

template <typename Number>
void norm_rows(const Number* x, const Number* other, const Number* weight, const Number* bias, bool is_rms, float eps, int64_t rows,
               int64_t columns, Number* y, Number* sum, float* space, int threads) {
  const int64_t width = (columns + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > FEW) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    float* row = space + omp_get_thread_num() * width;
    const int64_t at = r * columns;
    const Number* more = other ? other + at : nullptr;
    Number* total = sum ? sum + at : nullptr;
    if (is_rms)
      norms::rms_norm(x + at, more, weight, eps, columns, y + at, total, row);
    else
      norms::layer_norm(x + at, more, weight, bias, eps, columns, y + at, total, row);
  }
}

// y [batch][heads][rows][width] = x * cos + [-second half, first half] * sin. strides: of x by batch, head and row, then of cos and
// of sin by batch and row, in numbers.
template <typename Number>
void rope(const Number* x, const Number* cos, const Number* sin, const int64_t* sizes, const int64_t* strides, Number* y, int threads) {
  const int64_t batch = sizes[0], heads = sizes[1], rows = sizes[2], half = sizes[3] / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch * heads * rows * half > FEW) schedule(static)
  for (int64_t job = 0; job < batch * heads * rows; job++) {
    const int64_t b = job / (heads * rows), h = job / rows % heads, r = job % rows;
    const Number* from = x + b * strides[0] + h * strides[1] + r * strides[2];
    const Number* c = cos + b * strides[3] + r * strides[4];
    const Number* s = sin + b * strides[5] + r * strides[6];
    Number* to = y + job * 2 * half;
    for (int64_t i = 0; i < half; i += LANES) {
      const int64_t left = half - i;
      const Floats first = load_some(from + i, left), second = load_some(from + half + i, left);
      const Floats up = multiply(second, load_some(s + i, left)), down = multiply(first, load_some(s + half + i, left));
      store_some(to + i, subtract(multiply(first, load_some(c + i, left)), up), left);
      store_some(to + half + i, add(multiply(second, load_some(c + half + i, left)), down), left);
    }
  }
}

// y [rows][columns] = silu(gate) * up, whose rows are `stride` numbers apart.
template <typename Number>
void silu_mul(const Number* gate, const Number* up, int64_t rows, int64_t columns, int64_t stride, Number* y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > FEW) schedule(static)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < columns; i += LANES) {
      const Floats value = load_some(gate + r * stride + i, columns - i);
      const Floats product = multiply(multiply(value, sigmoid(value)), load_some(up + r * stride + i, columns - i));
      store_some(y + r * columns + i, product, columns - i);
    }
}

}  // namespace

extern "C" {

// space: floats, threads * (columns, rounded up to 16).
void norm(const void* x, const void* other, const void* weight, const void* bias, int is_bfloat16, int is_rms, float eps, int64_t rows,
          int64_t columns, void* y, void* sum, float* space, int threads) {
  if (is_bfloat16)
    norm_rows((const uint16_t*)x, (const uint16_t*)other, (const uint16_t*)weight, (const uint16_t*)bias, is_rms, eps, rows, columns,
              (uint16_t*)y, (uint16_t*)sum, space, threads);
  else
    norm_rows((const float*)x, (const float*)other, (const float*)weight, (const float*)bias, is_rms, eps, rows, columns, (float*)y,
              (float*)sum, space, threads);
}

void rotate(const void* x, const void* cos, const void* sin, int is_bfloat16, const int64_t* sizes, const int64_t* strides, void* y,
            int threads) {
  if (is_bfloat16)
    rope((const uint16_t*)x, (const uint16_t*)cos, (const uint16_t*)sin, sizes, strides, (uint16_t*)y, threads);
  else
    rope((const float*)x, (const float*)cos, (const float*)sin, sizes, strides, (float*)y, threads);
}

void gate(const void* gate, const void* up, int is_bfloat16, int64_t rows, int64_t columns, int64_t stride, void* y, int threads) {
  if (is_bfloat16)
    silu_mul((const uint16_t*)gate, (const uint16_t*)up, rows, columns, stride, (uint16_t*)y, threads);
  else
    silu_mul((const float*)gate, (const float*)up, rows, columns, stride, (float*)y, threads);
}

}
