// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace erc {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace baseline {
extern const Kernels table;
}
#else
namespace neon {
extern const Kernels table;
}
#endif

static const Kernels& choose() {
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const struct {
    const Kernels* table;
    bool supported;
  } candidates[] = {{&avx512::table, has_avx512}, {&avx2::table, has_avx2}, {&baseline::table, true}};
  const char* wanted = std::getenv("ERC_CPU_ISA");
  for (const auto& candidate : candidates) {
    if (candidate.supported && (wanted == nullptr || std::strcmp(wanted, candidate.table->isa) == 0)) return *candidate.table;
  }
  return baseline::table;  // a name that this processor does not run
#else
  return neon::table;
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace erc
