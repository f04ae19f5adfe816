// The token table: all that is known of a token before its logits are read, from whatever dtypes and shapes callers have.
// The same definition in PyTorch, to read first: erc/surrogate/token_table.py.
#pragma once

#include <cmath>
#include <cstring>

#include "common/calls.h"
#include "common/token_loss.h"

namespace erc {

ERC_HOST_DEVICE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

ERC_HOST_DEVICE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude < 0x400) return from_bits(sign | 0x3f800000) * float(magnitude) * 0x1p-24f;  // zero and subnormals
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return from_bits(sign | ((magnitude << 13) + 0x38000000));
}

template <class To>
ERC_HOST_DEVICE To element(const Column& column, int64_t i) {
  switch (column.dtype) {
    case DType::kFloat32: return To(static_cast<const float*>(column.data)[i]);
    case DType::kBFloat16: return To(from_bits(uint32_t(static_cast<const uint16_t*>(column.data)[i]) << 16));
    case DType::kFloat16: return To(half_to_float(static_cast<const uint16_t*>(column.data)[i]));
    case DType::kFloat64: return To(static_cast<const double*>(column.data)[i]);
    case DType::kBool:
    case DType::kUInt8: return To(static_cast<const uint8_t*>(column.data)[i]);
    case DType::kInt8: return To(static_cast<const int8_t*>(column.data)[i]);
    case DType::kInt16: return To(static_cast<const int16_t*>(column.data)[i]);
    case DType::kInt32: return To(static_cast<const int32_t*>(column.data)[i]);
    case DType::kInt64: break;
  }
  return To(static_cast<const int64_t*>(column.data)[i]);
}

template <class To>
ERC_HOST_DEVICE To element(const Column& column, int64_t i, To otherwise) {
  return column.given() ? element<To>(column, i) : otherwise;
}

// ---- sums over tokens ------------------------------------------------------------------------------------------------

// Tokens are counted by groups: the sequences where the reduction looks at them, else runs of kCountRun tokens. The order of
// the sums depends on the groups alone.
ERC_HOST_DEVICE bool counts_sequences(Reduction reduction) {
  return reduction == Reduction::kSeqMeanTokenMean || reduction == Reduction::kSeqMeanTokenSum ||
         reduction == Reduction::kSeqMeanTokenSumNorm;
}

ERC_HOST_DEVICE int64_t group_begin(const TokenTable& call, int64_t group) {
  if (!counts_sequences(call.params.reduction))
    return group * kCountRun < call.num_tokens ? group * kCountRun : call.num_tokens;
  return call.offsets.given() ? element<int64_t>(call.offsets, group) : group * call.params.sequence_length;
}

// The packed sequence that holds a token: the last one that begins at or before it.
ERC_HOST_DEVICE int64_t packed_sequence(const TokenTable& call, int64_t token) {
  int64_t low = 0, high = call.num_sequences;  // begin(low) <= token < begin(high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (element<int64_t>(call.offsets, middle) <= token ? low : high) = middle;
  }
  return low;
}

template <class Real>
ERC_HOST_DEVICE Real mask_of(const TokenTable& call, int64_t token) {
  if (element<int64_t>(call.labels, token) == call.ignore_index) return 0;
  return element<Real>(call.mask, token, Real(1));
}

struct TokenCount {
  double mask = 0, nll = 0;

  template <class Real>
  ERC_HOST_DEVICE static TokenCount of(const TokenTable& call, int64_t token) {
    const Real mask = mask_of<Real>(call, token);
    return {double(mask), mask == 0 ? 0 : double(mask * element<Real>(call.nll_mask, token, Real(0)))};
  }
  ERC_HOST_DEVICE void add(const TokenCount& other) {
    mask += other.mask;
    nll += other.nll;
  }
};

// Sums over all groups, from left to right.
struct Totals {
  double tokens = 0, nll = 0, groups = 0;  // groups: those with an active token

  ERC_HOST_DEVICE void add(const double* group_sums) {
    tokens += group_sums[0];
    nll += group_sums[1];
    groups += group_sums[0] != 0;
  }
};

