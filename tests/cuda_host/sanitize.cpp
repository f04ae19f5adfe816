// The kernels on memory of exactly the size that they may touch, in a program of its own: for AddressSanitizer and UBSan.
// Prints "ok" if every launch succeeds and every entropy is what double arithmetic gives.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/token_loss.h"
#include "cuda/rows.cuh"
#include "cuda_host/fibers.h"

extern "C" void erc_cuda_host_configure(int has_clusters, int compiled_for, int multiprocessors, unsigned order, int poison,
                                        int l2_bytes);

namespace {

using namespace erc;
using namespace erc::cuda;

int failures = 0;

void expect(bool condition, const char* what, int64_t vocab_size) {
  if (condition) return;
  std::printf("failed: %s at V = %ld: %s\n", what, long(vocab_size), cudaGetErrorString(cudaErrorLaunchFailure));
  ++failures;
}

template <class T>
T* exact(size_t count, size_t offset_bytes = 0) {  // never freed: the process ends soon, and leaks are not the question
  char* memory = static_cast<char*>(std::aligned_alloc(16, (count * sizeof(T) + offset_bytes + 15) / 16 * 16));
  return reinterpret_cast<T*>(memory + offset_bytes);
}

template <class T>
double entropy_of(const T* row, int64_t vocab_size) {
  double sum = 0, weighted = 0;
  for (int64_t j = 0; j < vocab_size; ++j) {
    const double x = to_real(row[j]);
    sum += std::exp(x);
    weighted += std::exp(x) * x;
  }
  return std::log(sum) - weighted / sum;
}

template <class T>
void exercise(DType dtype, int64_t vocab_size, int64_t offset_bytes, double softcap) {
  using Real = stats_t<T>;
  constexpr int64_t n = 3;
  auto* logits = exact<T>(n * vocab_size, offset_bytes);
  for (int64_t i = 0; i < n * vocab_size; ++i) {
    logits[i] = from_real(T{}, Real((i * 2654435761u >> 8) % 1000) / 250 - 2);
  }
  auto* grads = exact<T>(n * vocab_size, offset_bytes);
  std::vector<int64_t> labels{vocab_size - 1, -100, 0}, active(n);
  RowInputs rows{};
  rows.logits = {logits, dtype, n, vocab_size, n, 0, vocab_size};
  rows.labels = labels.data();
  rows.scaling = {1, softcap, 1};
  rows.ignore_index = -100;
  rows.num_tokens = n;
  Rows grad_rows = rows.logits;
  grad_rows.data = grads;
  std::vector<Real> ones(n, 1), out[4] = {ones, ones, ones, ones}, saved(8 * n), stats(6 * n);
  std::vector<int32_t> flags(n);
  std::vector<char> workspace(workspace_bytes(rows.logits) + 1);
  StatsForward forward{rows, out[0].data(), out[1].data(), out[2].data(), saved.data(), nullptr, workspace.data()};
  expect(stats_forward(forward, nullptr) == cudaSuccess, "stats_forward", vocab_size);
  if (softcap == 0) expect(std::fabs(out[1][0] - entropy_of(logits, vocab_size)) < 1e-5, "entropy", vocab_size);
  const StatsBackward backward{rows, saved.data(), ones.data(), ones.data(), ones.data(), grad_rows};
  expect(stats_backward(backward, nullptr) == cudaSuccess, "stats_backward", vocab_size);
  StatsForward shard = forward;
  shard.logprob = shard.entropy = shard.logsumexp = nullptr;
  shard.label_value = out[3].data();
  expect(stats_forward(shard, nullptr) == cudaSuccess, "partial_stats", vocab_size);

  const bool wide = sizeof(Real) == 8;
  const Column column{ones.data(), wide ? DType::kFloat64 : DType::kFloat32};
  std::vector<TokenInputs<Real>> table(n);
  double group_sums[2], metrics[Metric::kCount];
  int32_t counter = 7;
  Real total;
  int64_t tokens;
  TokenTable tokens_in{};
  tokens_in.num_tokens = n, tokens_in.num_groups = 1, tokens_in.ignore_index = -100, tokens_in.vocab_size = vocab_size;
  tokens_in.labels = {labels.data(), DType::kInt64};
  tokens_in.advantages = tokens_in.old_entropy = column;
  tokens_in.params = {Reduction::kTokenMean, Present::kOldEntropy, 0, 1, 1, 0.01, 0, false, -1, -1, -1, 1};
  tokens_in.table = table.data(), tokens_in.final_labels = active.data(), tokens_in.counter = &counter;
  tokens_in.group_sums = group_sums;
  expect(token_table(tokens_in, wide, nullptr) == cudaSuccess, "token_table", vocab_size);
  PolicyLoss loss{};
  loss.rows = rows;
  loss.rows.labels = active.data();
  loss.table = table.data();
  loss.params = {
      RuleId::kPPOClip, 0, Gate::kKeepValue, Present::kOldEntropy, {0.2, 0.28, INFINITY, INFINITY}, 0.05, 0.05, 1e-8, 0, 10};
  loss.loss = out[0].data(), loss.token_loss = out[1].data(), loss.logprob = out[2].data(), loss.entropy = out[3].data();
  loss.flags = flags.data();
  loss.grad_logits = grad_rows;
  loss.workspace = workspace.data();
  expect(policy_loss(loss, nullptr) == cudaSuccess, "policy_loss", vocab_size);
  std::vector<char> partials(summary_bytes(n));
  const TokenSummary summary{n,
                             -100,
                             out[0].data(),
                             out[2].data(),
                             out[3].data(),
                             table.data(),
                             nullptr,
                             flags.data(),
                             active.data(),
                             loss.params,
                             &total,
                             metrics,
                             &tokens,
                             &counter,
                             reinterpret_cast<double*>(partials.data())};
  expect(token_summary(summary, wide, nullptr) == cudaSuccess && tokens == 2, "token_summary", vocab_size);
  expect(scale_rows({grad_rows, grad_rows, out[0].data(), false}, nullptr) == cudaSuccess, "scale_rows", vocab_size);
  RowInputs pair = rows;
  pair.labels = nullptr;
  expect(paired_forward({pair, rows.logits, stats.data(), saved.data()}, nullptr) == cudaSuccess, "paired_forward", vocab_size);
  expect(paired_backward({pair, rows.logits, saved.data(), stats.data(), grad_rows}, nullptr) == cudaSuccess, "paired_backward",
         vocab_size);
  if (dtype == DType::kFloat32) {
    loss.grad_logits.dtype = DType::kBFloat16;
    loss.grad_logits.data = exact<bfloat16>(n * vocab_size, offset_bytes / 2);
    expect(policy_loss(loss, nullptr) == cudaSuccess, "policy_loss with a narrower gradient", vocab_size);
  }
  loss.grad_logits = rows.logits;
  expect(policy_loss(loss, nullptr) == cudaSuccess, "policy_loss in place", vocab_size);
}

// Less than a vector, one and a tail, a size without one, two segments and more: aligned, and an element off.
template <class T>
void exercise_all(DType dtype) {
  constexpr int64_t kSegmentColumns = kSegmentBytes / int64_t(sizeof(T));
  for (const int64_t vocab_size : {int64_t(1), int64_t(3), int64_t(8), int64_t(1027), kSegmentColumns + 2048}) {
    exercise<T>(dtype, vocab_size, 0, 0);
  }
  exercise<T>(dtype, 2 * kSegmentColumns + 3, sizeof(T), 0);
  exercise<T>(dtype, 1027, sizeof(T), 5);
  exercise<T>(dtype, kSegmentColumns + 5, sizeof(T), 5);  // long enough for the main loops
}

}  // namespace

int main() {
  for (int machine = 0; machine < 3; ++machine) {  // cluster; block; split
    erc_cuda_host_configure(machine == 0, 90, machine == 2 ? 132 : 1, machine, 0xff, 1 << 20);
    exercise_all<float>(DType::kFloat32);
    exercise_all<bfloat16>(DType::kBFloat16);
    exercise_all<float16>(DType::kFloat16);
    exercise_all<double>(DType::kFloat64);
  }
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures != 0;
}
