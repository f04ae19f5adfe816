// Multiplies gradient rows by the upstream gradient, which stays on the device. In place a row whose factor is 1 is not touched:
// a grid that the GPU holds at once reads the factors, many at a time, and is done.
#include "cuda/gradient.cuh"

namespace erc {
namespace cuda {

constexpr int kScaleBlocks = 8;  // a multiprocessor has place for as many

// Every thread of a block scales its columns of `row`: of the destination's chunks the runs part, part + parts, ... of kLanes.
template <class V>
ERC_DEVICE void scale_row(const ScaleRows& call, int64_t row, int part, int parts, typename V::Real factor) {
  using T = typename V::Element;
  const T* source = call.source.row<const T>(row);
  T* destination = call.destination.row<T>(row);
  if (factor == 1 && source == destination) return;
  const auto scaled = [&](const Raw& raw) {
    Raw out;
#pragma unroll
    for (int k = 0; k < kVector<T> / 2; ++k) {
      set_pair(T{}, out, k, mul_pair(pair_of(T{}, raw, k), Pair<typename V::Real>{factor, factor}));
    }
    return out;
  };
  const int columns = int(call.source.vocab_size);
  const Chunks<T> chunks(destination, columns, V::aligned);
  const T* z = source + chunks.head;
  T* out = destination + chunks.head;
  with_reader<V::aligned, Effort::kOneCode>(GlobalMemory{source, source + columns}, z, [&](const auto& reader) {
    for (int64_t i = part * kLanes + int(threadIdx.x); i < chunks.whole; i += parts * kLanes) {
      store_streaming(out + i * kVector<T>, scaled(reader.load(z + i * kVector<T>)));
    }
  });
  if (part != 0) return;
  const auto rest = [&](int begin, int count) {
    store_elements(destination + begin, scaled(load_elements(source + begin, count, T{})), count);
  };
  if (threadIdx.x == 0) rest(0, chunks.head);
  if (threadIdx.x == kWarp) rest(chunks.tail_begin(), chunks.tail);
}

// Block g * parts + part takes its part of the rows g, g + groups, ...
template <class V>
__global__ void __launch_bounds__(kLanes) scale_kernel(ScaleRows call, int parts) {
  using Real = typename V::Real;
  const Real* scale = static_cast<const Real*>(call.scale);
  const int part = int(blockIdx.x % parts);
  const int64_t first = blockIdx.x / parts, groups = gridDim.x / parts, rows = call.source.num_rows;
  if (call.one_scale) {
    const Real factor = scale[0];
    if (factor == 1 && call.source.data == call.destination.data) return;
    for (int64_t row = first; row < rows; row += groups) scale_row<V>(call, row, part, parts, factor);
    return;
  }
  auto* factors = reinterpret_cast<Real*>(dynamic_shared());  // of the next kLanes rows of this block
  for (int64_t begin = first; begin < rows; begin += kLanes * groups) {
    const int64_t own = begin + threadIdx.x * groups;
    factors[threadIdx.x] = own < rows ? scale[own] : Real(1);
    __syncthreads();
    int64_t row = begin;
    for (int k = 0; k < kLanes && row < rows; ++k, row += groups) scale_row<V>(call, row, part, parts, factors[k]);
    __syncthreads();  // the next factors overwrite these
  }
}

cudaError_t scale_rows(const ScaleRows& call, cudaStream_t stream) {
  const int64_t n = call.source.num_rows;
  if (n == 0) return cudaSuccess;
  return dispatch({&call.source, &call.destination}, false, [&](auto variant) {
    using V = decltype(variant);
    constexpr int64_t kBlockColumns = int64_t(kLanes) * kUnroll * kVector<typename V::Element>;
    const int64_t blocks = (call.source.vocab_size + kBlockColumns - 1) / kBlockColumns;
    const int64_t parts = blocks < kMaxSegments ? (blocks > 0 ? blocks : 1) : kMaxSegments;
    const int64_t resident = int64_t(device_info().multiprocessors) * kScaleBlocks / parts;
    const int64_t groups = n < resident ? n : (resident > 0 ? resident : 1);
    const int bytes = kLanes * int(sizeof(typename V::Real));
    return launch(scale_kernel<V>, {groups * parts, kLanes, 1, bytes, stream}, call, int(parts));
  });
}

}  // namespace cuda
}  // namespace erc
