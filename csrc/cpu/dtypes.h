// The 16-bit types as bit patterns; arithmetic is always float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace erc {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

// The dtype of statistics of logits of type T.
template <class T>
struct StatsOf {
  using type = float;
};
template <>
struct StatsOf<double> {
  using type = double;
};
template <class T>
using stats_t = typename StatsOf<T>::type;

}  // namespace erc
