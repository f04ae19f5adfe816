#include "bindings/gradient_memory.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

// Of PyTorch 2.11: absent in 2.10, whose tensors cannot say when they are freed.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void*, int64_t, const int64_t*, const int64_t*, int64_t,
                                                                int32_t, int32_t, int32_t, AtenTensorHandle*, int32_t,
                                                                const uint8_t*, int64_t, void (*)(void*, void*), void*);
#endif

namespace erc {

using torch::stable::Tensor;

static Tensor plain(const Tensor& logits) {
  const int64_t shape[] = {logits.size(0), logits.size(1), logits.size(2)};
  return torch::stable::new_empty(logits, {shape, 3});
}

#if defined(__linux__)

namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kWorthwhile = 2 * kHugePage;

// Whole huge pages.
class Block {
 public:
  static Block* map(size_t bytes) {
    const size_t whole = bytes + kHugePage;
    void* mapped = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    const uintptr_t base = reinterpret_cast<uintptr_t>(mapped);
    const uintptr_t begin = (base + kHugePage - 1) & ~(kHugePage - 1);
    if (begin > base) munmap(mapped, begin - base);
    if (begin + bytes < base + whole) munmap(reinterpret_cast<void*>(begin + bytes), base + whole - begin - bytes);
    madvise(reinterpret_cast<void*>(begin), bytes, MADV_HUGEPAGE);
    return new Block(reinterpret_cast<void*>(begin), bytes);
  }
  ~Block() { munmap(data_, bytes_); }

  void* data() const { return data_; }
  // Large enough, and not so large that the rest would be a waste.
  bool fits(size_t bytes) const { return bytes <= bytes_ && bytes_ - bytes <= bytes / 4; }
  void leave_to_the_system() { madvise(data_, bytes_, MADV_FREE); }

 private:
  Block(void* data, size_t bytes) : data_(data), bytes_(bytes) {}
  void* data_;
  size_t bytes_;
};

std::atomic<Block*> kept{nullptr};

Block* take(size_t bytes) {
  Block* block = kept.exchange(nullptr);
  if (block != nullptr && block->fits(bytes)) return block;
  delete block;
  return Block::map(bytes);
}

void give_back(void*, void* context) {
  Block* block = static_cast<Block*>(context);
  block->leave_to_the_system();
  delete kept.exchange(block);
}

bool keeps_gradients() {
  const char* setting = std::getenv("ERC_CPU_KEEP_GRADIENT");
  return torch_from_blob != nullptr && (setting == nullptr || std::strcmp(setting, "0") != 0);
}

void prefer_huge_pages(const Tensor& t) {
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t begin = (data + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (data + t.numel() * t.element_size()) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace

Tensor gradient_like(const Tensor& logits) {
  static const bool keeps = keeps_gradients();
  const size_t bytes = (logits.numel() * logits.element_size() + kHugePage - 1) & ~(kHugePage - 1);
  Block* block = keeps && bytes >= kWorthwhile ? take(bytes) : nullptr;
  if (block == nullptr) {
    Tensor gradient = plain(logits);
    prefer_huge_pages(gradient);
    return gradient;
  }
  const int64_t shape[] = {logits.size(0), logits.size(1), logits.size(2)};
  const int64_t strides[] = {shape[1] * shape[2], shape[2], 1};
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(logits.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(logits.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(logits.get(), &device_index));
  AtenTensorHandle gradient;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(block->data(), 3, shape, strides, 0, dtype, device_type, device_index, &gradient,
                                         aoti_torch_layout_strided(), nullptr, 0, give_back, block));
  return Tensor(gradient);
}

#else

Tensor gradient_like(const Tensor& logits) { return plain(logits); }

#endif

}  // namespace erc
