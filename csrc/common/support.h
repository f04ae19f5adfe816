// The tokens that a sampler kept of a row: the log-prob of its label over them, and what that adds to the row's gradient.
//
// x = scaled logit. With the largest kept logit as center, R = sum of exp(x - center) over the kept tokens without the label and
// S = R + exp(x_y - center): where the label is the maximum, 1 - p_y = R / S is not cancelled. All of it is in float64: few
// tokens are kept, and what is read of them is what counts.
//
// One or more lanes share a row: lane i takes the entries i, i + count, ..., and what they found is merged in a fixed order.
#pragma once

#include <cmath>

#include "common/labels.h"

namespace erc {

// The lanes of a row where one thread does it all; those of a warp: cuda/support.cu.
struct OneLane {
  ERC_HOST_DEVICE int index() const { return 0; }
  ERC_HOST_DEVICE int count() const { return 1; }
  ERC_HOST_DEVICE double sum(double x) const { return x; }
  ERC_HOST_DEVICE double largest(double x) const { return x; }  // NaN if any is
};

// The scaled logit, and its derivative by the logit. An infinite one stays infinite under a softcap.
struct ScaledLogit {
  double x, slope;
};

template <class Real>
struct LogitScale {
  double slope, softcap, inner;

  ERC_HOST_DEVICE LogitScale(const Scaling& scaling, const void* temperature, int64_t token)
      : slope(scaling.logit_scale / scaling.temperature), softcap(scaling.softcap),
        inner(softcap == 0 ? 1 : scaling.logit_scale / softcap) {
    if (temperature != nullptr) slope /= static_cast<const Real*>(temperature)[token];
  }

  ERC_HOST_DEVICE ScaledLogit operator()(double z) const {
    if (softcap == 0) return {z * slope, slope};
    const double tanh = std::tanh(z * inner);
    return {std::isinf(z) ? z : tanh / inner * slope, slope * (1 - tanh * tanh)};
  }

  // x of the carrier v that the dense sweep centres: the logit, or its softcapped value.
  ERC_HOST_DEVICE double of_carrier(double v) const { return v * slope * (softcap == 0 ? 1 : 1 / (inner * softcap)); }
};

ERC_HOST_DEVICE double larger(double a, double b) { return a != a || a > b ? a : b; }

// The entries of a token; offsets that nobody checked leave no place in the ids.
struct SupportEntries {
  int64_t begin, end;

  ERC_HOST_DEVICE SupportEntries(const Support& support, int64_t token)
      : begin(clamped(support, support.offsets[token])), end(clamped(support, support.offsets[token + 1])) {}

