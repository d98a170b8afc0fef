// y = activation(x @ w^T * scale + bias) over int8 weights, with each row of x rounded to int8 as it comes, or to two halves of
// int8 each (fxc_kernels/int8_linear.py and cpu/split_linear.py have the formulas; int8_product.h says how weights lie).
#include "int8_product.h"

namespace {

using namespace product;

template <typename Number>
void linear(const Weight& w, const Number* x, int64_t rows, int64_t columns, bool is_split, const float* bias, Activation activation,
            Number* y, uint8_t* scratch, int threads) {
  const int times = 1 + is_split;
  const int64_t most = rows * times < BLOCK ? rows * times : BLOCK;
  Quantized q{nullptr, (float*)scratch, (int32_t*)scratch + most, stride_of(columns)};
  q.q = (Quantum*)(q.zero + most);
  const int64_t padded = (w.outputs + PANEL - 1) / PANEL * PANEL, wide = padded / OUTPUTS;
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < rows * times; first += BLOCK) {
    const int64_t count = rows * times - first < BLOCK ? rows * times - first : BLOCK;
    const Number* from = x + first / times * columns;
    Number* to = y + first / times * w.outputs;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i += times) {
      Quantum* at = q.q + i * q.stride;
      if (is_split)
        quantize_split(from + i / 2 * columns, columns, at, at + q.stride, q.scale + i, q.zero + i);
      else
        quantize(from + i * columns, columns, at, q.scale + i, q.zero + i);
    }
    // Few outputs and many threads: the rows are shared too.
    const int64_t tiles = (padded + OUTPUTS - 1) / OUTPUTS;
    int64_t shares = (2 * threads + tiles - 1) / tiles;
    if (threads == 1 || shares > count / (4 * ROWS)) shares = count / (4 * ROWS) > 1 && threads > 1 ? count / (4 * ROWS) : 1;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < tiles * shares; job++) {
      int32_t sums[BLOCK * OUTPUTS];
      const int64_t n = job / shares * OUTPUTS, share = job % shares;
      const int64_t begin = count / times * share / shares * times, end = count / times * (share + 1) / shares * times;
      if (job / shares < wide) {
        outputs_of<VECTORS>(w, q, is_split, begin, end, n, sums, bias, activation, to);
      } else {
        for (int64_t at = n; at < w.outputs; at += LANES) outputs_of<1>(w, q, is_split, begin, end, at, sums, bias, activation, to);
      }
    }
  }
}

}  // namespace

extern "C" {

// Bytes of scratch for so many rows.
int64_t int8_linear_scratch(int64_t rows, int64_t columns, int is_split) {
  const int64_t all = rows * (1 + is_split), most = all < BLOCK ? all : BLOCK;
  return bytes_of(most, columns);
}

// x [rows][columns], y [rows][outputs]: float32, or bfloat16 where x_is_bfloat16. bias: as long as scale, or null.
void int8_linear(const void* x, int x_is_bfloat16, int64_t rows, int64_t columns, int64_t outputs, int is_split, const int8_t* q,
                 const float* scale, const int32_t* sum, const float* bias, int activation, void* y, uint8_t* scratch, int threads) {
  const Weight w{q, scale, sum, (columns + 3) / 4 * 4, outputs};
  if (x_is_bfloat16)
    linear(w, (const uint16_t*)x, rows, columns, is_split, bias, (Activation)activation, (uint16_t*)y, scratch, threads);
  else
    linear(w, (const float*)x, rows, columns, is_split, bias, (Activation)activation, (float*)y, scratch, threads);
}

}
