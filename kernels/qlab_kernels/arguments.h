// What torch's operators of this package are handed, and what they give back, through the part of torch's interface that
// stays the same from release to release.

#pragma once

#include "halves.h"

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

struct Argument {                          // a tensor that the dispatcher hands over, to be freed
  AtenTensorHandle handle;
  explicit Argument(StableIValue value) { std::memcpy(&handle, &value, sizeof handle); }
  ~Argument() { aoti_torch_delete_tensor_object(handle); }
  Argument(const Argument&) = delete;

  char* data() const {
    void* address = nullptr;
    aoti_torch_get_data_ptr(handle, &address);
    return static_cast<char*>(address);
  }
  int64_t size(int64_t axis) const {
    int64_t value = 0;
    aoti_torch_get_size(handle, axis, &value);
    return value;
  }
  int64_t stride(int64_t axis) const {
    int64_t value = 0;
    aoti_torch_get_stride(handle, axis, &value);
    return value;
  }
  int32_t dtype() const {
    int32_t value = 0;
    aoti_torch_get_dtype(handle, &value);
    return value;
  }
};

// Of a tensor of numbers.
Kind kind_of(const Argument& x) {
  return x.dtype() == aoti_torch_dtype_float32() ? F32 : x.dtype() == aoti_torch_dtype_float16() ? F16 : BF16;
}

// A contiguous tensor on the CPU, of numbers that are still to be written.
template <int64_t AXES>
AtenTensorHandle empty(const int64_t (&sizes)[AXES], int32_t dtype) {
  int64_t strides[AXES], stride = 1;
  for (int64_t axis = AXES; axis-- > 0; stride *= sizes[axis]) strides[axis] = stride;
  AtenTensorHandle made = nullptr;
  aoti_torch_empty_strided(AXES, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made);
  return made;
}

StableIValue value_of(AtenTensorHandle handle) {
  StableIValue value = 0;
  std::memcpy(&value, &handle, sizeof handle);
  return value;
}

char* data_of(AtenTensorHandle handle) {
  void* address = nullptr;
  aoti_torch_get_data_ptr(handle, &address);
  return static_cast<char*>(address);
}

struct Operator {
  const char* name;                        // its schema is defined in Python
  void (*boxed)(StableIValue* stack, uint64_t, uint64_t);
};

// 0 where torch took all of them.
int32_t given_to_torch(std::initializer_list<Operator> operators) {
  TorchLibraryHandle library = nullptr;
  int32_t failed = aoti_torch_library_init_impl("qlab", "CPU", __FILE__, __LINE__, &library);
  for (const Operator& each : operators) failed = failed || aoti_torch_library_impl(library, each.name, each.boxed);
  return failed;
}

}  // namespace
