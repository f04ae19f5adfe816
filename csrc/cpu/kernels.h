// The CPU kernels' interface: arguments as plain data, and one table of functions for each instruction set.
// A kernel works on a range of rows; whoever calls it decides which thread takes which rows, which changes no result.
#pragma once

#include <cstdint>

#include "common/params.h"
#include "cpu/dtypes.h"

namespace erc {

// Rows of logits: row i starts at (i / inner) * outer_stride + (i % inner) * inner_stride elements.
struct Rows {
  void* data;
  DType dtype;
  int64_t vocab_size, inner, outer_stride, inner_stride;

  template <class T>
  T* row(int64_t i) const {
    return static_cast<T*>(data) + (i / inner) * outer_stride + (i % inner) * inner_stride;
  }
};

struct RowScaling {
  Scaling scaling;
  const void* temperature;  // [N] in the statistics dtype, or null where scaling.temperature holds for every row
};

// What identifies the rows and how they are read; part of every call.
struct RowInputs {
  Rows logits;
  const int64_t* labels;  // null without
  RowScaling scaling;
  int64_t ignore_index;
  int64_t label_start;  // the vocabulary column of the shard's first column
};

// Outputs and per-row inputs are [N] in the statistics dtype; null where absent.
struct StatsForward {
  RowInputs rows;
  void *logprob, *entropy, *logsumexp;
  void* saved;  // [3, N]
  int64_t num_rows;
};

struct StatsBackward {
  RowInputs rows;
  const void *saved, *grad_logprob, *grad_entropy, *grad_logsumexp;
  Rows grad_logits;  // may be the logits themselves
  int64_t num_rows;
};

struct PartialStats {
  RowInputs rows;
  void* state;  // [4, N]
  int64_t num_rows;
};

struct PolicyLoss {
  RowInputs rows;
  const void *weight, *advantages, *old_logprob, *old_entropy, *ref_logprob, *policy_weight, *entropy_weight,
      *logprob_weight;
  RatioRule rule;
  int kl;
  Gate gate;
  LossParams<double> params;
  void *loss, *token_loss, *logprob, *entropy;
  int32_t* flags;
  Rows grad_logits;  // data is null where no gradient is wanted; may be the logits themselves
};

struct PairedForward {
  Rows logits, old_logits;
  RowScaling scaling;
  void* stats;  // [6, N]
  void* saved;  // [8, N]
  int64_t num_rows;
};

struct PairedBackward {
  Rows logits, old_logits;
  RowScaling scaling;
  const void *saved, *grads;  // [8, N], [6, N]
  Rows grad_logits;
  int64_t num_rows;
};

struct ScaleRows {
  Rows source, destination;  // may be the same
  const void* scale;
};

struct Kernels {
  const char* isa;
  void (*stats_forward)(const StatsForward&, int64_t begin, int64_t end);
  void (*stats_backward)(const StatsBackward&, int64_t begin, int64_t end);
  void (*partial_stats)(const PartialStats&, int64_t begin, int64_t end);
  void (*policy_loss)(const PolicyLoss&, int64_t begin, int64_t end);
  void (*paired_forward)(const PairedForward&, int64_t begin, int64_t end);
  void (*paired_backward)(const PairedBackward&, int64_t begin, int64_t end);
  void (*scale_rows)(const ScaleRows&, int64_t begin, int64_t end);
};

// The fastest table that this processor runs; the environment variable ERC_CPU_ISA names another.
const Kernels& kernels();

}  // namespace erc
