// The row algebra: what one sweep over a row of logits leaves behind, and everything that follows from it.
//
// v is the centred variable's carrier: the raw logit, or its softcapped value; x = v * scale is what enters the softmax.
// R excludes one maximum because 1 + R in float32 forgets R where a policy is peaked: a token with H = 1e-6 has R near 1e-7,
// and the entropy-ratio gate compares entropies to a per cent.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace erc {

// One value a row of what the statistics are differentiated by.
template <class Real>
struct StatGrads {
  Real logprob, entropy, logsumexp;
};

template <class Real>
struct RowState {
  Real row_max = -INFINITY;   // max v
  Real sum_rest = 0;          // R: sum of exp((v - row_max) * scale) over everything but one maximum
  Real weighted_sum = 0;      // t: sum of exp((v - row_max) * scale) * (v - row_max) * scale, <= 0

  ERC_HOST_DEVICE Real sum_exp() const { return 1 + sum_rest; }

  // States of disjoint parts of a row. Order fixes rounding, nothing else. A part without any finite logit is the identity;
  // one whose row_max is NaN takes over.
  ERC_HOST_DEVICE void merge(RowState other, Real scale) {
    if (other.row_max > row_max || other.row_max != other.row_max) {
      RowState self = *this;
      *this = other;
      other = self;
    }
    if (other.row_max == -INFINITY) return;
    const Real shift = (other.row_max - row_max) * scale;
    const Real factor = std::exp(shift);
    sum_rest += factor * other.sum_exp();
    // A part at the lowest finite numbers weighs nothing, but its product with the shift may overflow.
    weighted_sum += factor == 0 ? Real(0) : factor * (other.weighted_sum + other.sum_exp() * shift);
  }

  // A row that is all -inf, or holds NaN or +inf, has no distribution.
  ERC_HOST_DEVICE bool is_valid() const {
    return row_max > -INFINITY && row_max < INFINITY && sum_rest < INFINITY && weighted_sum > -INFINITY;
  }

  ERC_HOST_DEVICE Real logsumexp(Real scale) const { return row_max * scale + std::log1p(sum_rest); }
  ERC_HOST_DEVICE Real logprob(Real label_value, Real scale) const {
    return (label_value - row_max) * scale - std::log1p(sum_rest);
  }
  // Both terms are >= 0: no cancellation.
  ERC_HOST_DEVICE Real entropy() const { return std::log1p(sum_rest) - weighted_sum / sum_exp(); }
};

// d/dx_j of g_lp * logprob + g_H * entropy + g_lse * logsumexp, as exp((v_j - row_max) * scale) * (constant + slope * (v_j - row_max))
// for every column, and the labelled column's value by itself: there 1 - p_y would cancel.
template <class Real>
struct RowGradient {
  Real constant, slope, label;

  ERC_HOST_DEVICE RowGradient(const RowState<Real>& state, Real scale, StatGrads<Real> g, Real label_value) {
    const Real inverse_sum = 1 / state.sum_exp();
    const Real mean = state.weighted_sum * inverse_sum;  // E_p[x - max x]
    constant = (g.logsumexp - g.logprob + g.entropy * mean) * inverse_sum;
    slope = -g.entropy * scale * inverse_sum;
    const Real shift = (label_value - state.row_max) * scale;
    if (label_value == -INFINITY) {
      label = 0;
    } else if (shift == 0) {  // the label is the maximum: 1 - p_y = R / S without cancellation
      label = (g.logprob * state.sum_rest + g.logsumexp + g.entropy * mean) * inverse_sum;
    } else {
      const Real probability = std::exp(shift) * inverse_sum;
      const Real others = probability == 0 ? Real(0) : probability * (g.logsumexp + g.entropy * (mean - shift));  // 0 * inf
      label = g.logprob * (1 - probability) + others;
    }
  }
};

}  // namespace erc
