// Multiplies gradient rows by the upstream gradient, which stays on the device. In place, a row whose factor is 1 costs one read
// of that factor.
#include "cuda/gradient.cuh"

namespace erc {
namespace cuda {

// Block row * blocks_per_row + part takes every blocks_per_row-th run of vectors.
template <class V>
__global__ void __launch_bounds__(kLanes) scale_kernel(ScaleRows call, int blocks_per_row) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const int64_t row = blockIdx.x / blocks_per_row;
  const Real factor = static_cast<const Real*>(call.scale)[row];
  const T* source = row_pointer<const T>(call.source, row);
  T* destination = row_pointer<T>(call.destination, row);
  if (factor == 1 && source == destination) return;
  const int64_t columns = call.source.vocab_size;
  const int64_t step = int64_t(blocks_per_row) * kLanes * kVector<T>;
  for (int64_t i = (int64_t(blockIdx.x % blocks_per_row) * kLanes + threadIdx.x) * kVector<T>; i < columns; i += step) {
    const bool whole = i + kVector<T> <= columns;
    const int count = whole ? kVector<T> : int(columns - i);
    const Raw raw = whole ? GlobalSource<T, V::aligned>::load(source + i) : load_elements(source + i, count, V::minus_infinity());
    Raw out;
#pragma unroll
    for (int k = 0; k < kVector<T> / 2; ++k) {
      set_pair(T{}, out, k, mul_pair(pair_of(T{}, raw, k), Pair<Real>{factor, factor}));
    }
    if (whole) {
      store_vector<V>(destination + i, out);
    } else {
      store_elements(destination + i, out, count);
    }
  }
}

cudaError_t scale_rows(const ScaleRows& call, cudaStream_t stream) {
  const int64_t n = call.source.num_rows;
  if (n == 0) return cudaSuccess;
  return dispatch({&call.source, &call.destination}, false, [&](auto variant) {
    using V = decltype(variant);
    constexpr int64_t kBlockColumns = int64_t(kLanes) * kUnroll * kVector<typename V::Element>;
    const int64_t blocks = (call.source.vocab_size + kBlockColumns - 1) / kBlockColumns;
    const int blocks_per_row = int(blocks < kMaxSegments ? (blocks > 0 ? blocks : 1) : kMaxSegments);
    return launch(scale_kernel<V>, {n * blocks_per_row, kLanes, 1, 0, stream}, call, blocks_per_row);
  });
}

}  // namespace cuda
}  // namespace erc
