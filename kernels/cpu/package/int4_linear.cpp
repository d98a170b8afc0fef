// fxc_cpu::native_int4_linear in an AOTInductor package, over ../int4_linear.cpp.

#include "call.h"

extern "C" {

int64_t int4_linear_scratch(int64_t rows, int64_t columns, int group);
void int4_linear(const void* x, int x_is_bfloat16, int64_t rows, int64_t columns, int64_t outputs, int group, const uint8_t* q,
                 const void* scale, int scale_is_bfloat16, const uint8_t* zero, const float* bias, void* y, uint8_t* scratch,
                 int threads);

AOTITorchError aoti_torch_cpu_native_int4_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scale,
                                                 AtenTensorHandle* zero, AtenTensorHandle* bias, int64_t outputs, int64_t group,
                                                 AtenTensorHandle* made) {
  Rows rows;
  void *q, *steps, *zeros, *shift;
  int32_t kept;
  TRY(rows.take(x, outputs, made));
  TRY(aoti_torch_get_data_ptr(weight, &q));
  TRY(aoti_torch_get_data_ptr(scale, &steps));
  TRY(aoti_torch_get_dtype(scale, &kept));
  TRY(data(zero, &zeros));
  TRY(data(bias, &shift));
  if (!rows.rows || !outputs) return AOTI_TORCH_SUCCESS;
  TRY(rows.take_scratch(int4_linear_scratch(rows.rows, rows.columns, (int)group)));
  int4_linear(rows.x, rows.is_bfloat16, rows.rows, rows.columns, outputs, (int)group, (const uint8_t*)q, steps,
              kept == aoti_torch_dtype_bfloat16(), (const uint8_t*)zeros, (const float*)shift, rows.y, (uint8_t*)rows.scratch,
              (int)rows.threads);
  return AOTI_TORCH_SUCCESS;
}

}
