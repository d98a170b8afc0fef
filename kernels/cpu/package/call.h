// What operators share that an AOTInductor package calls by torch's stable C interface.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>

#define TRY(call)                                                     \
  do {                                                                \
    if ((call) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;      \
  } while (0)

namespace {

const int MOST_DIMENSIONS = 16;

// Where the numbers of an optional tensor are, or null.
AOTITorchError data(AtenTensorHandle* tensor, void** found) {
  *found = nullptr;
  return tensor ? aoti_torch_get_data_ptr(*tensor, found) : AOTI_TORCH_SUCCESS;
}

AOTITorchError empty(int64_t dimensions, const int64_t* sizes, int32_t dtype, AtenTensorHandle* made) {
  int64_t strides[MOST_DIMENSIONS], step = 1;
  for (int64_t d = dimensions - 1; d >= 0; d--) {
    strides[d] = step;
    step *= sizes[d];
  }
  return aoti_torch_empty_strided(dimensions, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, made);
}

// x [..., columns] as rows one after the other, and y [..., outputs] in its dtype.
struct Rows {
  AtenTensorHandle copy = nullptr;
  void *x = nullptr, *y = nullptr, *scratch = nullptr;
  int is_bfloat16 = 0;
  int64_t rows = 0, columns = 0;
  uint32_t threads = 1;

  AOTITorchError take(AtenTensorHandle given, int64_t outputs, AtenTensorHandle* made) {
    int64_t dimensions, count, *shape, *strides, sizes[MOST_DIMENSIONS], step = 1;
    int32_t dtype;
    TRY(aoti_torch_get_dim(given, &dimensions));
    if (dimensions < 1 || dimensions > MOST_DIMENSIONS) return AOTI_TORCH_FAILURE;
    TRY(aoti_torch_get_sizes(given, &shape));
    TRY(aoti_torch_get_strides(given, &strides));
    TRY(aoti_torch_get_dtype(given, &dtype));
    TRY(aoti_torch_get_numel(given, &count));
    TRY(torch_get_num_threads(&threads));
    is_bfloat16 = dtype == aoti_torch_dtype_bfloat16();
    if (!is_bfloat16 && dtype != aoti_torch_dtype_float32()) return AOTI_TORCH_FAILURE;
    bool is_contiguous = true;
    for (int64_t d = dimensions - 1; d >= 0; d--) {
      is_contiguous = is_contiguous && (shape[d] == 1 || strides[d] == step);
      step *= sizes[d] = shape[d];
    }
    columns = sizes[dimensions - 1];
    rows = columns ? count / columns : 0;
    if (!is_contiguous) {
      TRY(empty(dimensions, sizes, dtype, &copy));
      TRY(aoti_torch_copy_(copy, given, 0));
    }
    TRY(aoti_torch_get_data_ptr(copy ? copy : given, &x));
    sizes[dimensions - 1] = outputs;
    TRY(empty(dimensions, sizes, dtype, made));
    return aoti_torch_get_data_ptr(*made, &y);
  }

  AOTITorchError take_scratch(int64_t bytes) {
    scratch = aligned_alloc(64, (bytes + 63) / 64 * 64);
    return scratch ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
  }

  ~Rows() {
    free(scratch);
    if (copy) aoti_torch_delete_tensor_object(copy);
  }
};

}  // namespace
