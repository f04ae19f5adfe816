// The CPU kernels' interface: one table of functions for each instruction set, on the calls of common/calls.h.
// A kernel works on a range of rows; whoever calls it decides which thread takes which rows, which changes no result.
#pragma once

#include <cstdint>

#include "common/calls.h"

namespace erc {

struct Kernels {
  const char* isa;
  void (*stats_forward)(const StatsForward&, int64_t begin, int64_t end);
  void (*stats_backward)(const StatsBackward&, int64_t begin, int64_t end);
  void (*support_forward)(const SupportForward&, int64_t begin, int64_t end);
  void (*support_backward)(const SupportBackward&, int64_t begin, int64_t end);
  void (*policy_loss)(const PolicyLoss&, int64_t begin, int64_t end);
  void (*paired_forward)(const PairedForward&, int64_t begin, int64_t end);
  void (*paired_backward)(const PairedBackward&, int64_t begin, int64_t end);
  void (*scale_rows)(const ScaleRows&, int64_t begin, int64_t end);
};

// The fastest table that this processor runs; the environment variable ERC_CPU_ISA names another.
const Kernels& kernels();

}  // namespace erc
