// What torch's operators of this package are handed, and what they give back, through the part of torch's interface that
// stays the same from release to release.

#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstring>

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

}  // namespace
