// Notes every tensor whose address the bindings take: the memory that a kernel of theirs may touch. The linker sends the
// bindings' calls of PyTorch's two functions here (--wrap).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <vector>

namespace {

struct Extent {
  int64_t start, bytes;
};
std::vector<Extent> extents;

// From the first element to the end of the last.
void note(AtenTensorHandle tensor, const void* data) {
  int64_t dimensions = 0, last = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dimensions);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  for (int64_t i = 0; i < dimensions; ++i) {
    if (sizes[i] == 0) return;
    last += (sizes[i] - 1) * strides[i];
  }
  const int64_t element = int64_t(aoti_torch_dtype_element_size(dtype));
  extents.push_back({int64_t(reinterpret_cast<intptr_t>(data)), (last + 1) * element});
}

}  // namespace

extern "C" {

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  note(tensor, *data);
  return error;
}

AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  note(tensor, *data);
  return error;
}

// Gives the extents noted since the last call, at most `capacity`, and returns how many.
int erc_cuda_host_tensors(int64_t (*out)[2], int capacity) {
  int count = 0;
  for (const Extent& one : extents) {
    if (count == capacity) break;
    out[count][0] = one.start;
    out[count++][1] = one.bytes;
  }
  extents.clear();
  return count;
}

}  // extern "C"