ERC_HOST_DEVICE bool needs_counts(const TokenTable& call) {
  const TableParams& p = call.params;
  const bool mean = p.reduction == Reduction::kTokenMean || counts_sequences(p.reduction);
  const auto missing = [](double number, const Column& tensor) { return number < 0 && !tensor.given(); };
  return p.reduction == Reduction::kSeqMeanTokenMean || (mean && missing(p.normalizer, call.normalizer)) ||
         (p.entropy_coef != 0 && !p.entropy_shares && missing(p.entropy_normalizer, call.entropy_normalizer)) ||
         (p.nll_coef != 0 && missing(p.nll_normalizer, call.nll_normalizer));
}

// ---- one row ---------------------------------------------------------------------------------------------------------

template <class Real>
ERC_HOST_DEVICE Real over(Real weight, double number, const Column& tensor, double count) {
  if (weight == 0) return weight;  // a normalizer of 0 is right where it counts nothing
  if (tensor.given()) return weight / element<Real>(tensor, 0);
  if (number >= 0) return weight / Real(number);
  return weight / (count == 0 ? Real(1) : Real(count));
}

template <class Real>
ERC_HOST_DEVICE TokenInputs<Real> table_row(const TokenTable& call, const Totals& totals, int64_t token) {
  const TableParams& p = call.params;
  TokenInputs<Real> row{};
  row.policy_weight = 1;
  const Real mask = mask_of<Real>(call, token);
  if (mask == 0) return row;
  row.old_logprob = element<Real>(call.old_logprob, token, Real(0));
  row.old_entropy = element<Real>(call.old_entropy, token, Real(0));
  row.ref_logprob = element<Real>(call.ref_logprob, token, Real(0));
  row.policy_weight = element<Real>(call.policy_weight, token, Real(1));

  int64_t sequence = 0;
  const bool by_sequence = p.reduction == Reduction::kSeqMeanTokenMean;
  if (call.offsets.given() && (by_sequence || p.advantage_length == 0)) {
    sequence = packed_sequence(call, token);
  } else if (by_sequence) {
    sequence = token / p.sequence_length;
  }
  row.advantage = element<Real>(call.advantages, p.advantage_length == 0 ? sequence : token / p.advantage_length);

  Real weight = mask;
  if (by_sequence) weight /= Real(call.group_sums[2 * sequence]);
  if (p.reduction == Reduction::kSeqMeanTokenSumNorm) weight /= Real(p.max_length);
  const bool counted = p.reduction == Reduction::kTokenMean || counts_sequences(p.reduction);
  const double count = !counted ? 1 : p.reduction == Reduction::kTokenMean ? totals.tokens : totals.groups;
  weight = over(weight, p.normalizer, call.normalizer, count);
  if (p.entropy_coef != 0) {
    const Real share = p.entropy_shares ? weight : over(mask, p.entropy_normalizer, call.entropy_normalizer, totals.tokens);
    row.entropy_weight = Real(-p.entropy_coef) * share;
  }
  if (p.nll_coef != 0) {
    const Real share =
        over(mask * element<Real>(call.nll_mask, token, Real(0)), p.nll_normalizer, call.nll_normalizer, totals.nll);
    row.logprob_weight = Real(-p.nll_coef) * share;
  }
  const Real grad_scale = call.grad_scale.given() ? element<Real>(call.grad_scale, 0) : Real(p.grad_scale);
  row.weight = weight * grad_scale;
  row.entropy_weight *= grad_scale;
  row.logprob_weight *= grad_scale;
  // A NaN input makes loss and gradient of its token NaN, also where a clip or the gate would hide it. That of the old
  // entropy drops the token instead: it is what the gate compares with.
  if (row.advantage != row.advantage || row.old_logprob != row.old_logprob || row.ref_logprob != row.ref_logprob ||
      row.policy_weight != row.policy_weight) {
    row.weight = Real(NAN);
  }
  return row;
}

}  // namespace erc
