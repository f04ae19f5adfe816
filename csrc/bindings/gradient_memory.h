// Where the gradient of the logits lies: hundreds of megabytes that a training step asks for, fills, and frees again.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace erc {

// An uninitialised tensor like `logits` ([outer, inner, V]), contiguous.
//
// Handing out fresh pages costs the system more than the loss costs the kernel. So a large gradient lies in huge pages, and when
// it is freed the next one of about its size takes its place. In between the system may have the pages back whenever it
// wants them (MADV_FREE): they count as resident until then, but no other allocation fails for them. One gradient is kept, and
// none where the environment variable ERC_CPU_KEEP_GRADIENT is 0.
torch::stable::Tensor gradient_like(const torch::stable::Tensor& logits);

}  // namespace erc
