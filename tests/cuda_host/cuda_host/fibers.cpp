#include "cuda_host/fibers.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>

// A switch of fibers clears the shadow of a stack. By default it maps fresh pages for that, which took four fifths of the time.
// What the sanitized program leaves allocated is not the question.
extern "C" const char* __asan_default_options() { return "clear_shadow_mmap_threshold=1048576:detect_leaks=0"; }
#endif

namespace erc_host {

constexpr int kWarp = 32;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

// A meeting point of `expected` threads: a block barrier, a warp operation, a cluster barrier.
struct Meeting {
  int expected = 0, arrived = 0, phase = 0;
  const char* file = nullptr;
  int line = 0;
  uint64_t values[2][kWarp] = {};  // of a warp operation, by the phase's parity
};

struct Copy {
  void* destination;
  const void* source;
  uint32_t bytes;
  uint64_t* barrier;
  const void *begin, *end;  // of what is known of the source
};

struct Cluster;

struct Block {
  Cluster* cluster;
  int rank = 0;
  char* shared = nullptr;
  Meeting barrier;
  std::vector<Meeting> warps;
  std::vector<Copy> copies;  // issued, not yet landed: they land when somebody waits for them, as late as the rules allow
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Meeting barrier;
};

struct Fiber {
  Thread thread;
  ucontext_t context;
  char* stack = nullptr;
  bool done = false;
  const Meeting* waits_for = nullptr;
  int waits_phase = 0;
  void* fake_stack = nullptr;

  bool runnable() const { return !done && (waits_for == nullptr || waits_for->phase != waits_phase); }
};

Thread* current = nullptr;
Machine machine;
std::vector<Launch> launches;
Executor executor = nullptr;

namespace {

std::string message;
bool failed = false;
ucontext_t scheduler;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
std::vector<char*> stacks;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void* scheduler_fake = nullptr;
#endif

void to_scheduler(bool ending) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ending ? nullptr : &running->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  Fiber* self = running;
  swapcontext(&self->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (void)ending;
}

void to_fiber(Fiber& fiber) {
  running = &fiber;
  current = &fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack, kStackBytes);
#endif
  swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*body)();
  running->done = true;
  to_scheduler(true);
}

char* stack_number(size_t i) {
  while (stacks.size() <= i) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[i];
}

void arrive(Meeting& meeting) {
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.phase;
  }
}

void wait_until_over(const Meeting& meeting, int phase) {
  running->waits_for = &meeting;
  running->waits_phase = phase;
  if (meeting.phase == phase) to_scheduler(false);
  running->waits_for = nullptr;
}

// Arrives at a place in the source; everybody must be at the same one.
int arrive_at(Meeting& meeting, const char* what, const char* file, int line) {
  if (meeting.arrived == 0) {
    meeting.file = file;
    meeting.line = line;
  } else if (meeting.line != line || std::strcmp(meeting.file, file) != 0) {
    fail("divergent %s: thread %u of block %u is at %s:%d, others at %s:%d", what, current->thread_idx.x, current->block_idx.x,
         file, line, meeting.file, meeting.line);
  }
  const int phase = meeting.phase;
  arrive(meeting);
  return phase;
}

// 0 ... count - 1 in the order that the test chose.
std::vector<int64_t> chosen_order(int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(machine.order));
  return order;
}

