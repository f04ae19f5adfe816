// Where a row's label lies.
#pragma once

#include "common/calls.h"

namespace erc {

enum class LabelKind { kIgnored, kAbsent, kCut, kHere, kOutOfRange };

constexpr int64_t kNoColumn = -1;

struct Label {
  LabelKind kind;
  int64_t column;  // kNoColumn unless kHere
};

ERC_HOST_DEVICE Label token_label(const RowInputs& in, int64_t token) {
  if (token < 0) return {LabelKind::kIgnored, kNoColumn};
  if (in.labels == nullptr) return {LabelKind::kAbsent, kNoColumn};
  const int64_t label = in.labels[token];
  if (label == in.ignore_index) return {LabelKind::kIgnored, kNoColumn};
  if (label == kAbsentLabel) return {LabelKind::kAbsent, kNoColumn};
  if (label == kCutLabel) return {LabelKind::kCut, kNoColumn};
  const int64_t column = label - in.label_start;
  if (column >= 0 && column < in.logits.vocab_size) return {LabelKind::kHere, column};
  return {LabelKind::kOutOfRange, kNoColumn};
}

}  // namespace erc
