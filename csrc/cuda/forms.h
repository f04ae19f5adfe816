// Which form of the fused loss (policy_loss.cu) many rows take on a GPU that has both: a cluster of blocks a row, or one block.
#pragma once

#include <cstdint>

namespace erc {
namespace cuda {

enum class LossForm : int32_t { kCluster, kBlock };

// Rows of at most `row_kib` KiB on GPUs of one compute capability (90: 9.0).
struct FormLine {
  int32_t capability, row_kib;
  LossForm form;
};

// By the table in forms.cpp. No form changes a bit.
LossForm loss_form(int capability, int64_t row_bytes);

}  // namespace cuda
}  // namespace erc
