// fxc_cpu::native_int8_linear in an AOTInductor package, over ../int8_linear.cpp.

#include "call.h"

#include <cstring>

extern "C" {

int64_t int8_linear_scratch(int64_t rows, int64_t columns, int is_split);
void int8_linear(const void* x, int x_is_bfloat16, int64_t rows, int64_t columns, int64_t outputs, int is_split, const int8_t* q,
                 const float* scale, const int32_t* sum, const float* bias, int activation, void* y, uint8_t* scratch, int threads);

// No package has a float copy beside a weight: `dense` is null.
AOTITorchError aoti_torch_cpu_native_int8_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scale,
                                                 AtenTensorHandle sums, AtenTensorHandle* bias, int64_t outputs, int32_t split,
                                                 const char* activation, AtenTensorHandle* dense, int64_t limit,
                                                 AtenTensorHandle* made) {
  const char* activations[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};  // as ACTIVATIONS of ../native_int8.py
  int how = 0;
  while (how < 5 && strcmp(activation, activations[how])) how++;
  if (dense || how == 5) return AOTI_TORCH_FAILURE;
  Rows rows;
  void *q, *steps, *sum, *shift;
  TRY(rows.take(x, outputs, made));
  TRY(aoti_torch_get_data_ptr(weight, &q));
  TRY(aoti_torch_get_data_ptr(scale, &steps));
  TRY(aoti_torch_get_data_ptr(sums, &sum));
  TRY(data(bias, &shift));
  if (!rows.rows || !outputs) return AOTI_TORCH_SUCCESS;
  TRY(rows.take_scratch(int8_linear_scratch(rows.rows, rows.columns, split)));
  int8_linear(rows.x, rows.is_bfloat16, rows.rows, rows.columns, outputs, split, (const int8_t*)q, (const float*)steps,
              (const int32_t*)sum, (const float*)shift, how, rows.y, (uint8_t*)rows.scratch, (int)rows.threads);
  return AOTI_TORCH_SUCCESS;
}

}
