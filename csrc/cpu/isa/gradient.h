// The gradient sweep, and the labelled column by itself (common/row_state.h says why).
#pragma once

#include "cpu/isa/sweep.h"

namespace erc {
namespace ERC_ISA {

// What the exponential of a column is multiplied by: constant + slope * d + curve * d^2 with d = v - row_max.
template <class Real>
struct Factor {
  Real constant, slope, curve;
  bool varies;  // with d

  // Every exponential lacks a factor of 1 + rate_error * x, which matters to the contract from some size on.
  Factor(const RowGradient<double>& g, double chain, double scale, double rate_error) {
    constexpr double kNegligible = 3e-8;
    varies = g.slope != 0 || std::fabs(rate_error) > kNegligible;
    const double lacking = varies ? rate_error * scale : 0;
    constant = Real(g.constant * chain);
    slope = Real((g.slope + g.constant * lacking) * chain);
    curve = Real(g.slope * lacking * chain);
  }
  Factor operator*(double x) const {
    Factor product = *this;
    for (Real* part : {&product.constant, &product.slope, &product.curve}) *part = Real(*part * x);
    return product;
  }
};

// A column's gradient but for a softcap's slope: exp((v - row_max) * scale) * factor(v - row_max). kVaries: the factor does.
// kNear: without a clamp, because every whole block is near (RowSweep) or lifted exponentials take any logit.
template <class Real, bool kNear, bool kVaries>
struct Term {
  ScaledExp<Real> exp;
  Real row_max;
  Factor<Real> factor;

  Term(const ScaledExp<Real>& exp, Real row_max, const Factor<Real>& factor)
      : exp(exp), row_max(row_max), factor(factor * (1 / lift_of<Real>())) {}

  template <class V, class Whole>
  ERC_INLINE V operator()(V v, Whole) const {
    V d = v - row_max, e;
    if constexpr (kNear && Whole::value) {
      e = exp.near(d);
    } else {
      d = swept_clamp(exp, d);
      e = swept_exp(exp, d);
    }
    if constexpr (kVaries) return e * ((factor.curve * d + factor.slope) * d + factor.constant);
    return e * factor.constant;
  }
};

#if ERC_HAS_SCALEF
// The constant and the center become numbers of the row's polynomial, which takes any logit.
template <>
struct Term<float, true, false> {
  ScaledExp<float>::Polynomial polynomial;
  float rate, offset;

