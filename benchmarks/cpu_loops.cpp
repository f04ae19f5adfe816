// The CPU's main loops by themselves, for cpu_loops.py: functions whose machine code it counts, and how long they take for a row
// that stays in the cache.
#include <chrono>
#include <cstdio>
#include <vector>

#include "cpu/isa/gradient.h"

using namespace erc;
using namespace erc::ERC_ISA;

namespace {

constexpr int64_t kRowBytes = 300000;  // of bfloat16, V is about that of Qwen; a second cache holds it
constexpr bool kBare = !kIsLifted<float>;

template <class T>
struct Problem {
  std::vector<T> row, grad;
  RowScale<float> scale;
  ScaledExp<float> exp{1.0};
  RowSweep sweep;

  static RowInputs inputs() {
    RowInputs in{};
    in.scaling.logit_scale = in.scaling.temperature = 1;
    return in;
  }
  Problem() : row(kRowBytes / sizeof(T)), grad(row.size()), scale(inputs(), 0) {
    uint32_t state = 1;
    for (T& logit : row) {
      state = state * 1664525 + 1013904223;
      store_one(&logit, float(state >> 8) * 0x1p-24f * 16 - 4);
    }
    store_one(&row[row.size() / 2], 18.0f);
    sweep = row_sweep<false>(scale, row.data(), int64_t(row.size()));
  }
};

template <class T>
SegmentSums<float> statistics(const Problem<T>& problem, const T* p, int64_t n) {
  if constexpr (kBare) {
    Distance distance;
    return near_segment_sums<false>(problem.scale, problem.exp, 18.0f, p, n, distance);
  } else {
    return segment_sums<false, false, std::is_same_v<T, bfloat16>>(problem.scale, problem.exp, 18.0f, p, n);
  }
}

template <class T>
void gradient(const Problem<T>& problem, T* grad) {
  const RowGradient<double> g(problem.sweep.state, 1, {0.7, 0, 0}, 3.0);
  const Term<float, true, false> term(problem.exp, 18.0f, Factor<float>(g, 1, 1, problem.exp.rate_error));
  const T* row = problem.row.data();
  gradient_blocks<false, false>(problem.scale, term, row, int64_t(problem.row.size()), grad, row);
}

template <class Body>
double best_seconds(Body&& body) {
  double best = 1;
  for (int i = 0; i < 400; ++i) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = seconds < best ? seconds : best;
  }
  return best;
}

template <class T>
void print_times(const char* name) {
  Problem<T> problem;
  const double elements = double(problem.row.size());
  const int64_t n = int64_t(problem.row.size());
  const double sums = best_seconds([&] { problem.sweep = row_sweep<false>(problem.scale, problem.row.data(), n); });
  const double slopes = best_seconds([&] { gradient(problem, problem.grad.data()); });
  std::printf("statistics_%s %.6g\ngradient_%s %.6g\n", name, 1e9 * sums / elements, name, 1e9 * slopes / elements);
}

}  // namespace

#define ERC_COUNTED extern "C" __attribute__((noinline, used, flatten))

ERC_COUNTED void statistics_float32(const void* problem, const float* p, int64_t n, void* sums) {
  *static_cast<SegmentSums<float>*>(sums) = statistics(*static_cast<const Problem<float>*>(problem), p, n);
}
ERC_COUNTED void statistics_bfloat16(const void* problem, const bfloat16* p, int64_t n, void* sums) {
  *static_cast<SegmentSums<float>*>(sums) = statistics(*static_cast<const Problem<bfloat16>*>(problem), p, n);
}
ERC_COUNTED void gradient_float32(const void* problem, float* grad) {
  gradient(*static_cast<const Problem<float>*>(problem), grad);
}
ERC_COUNTED void gradient_bfloat16(const void* problem, bfloat16* grad) {
  gradient(*static_cast<const Problem<bfloat16>*>(problem), grad);
}

int main() {
  print_times<float>("float32");
  print_times<bfloat16>("bfloat16");
}
