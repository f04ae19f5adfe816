// Runs a kernel's threads on the CPU: every thread is a fiber, the blocks of a cluster run together, clusters one after another.
// A fiber runs until it waits for others; what a GPU would leave undefined ends the launch with a message:
// threads of a block at different barriers, a shuffle that some lanes of the warp do not reach, a wait that nobody ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace erc_host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Block;

// A thread of the kernel.
struct Thread {
  Index thread_idx, block_idx, block_dim, grid_dim;
  Block* block;
  int cluster_arrival = -1;  // the phase of a cluster barrier that it has arrived at and not yet waited for
};
extern Thread* current;

// What a test chooses; erc_cuda_host_configure of fibers.cpp sets it.
struct Machine {
  bool has_clusters = true;
  int compiled_for = 90;  // the architecture of the code, which a later GPU runs too
  int multiprocessors = 1;
  int l2_bytes = 1 << 20;
  int shared_bytes_per_block = 227 * 1024;
  unsigned order = 0;  // of fibers and of clusters: 0 as numbered, 1 reversed, else the seed of a shuffle
  unsigned char poison = 0xff;  // fills shared memory before a block starts
};
extern Machine machine;

// The shapes of the launches since the machine was configured: grid, block, cluster, bytes of shared memory.
struct Launch {
  int64_t grid, block, cluster, shared_bytes;
};
extern std::vector<Launch> launches;

// Returns false, and keeps a message, if the kernel did something undefined.
bool run(int64_t grid, int block, int cluster, int shared_bytes, const std::function<void()>& kernel);

// Runs a kernel by other means than fibers: the symbol of its function, its launch, and its parameters as a GPU gets them.
// Returns whether it went well; what went wrong it tells by erc_cuda_host_complain.
using Executor = int (*)(const char* kernel, int64_t grid, int block, int cluster, int shared_bytes, int count,
                         const void* const* parameters, const int64_t* sizes);
extern Executor executor;  // null: fibers
bool execute(const void* kernel, int64_t grid, int block, int cluster, int shared_bytes, int count,
             const void* const* parameters, const int64_t* sizes);

// Ends the launch with a message; does not return.
[[noreturn]] void fail(const char* format, ...);

char* shared_memory();
void sync_threads(const char* file, int line);
// Gives the warp `value`, waits for all its lanes, returns what lane `from` gave.
uint64_t exchange(uint64_t value, int from, unsigned mask, const char* file, int line);
// The warp's votes, lane i in bit i.
unsigned ballot(bool vote, unsigned mask, const char* file, int line);
void copy_barrier_init(uint64_t* barrier);
// Copies only what of the source lies in [begin, end): the rest may be anything.
void copy_known(void* destination, const void* source, size_t bytes, const void* begin, const void* end);
void copy_bulk(void* destination, const void* source, uint32_t bytes, uint64_t* barrier, const void* begin, const void* end);
void copy_wait(uint64_t* barrier);
void cluster_arrive();
void cluster_wait();
// Blocks of a cluster that send each other data: a barrier expects bytes, and a wait for it ends when all are there.
void expect_bytes(uint64_t* barrier, uint32_t bytes);
void send_remote(void* p, int rank, const void* data, uint32_t bytes, uint64_t* barrier);
void wait_for_bytes(uint64_t* barrier);

}  // namespace erc_host
