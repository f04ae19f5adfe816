// Multiplies gradient rows by the upstream gradient. A row whose factor is 1 is not touched where it stands.
#include "cpu/isa/operators.h"
#include "cpu/isa/rows.h"

namespace erc {
namespace ERC_ISA {

void scale_rows(const ScaleRows& call, int64_t begin, int64_t end) {
  dispatch(call.source.dtype, false, [&](auto zero, auto) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    const int64_t vocab_size = call.source.vocab_size;
    for (int64_t i = begin; i < end; ++i) {
      const Real factor = static_cast<const Real*>(call.scale)[call.one_scale ? 0 : i];
      const T* source = call.source.row<T>(i);
      T* destination = call.destination.row<T>(i);
      if (factor == 1) {
        if (source != destination) std::memcpy(destination, source, vocab_size * sizeof(T));
        continue;
      }
      for (int64_t j = 0; j < vocab_size; ++j) store_one(destination + j, load_one(source + j) * factor);
    }
  });
}

}  // namespace ERC_ISA
}  // namespace erc
