// The CPU's main loops by themselves, for cpu_loops.py: functions whose machine code it counts, how long they take for a row
// that stays in the cache, and plain reads.
#include <chrono>
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
    const SegmentSums<float> sums = near_segment_sums<false>(problem.scale, problem.exp, 18.0f, p, n, distance);
    asm volatile("" : : "m"(distance));  // a part of the sweep
    return sums;
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
double nanoseconds_in_cache(bool of_gradient) {
  Problem<T> problem;
  const int64_t n = int64_t(problem.row.size());
  const double seconds = of_gradient
                             ? best_seconds([&] { gradient(problem, problem.grad.data()); })
                             : best_seconds([&] { problem.sweep = row_sweep<false>(problem.scale, problem.row.data(), n); });
  return 1e9 * seconds / double(n);
}

// The sum of the 64-bit words of whole pages: of kPlaces pages in turn, and of each a line kAhead bytes on to the second cache.
template <int kPlaces, int kAhead>
uint64_t read(const char* p, int64_t bytes) {
  typedef uint64_t Words __attribute__((vector_size(4 * kWidth)));
  constexpr int64_t kLine = 64, kPage = 4096;
  Words sum[2] = {};
  for (int64_t page = 0; page + kPlaces * kPage <= bytes; page += kPlaces * kPage) {
    for (int64_t line = 0; line < kPage; line += kLine) {
      for (int place = 0; place < kPlaces; ++place) {
        const char* at = p + page + place * kPage + line;
        if (kAhead) __builtin_prefetch(at + kAhead, 0, 2);
        for (int64_t i = 0; i < kLine; i += int64_t(sizeof(Words))) {
          Words words;
          std::memcpy(&words, at + i, sizeof words);
          sum[place % 2] += words;
        }
      }
    }
  }
  uint64_t total = 0;
  for (int i = 0; i < kWidth / 2; ++i) total += sum[0][i] + sum[1][i];
  return total;
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

extern "C" double in_cache(bool of_bfloat16, bool of_gradient) {
  return of_bfloat16 ? nanoseconds_in_cache<bfloat16>(of_gradient) : nanoseconds_in_cache<float>(of_gradient);
}

extern "C" uint64_t read_in_order(const char* p, int64_t bytes) { return read<1, 0>(p, bytes); }
extern "C" uint64_t read_two_pages(const char* p, int64_t bytes) { return read<2, 0>(p, bytes); }
extern "C" uint64_t read_four_pages(const char* p, int64_t bytes) { return read<4, 0>(p, bytes); }
extern "C" uint64_t read_prefetched(const char* p, int64_t bytes) { return read<1, 8192>(p, bytes); }