  ERC_HOST_DEVICE static int64_t clamped(const Support& support, int64_t at) {
    return at < 0 ? 0 : (at < support.num_ids ? at : support.num_ids);
  }
};

// Statistics of one row, before or after those of the full vocabulary. load(column) reads a logit. False where the row breaks a
// rule: a label that the support lacks, ids that do not rise strictly or lie outside the vocabulary; then all of it is NaN.
template <class Real, class Lanes, class Load>
ERC_HOST_DEVICE bool support_statistics(const SupportForward& call, int64_t row, const Lanes& lanes, const Load& load) {
  const RowInputs& in = call.rows;
  const int64_t token = in.token(row), n = in.num_tokens;
  if (token < 0) return true;
  const auto put = [](void* values, int64_t i, double x) { static_cast<Real*>(values)[i] = Real(x); };
  const auto get = [](const void* values, int64_t i) { return double(static_cast<const Real*>(values)[i]); };
  const int64_t label = in.labels[token];
  const bool writes = lanes.index() == 0, has_full = call.logsumexp != nullptr;
  if (writes) call.dense_labels[token] = label;
  if (label == in.ignore_index) {
    if (writes) put(call.logprob, token, 0);
    return true;
  }
  const SupportEntries entries(call.support, token);
  const int64_t* ids = call.support.ids;
  double kept = 0, broken = 0, found = 0, top = -INFINITY;
  for (int64_t i = entries.begin + lanes.index(); i < entries.end; i += lanes.count()) {
    const int64_t id = ids[i], column = id - in.label_start;
    const bool first = i == entries.begin;
    double z = -INFINITY;
    if (call.gathered) {
      z = get(call.values, i);
    } else {
      if (id >= 0 && column >= 0 && column < in.logits.vocab_size) z = load(column);
      put(call.values, i, z);
    }
    if (id == -1) {  // padding stands before the ids
      broken += !first && ids[i - 1] != -1;
      continue;
    }
    broken += id < 0 || id >= call.vocab_size || (!first && ids[i - 1] >= id);
    found += id == label;
    kept += 1;
    top = larger(z, top);
  }
  kept = lanes.sum(kept);
  broken = lanes.sum(broken);
  found = lanes.sum(found);
  top = lanes.largest(top);
  if (broken != 0 || (kept != 0 && found == 0)) {
    if (!writes) return false;
    put(call.logprob, token, NAN);
    if (!has_full) return false;
    put(call.logprob_full, token, NAN);
    put(call.entropy, token, NAN);
    put(call.logsumexp, token, NAN);
    for (int k = 0; k < 3; ++k) put(call.saved, k * n + token, NAN);
    return false;
  }
  const double logsumexp = has_full ? get(call.logsumexp, token) : 0;
  // Not cut; or without a distribution over the full vocabulary, and so over no part of it.
  if (kept == 0 || kept == double(call.vocab_size) || logsumexp != logsumexp) {
    if (writes) put(call.logprob, token, has_full ? get(call.logprob_full, token) : double(INFINITY));
    return true;
  }
  const LogitScale<Real> scaled(in.scaling, in.temperature, token);
  const double center = scaled(top).x;
  double rest = 0, shift = -INFINITY;
  for (int64_t i = entries.begin + lanes.index(); i < entries.end; i += lanes.count()) {
    if (ids[i] < 0) continue;
    const double u = scaled(get(call.values, i)).x - center;
    if (ids[i] == label) {
      shift = u;
    } else {
      rest += std::exp(u);
    }
  }
  rest = lanes.sum(rest);
  shift = lanes.largest(shift);
  const double total = rest + std::exp(shift);
  if (!writes) return true;
  put(call.logprob, token, shift == 0 ? -std::log1p(rest) : shift - std::log(total));
  put(call.state, token, top);
  put(call.state, n + token, rest);
  put(call.state, 2 * n + token, total);
  call.dense_labels[token] = kCutLabel;
  return true;
}

// Overwrites the kept columns of a cut row's gradient. store(column, value) writes one.
template <class Real, class Lanes, class Store>
ERC_HOST_DEVICE void support_gradient(const SupportBackward& call, int64_t row, const Lanes& lanes, const Store& store) {
  const int64_t token = call.rows.token(row), n = call.rows.num_tokens;
  if (token < 0 || call.dense_labels[token] != kCutLabel) return;
  const auto get = [](const void* values, int64_t i) { return double(static_cast<const Real*>(values)[i]); };
  const auto optional = [&](const void* values) { return values == nullptr ? 0.0 : get(values, token); };
  const LogitScale<Real> scaled(call.rows.scaling, call.rows.temperature, token);
  const double center = scaled(get(call.state, token)).x;
  const double rest = get(call.state, n + token), total = get(call.state, 2 * n + token);
  const double grad = get(call.grad_logprob, token);
  // Of the statistics over the full vocabulary, what the dense sweep wrote: once more, and in float64.
  const double full = optional(call.grad_logprob_full), entropy = optional(call.grad_entropy);
  const double logsumexp = optional(call.grad_logsumexp);
  const bool dense = full != 0 || entropy != 0 || logsumexp != 0;
  const double row_max = scaled.of_carrier(get(call.saved, token)), sum = 1 + get(call.saved, n + token);
  const double mean = get(call.saved, 2 * n + token) / sum, others = -std::expm1(get(call.logprob_full, token));
  const SupportEntries entries(call.support, token);
  for (int64_t i = entries.begin + lanes.index(); i < entries.end; i += lanes.count()) {
    const int64_t id = call.support.ids[i], column = id - call.rows.label_start;
    if (id < 0 || column < 0 || column >= call.grad_logits.vocab_size) continue;
    const bool is_label = id == call.rows.labels[token];
    const double z = get(call.values, i);
    const ScaledLogit logit = scaled(z);
    double derivative = grad * (is_label ? rest / total : -std::exp(logit.x - center) / total);
    if (dense) {
      const double u = logit.x - row_max, p = std::exp(u) / sum;
      derivative += full * (is_label ? others : -p);
      if (p != 0) derivative += p * (logsumexp + entropy * (mean - u));
    }
    if (z == -INFINITY && total == total) derivative = 0;  // a forbidden token
    store(column, derivative * logit.slope);
  }
}

}  // namespace erc