  Term(const ScaledExp<float>& exp, float row_max, const Factor<float>& factor) : rate(exp.rate) {
    constexpr double kLift = ScaledExp<float>::kLift;
    const double exact = kLift - double(row_max) * exp.rate;
    offset = float(exact);  // what it lacks becomes the constant's
    polynomial = exp.kPolynomial * (std::exp2(exact - offset - kLift) * factor.constant);
  }
  template <class Whole>
  ERC_INLINE f32v operator()(f32v v, Whole) const {
    return ScaledExp<float>::lifted_by(polynomial, v * rate + offset);
  }
};
#endif

// grad[j] = term(v_j) * dx/dz, the labelled column too. grad may be the row itself: every block is read before it is written.
// `next`: see row_gradient.
template <bool kSoftcap, bool kStream, class T, class Term, class G>
inline void gradient_blocks(const RowScale<stats_t<T>>& scale, const Term& term, const T* row, int64_t vocab_size, G* grad,
                            const T* next) {
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  const FlushSubnormals flush;
  // Captured by value: through a reference, every store to grad could change the constants, and each block would reload them.
  const auto gradient = [=](const T* block, V(&g)[kVectors], auto whole) {
    V v[kVectors];
    load_block_v<kSoftcap>(scale, block, v);
    for (int j = 0; j < kVectors; ++j) g[j] = term(v[j], whole);
    if constexpr (kSoftcap) {
      V z[kVectors];
      load_block(block, z);
      for (int j = 0; j < kVectors; ++j) g[j] = g[j] * softcap_slope<stats_t<T>>(scale, z[j]);
    }
  };
  for_each_block(row, vocab_size, [=](const T* block, int64_t i, auto whole) {
    V g[kVectors];
    gradient(block, g, whole);
    if constexpr (decltype(whole)::value) {
      prefetch_block<false>(next + i, 0);
      store_block<kStream, T>(grad + i, g);
    } else {
      G padded[kLanes];
      store_block<false, T>(padded, g);
      std::memcpy(grad + i, padded, (vocab_size - i) * sizeof(G));
    }
  });
  if (kStream) stream_fence();
}

// visit(std::true_type or std::false_type) for each of the conditions: what runs is compiled for it.
template <class Visit>
inline void with_constants(Visit&& visit) {
  visit();
}
template <class Visit, class... Conditions>
inline void with_constants(Visit&& visit, bool first, Conditions... others) {
  const auto fixed = [&](auto value) { with_constants([&](auto... values) { visit(value, values...); }, others...); };
  first ? fixed(std::true_type{}) : fixed(std::false_type{});
}

// Of type G: that of the logits, or a narrower one in memory of its own. `next`: the row that will be read after this one, which
// comes to the cache meanwhile.
template <bool kSoftcap, class T, class G>
inline void row_gradient(const RowScale<stats_t<T>>& scale, const RowSweep& sweep, const StatGrads<double>& grads, const T* row,
                         int64_t vocab_size, int64_t label, G* grad, const T* next) {
  using Real = stats_t<T>;
  if (!sweep.state.is_valid()) return fill(grad, vocab_size, Real(NAN));
  if (grads.logprob == 0 && grads.entropy == 0 && grads.logsumexp == 0) {
    std::memset(static_cast<void*>(grad), 0, vocab_size * sizeof(G));
    return;
  }
  const Real label_value = label == kNoColumn ? Real(0) : load_v_one<kSoftcap>(scale, row + label);
  // Read before the gradient may overwrite the row.
  double label_slope = 1;
  if (kSoftcap && label != kNoColumn) {
    label_slope = vtanh_slope(double(load_v_one<false>(scale, row + label)) * double(scale.inner));
  }
  const RowGradient<double> g(sweep.state, scale.scale, grads, double(label_value));
  const ScaledExp<Real> exp(scale.scale);
  const Factor<Real> factor(g, scale.chain, scale.scale, exp.rate_error);
  // A narrower gradient is a chunk's, which a product reads next: it stays in the cache.
  constexpr bool kMayStream = std::is_same_v<T, G>;
  const bool stream = kMayStream && static_cast<const void*>(grad) != row && reinterpret_cast<uintptr_t>(grad) % 64 == 0;
  const auto blocks = [&](auto near, auto varies, auto streams) {
    using Chosen = Term<Real, decltype(near)::value, decltype(varies)::value>;
    gradient_blocks<kSoftcap, kMayStream&& decltype(streams)::value>(scale, Chosen(exp, Real(sweep.state.row_max), factor), row,
                                                                     vocab_size, grad, next);
  };
  if constexpr (kSoftcap || !std::is_same_v<Real, float>) {  // one form of what is rare
    with_constants([&](auto streams) { blocks(std::false_type{}, std::true_type{}, streams); }, stream);
  } else if constexpr (kIsLifted<Real>) {
    // A larger center's rounding would be too much to make up for.
    const bool folds = !factor.varies && std::fabs(sweep.state.row_max * exp.rate) < 1024;
    const auto form = [&](auto folded, auto streams) {
      blocks(folded, std::bool_constant<!decltype(folded)::value>{}, streams);
    };
    with_constants(form, folds, stream);
  } else {
    with_constants(blocks, sweep.near, factor.varies, stream);
  }
  if (label == kNoColumn) return;
  store_one(grad + label, Real(g.label * scale.chain * label_slope));
}

// body(G{}) for the gradient's element type: that of the logits T, or of float32 logits a narrower one.
template <class T, class Body>
inline void with_gradient_type(DType dtype, Body&& body) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == DType::kBFloat16) return body(bfloat16{});
    if (dtype == DType::kFloat16) return body(float16{});
  }
  body(T{});
}

}  // namespace ERC_ISA
}  // namespace erc
