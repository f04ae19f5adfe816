// Products of bfloat16 matrices with float32 results, which PyTorch has on GPUs only.
#pragma once

#include <cstdint>

namespace erc {

// out[i][j] = sum over k of rows[i][k] * weight[j][k], plus bias[j], plus what out[i][j] was where that is wanted. Strides are in
// elements, by the index that they belong to; one of those of `out` is 1. The weight is the large operand.
struct WideProduct {
  const uint16_t *rows, *weight;
  const float* bias;  // null without
  float* out;
  int64_t num_rows, num_columns, width;
  struct Strides {
    int64_t outer, inner;
  } row_strides, weight_strides, out_strides;
  bool accumulate;
};

// Which instructions do it here: "amx", "avx512_bf16", or "" where nothing does.
const char* wide_product_isa();

// `rows` in the order that the instructions read: wide_product_packed(call) elements. `pack` fills them, then `run` computes
// blocks of kProductBlock columns.
constexpr int64_t kProductBlock = 32;
int64_t wide_product_packed(const WideProduct& call);
void pack_wide_product(const WideProduct& call, uint16_t* packed);
void run_wide_product(const WideProduct& call, const uint16_t* packed, int64_t begin, int64_t end);

}  // namespace erc