void run_cluster(int64_t first_block, int64_t grid, int block_threads, int cluster_blocks, int shared_bytes) {
  Cluster cluster;
  cluster.barrier.expected = cluster_blocks * block_threads;
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (int rank = 0; rank < cluster_blocks; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = &cluster;
    block->rank = rank;
    void* memory = nullptr;
    if (shared_bytes > 0 && posix_memalign(&memory, 128, shared_bytes) != 0) abort();
    block->shared = static_cast<char*>(memory);
    if (memory != nullptr) std::memset(memory, machine.poison, shared_bytes);
    block->barrier.expected = block_threads;
    block->warps.resize((block_threads + kWarp - 1) / kWarp);
    for (size_t w = 0; w < block->warps.size(); ++w) block->warps[w].expected = std::min(kWarp, block_threads - int(w) * kWarp);
    for (int t = 0; t < block_threads; ++t) {
      auto fiber = std::make_unique<Fiber>();
      fiber->thread.thread_idx.x = t;
      fiber->thread.block_idx.x = unsigned(first_block + rank);
      fiber->thread.block_dim.x = block_threads;
      fiber->thread.grid_dim.x = unsigned(grid);
      fiber->thread.block = block.get();
      fiber->stack = stack_number(fibers.size());
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack;
      fiber->context.uc_stack.ss_size = kStackBytes;
      fiber->context.uc_link = nullptr;
      makecontext(&fiber->context, fiber_main, 0);
      fibers.push_back(std::move(fiber));
    }
    cluster.blocks.push_back(std::move(block));
  }
  const std::vector<int64_t> order = chosen_order(fibers.size());
  for (;;) {
    bool progress = false, all_done = true;
    for (int64_t i : order) {
      if (fibers[i]->runnable()) {
        progress = true;
        to_fiber(*fibers[i]);
        if (failed) break;
      }
      all_done = all_done && fibers[i]->done;
    }
    if (failed || all_done) break;
    if (progress) continue;
    for (const auto& fiber : fibers) {
      if (fiber->done) continue;
      const Meeting& meeting = *fiber->waits_for;
      char text[512];
      snprintf(text, sizeof text, "missing threads: thread %u of block %u waits at %s:%d, where only %d of %d arrived",
               fiber->thread.thread_idx.x, fiber->thread.block_idx.x, meeting.file ? meeting.file : "a cluster barrier",
               meeting.line, meeting.arrived, meeting.expected);
      message = text;
      failed = true;
      break;
    }
    break;
  }
  for (auto& block : cluster.blocks) {
    if (!failed && !block->copies.empty()) {
      message = "a bulk copy was issued that nobody waited for";
      failed = true;
    }
    free(block->shared);
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = text;
  failed = true;
  to_scheduler(true);
  abort();
}

bool run(int64_t grid, int block, int cluster, int shared_bytes, const std::function<void()>& kernel) {
  failed = false;
  message.clear();
  body = &kernel;
  if (grid % cluster != 0 || block < 1 || block > 1024 || shared_bytes > machine.shared_bytes_per_block) {
    message = "invalid launch";
    return false;
  }
  launches.push_back({grid, block, cluster, shared_bytes});
  for (int64_t i : chosen_order(grid / cluster)) {
    if (!failed) run_cluster(i * cluster, grid, block, cluster, shared_bytes);
  }
  current = nullptr;
  running = nullptr;
  return !failed;
}

bool execute(const void* kernel, int64_t grid, int block, int cluster, int shared_bytes, int count,
             const void* const* parameters, const int64_t* sizes) {
  message = "the kernel has no symbol";
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return false;
  launches.push_back({grid, block, cluster, shared_bytes});
  return executor(info.dli_sname, grid, block, cluster, shared_bytes, count, parameters, sizes) != 0;
}

char* shared_memory() { return current->block->shared; }

void sync_threads(const char* file, int line) {
  Meeting& barrier = current->block->barrier;
  wait_until_over(barrier, arrive_at(barrier, "barrier", file, line));
}

namespace {

// Leaves `value` with the warp, waits for all its lanes, returns what they left.
const uint64_t* gather(uint64_t value, unsigned mask, const char* file, int line) {
  Meeting& warp = current->block->warps[current->thread_idx.x / kWarp];
  const int lane = current->thread_idx.x % kWarp;
  if (mask != 0xffffffffu || warp.expected != kWarp) fail("a warp operation at %s:%d names fewer than 32 lanes", file, line);
  const int parity = warp.phase % 2;
  warp.values[parity][lane] = value;
  wait_until_over(warp, arrive_at(warp, "warp operation", file, line));
  return warp.values[parity];
}

}  // namespace

uint64_t exchange(uint64_t value, int from, unsigned mask, const char* file, int line) {
  return gather(value, mask, file, line)[from];
}

unsigned ballot(bool vote, unsigned mask, const char* file, int line) {
  const uint64_t* votes = gather(vote, mask, file, line);
  unsigned bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) bits |= unsigned(votes[lane]) << lane;
  return bits;
}

namespace {

// A barrier in shared memory: kSet, then kDone when its copy has landed, or kSet + the bytes that are still to come.
constexpr uint64_t kSet = uint64_t(1) << 62, kDone = uint64_t(1) << 63;

void check_set(const uint64_t* barrier, const char* what) {
  if ((*barrier & (kSet | kDone)) == 0 || (*barrier & (kSet | kDone)) == (kSet | kDone)) {
    fail("the barrier of %s was not initialised", what);
  }
}

// Lets the others run: what is waited for may come from them, or never.
void give_way(int& turns) {
  if (++turns > 10000) fail("thread %u of block %u waits for what nobody sends", current->thread_idx.x, current->block_idx.x);
  running->waits_for = nullptr;
  to_scheduler(false);
}

}  // namespace

