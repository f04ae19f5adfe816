// The operators of one instruction set; table.cpp collects them.
#pragma once

#include "cpu/kernels.h"

namespace erc {
namespace ERC_ISA {

void stats_forward(const StatsForward&, int64_t begin, int64_t end);
void stats_backward(const StatsBackward&, int64_t begin, int64_t end);
void support_forward(const SupportForward&, int64_t begin, int64_t end);
void support_backward(const SupportBackward&, int64_t begin, int64_t end);
void policy_loss(const PolicyLoss&, int64_t begin, int64_t end);
void paired_forward(const PairedForward&, int64_t begin, int64_t end);
void paired_backward(const PairedBackward&, int64_t begin, int64_t end);
void scale_rows(const ScaleRows&, int64_t begin, int64_t end);

}  // namespace ERC_ISA
}  // namespace erc