void copy_barrier_init(uint64_t* barrier) { *barrier = kSet; }

void copy_known(void* destination, const void* source, size_t bytes, const void* begin, const void* end) {
  const char *first = static_cast<const char*>(source), *last = first + bytes;
  const char* from = std::max(first, static_cast<const char*>(begin));
  const char* to = std::min(last, static_cast<const char*>(end));
  if (from < to) std::memcpy(static_cast<char*>(destination) + (from - first), from, to - from);
}

void copy_bulk(void* destination, const void* source, uint32_t bytes, uint64_t* barrier, const void* begin, const void* end) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source) | bytes;
  if (bits % 16 != 0 || bytes == 0) fail("a bulk copy of %u bytes is not aligned to 16 bytes", bytes);
  check_set(barrier, "a bulk copy");
  current->block->copies.push_back({destination, source, bytes, barrier, begin, end});
}

void copy_wait(uint64_t* barrier) {
  auto& copies = current->block->copies;
  for (int turns = 0;;) {
    for (size_t i = 0; i < copies.size(); ++i) {
      if (copies[i].barrier != barrier) continue;
      copy_known(copies[i].destination, copies[i].source, copies[i].bytes, copies[i].begin, copies[i].end);
      copies.erase(copies.begin() + i);
      *barrier = kDone;
    }
    if (*barrier == kDone) return;
    check_set(barrier, "a wait");
    give_way(turns);
  }
}

void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  check_set(barrier, "an exchange");
  *barrier += bytes;
}

void send_remote(void* p, int rank, const void* data, uint32_t bytes, uint64_t* barrier) {
  const auto& blocks = current->block->cluster->blocks;
  if (rank < 0 || rank >= int(blocks.size())) fail("block %d is not in the cluster", rank);
  const auto there = [&](void* here) { return blocks[rank]->shared + (static_cast<char*>(here) - current->block->shared); };
  std::memcpy(there(p), data, bytes);
  auto* remote = reinterpret_cast<uint64_t*>(there(barrier));
  check_set(remote, "an exchange");
  if (*remote < kSet + bytes) fail("block %d is sent more than it expects", rank);
  *remote -= bytes;
}

void wait_for_bytes(uint64_t* barrier) {
  check_set(barrier, "an exchange");
  for (int turns = 0; *barrier != kSet;) give_way(turns);
}

void cluster_arrive() {
  if (current->cluster_arrival >= 0) fail("thread %u arrives twice at a cluster barrier", current->thread_idx.x);
  Meeting& barrier = current->block->cluster->barrier;
  current->cluster_arrival = barrier.phase;
  arrive(barrier);
}

void cluster_wait() {
  if (current->cluster_arrival < 0) fail("thread %u waits at a cluster barrier without arriving", current->thread_idx.x);
  const int phase = current->cluster_arrival;
  wait_until_over(current->block->cluster->barrier, phase);
  current->cluster_arrival = -1;
}

}  // namespace erc_host

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? erc_host::message.c_str() : error == cudaSuccess ? "no error" : "invalid value";
}

extern "C" void erc_cuda_host_configure(int has_clusters, int compiled_for, int multiprocessors, unsigned order, int poison,
                                        int l2_bytes) {
  erc_host::machine.has_clusters = has_clusters != 0;
  erc_host::machine.compiled_for = compiled_for;
  erc_host::machine.multiprocessors = multiprocessors;
  erc_host::machine.order = order;
  erc_host::machine.poison = static_cast<unsigned char>(poison);
  erc_host::machine.l2_bytes = l2_bytes;
  erc_host::launches.clear();
}

extern "C" void erc_cuda_host_execute_with(erc_host::Executor executor) { erc_host::executor = executor; }

extern "C" void erc_cuda_host_complain(const char* text) { erc_host::message = text; }

// Copies the first launches to `out` and returns how many there were.
extern "C" int erc_cuda_host_launches(int64_t (*out)[4], int capacity) {
  const auto& all = erc_host::launches;
  for (int i = 0; i < capacity && i < int(all.size()); ++i) {
    const erc_host::Launch& one = all[i];
    const int64_t shape[4] = {one.grid, one.block, one.cluster, one.shared_bytes};
    std::copy(shape, shape + 4, out[i]);
  }
  return int(all.size());
}
