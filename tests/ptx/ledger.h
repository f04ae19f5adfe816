// The ledger: who touched which bytes of memory, and whether anything orders two accesses.
//
// Every granule of memory remembers its last writer and its readers since, each with a stamp: how often the thread had
// synchronised until then. An access is ordered after an earlier one if
//   the same thread made both;
//   threads of one block made them, and the block passed a barrier in between;
//   threads of one warp made them, and the warp passed bar.warp.sync in between;
//   blocks of one cluster made them, the earlier thread's block released it by arriving at the cluster barrier, and the later
//   thread has waited for that arrival;
//   blocks of one grid made them, and an atomic operation of the earlier block, after a barrier, precedes one of the later block.
// Bytes under way (bulk copies, asynchronous stores) belong to a phase of an mbarrier: a thread may touch them when it, or a
// thread of its block before a barrier, has seen the phase complete with the scope that the copy needs.

#pragma once

#include <stdint.h>

typedef struct {
  int32_t thread;  // 0: nobody; else the thread's number + 1
  int32_t block, warp, cluster;
} Stamp;

enum Readers { NOBODY, ONE_THREAD, ONE_WARP, ONE_BLOCK, SEVERAL_BLOCKS };

typedef struct {
  Stamp write, read;
  int32_t readers, atomic;  // atomic: the last write was
  int32_t copy;  // 0: none; else the number of the operation that wrote or reads it asynchronously + 1
} Cell;

// What synchronises. Threads are numbered over the grid; those that run now start at `first`.
typedef struct {
  int64_t threads, cluster, phases, barriers, first;  // threads a block, blocks a cluster, columns of `released` and `seen`
  const int32_t* block;  // [blocks that run] block barriers passed
  const int32_t* warp;  // [warps that run] warp barriers passed
  const int32_t* arrived;  // [threads that run] arrivals at the cluster barrier
  const int32_t* waited;  // [threads that run] waits completed
  const int32_t* released;  // [blocks that run, phases] the last releasing arrival up to a phase
  const int32_t* seen;  // [threads that run, barriers, 2] phases of an mbarrier seen complete, at block and cluster scope
  const int32_t* copies;  // [copies, 4] mbarrier, phase, scope that a reader needs, whether the memory is the source
  const int32_t* published;  // [blocks of the grid, 3] block barriers before the last atomic, when it was, which thread + 1
  const int32_t* informed;  // [blocks of the grid] when the block's last atomic was
} Clocks;

static int64_t warps_of(const Clocks* c) { return (c->threads + 31) / 32; }
static int64_t block_of(const Clocks* c, int64_t thread) { return thread / c->threads; }
static int64_t warp_of(const Clocks* c, int64_t thread) { return block_of(c, thread) * warps_of(c) + thread % c->threads / 32; }

static int published(const Clocks* c, int64_t thread, int32_t block_clock, int64_t now) {
  const int64_t b = block_of(c, thread), to = block_of(c, now);
  const int32_t* p = c->published + 3 * b;
  return p[1] != 0 && p[1] <= c->informed[to] && (block_clock < p[0] || p[2] == thread + 1);
}

// `level`: how many threads the stamp stands for.
static int ordered(const Clocks* c, const Stamp* s, int level, int64_t now) {
  const int64_t thread = s->thread - 1, block = block_of(c, thread), here = block_of(c, now), first = block_of(c, c->first);
  if (level <= ONE_THREAD && thread == now) return 1;
  if (level <= ONE_BLOCK && block == here) {
    if (s->block < c->block[here - first]) return 1;
    const int64_t warp = warp_of(c, now);
    if (level <= ONE_WARP && warp_of(c, thread) == warp && s->warp < c->warp[warp - first * warps_of(c)]) return 1;
  }
  if (block / c->cluster != here / c->cluster) return published(c, thread, s->block, now);
  const int64_t waited = c->waited[now - c->first], start = here / c->cluster * c->cluster - first;
  if (level <= ONE_BLOCK) return c->released[(block - first) * c->phases + waited] > s->cluster;
  for (int64_t b = start; b < start + c->cluster; ++b) {
    if (c->released[b * c->phases + waited] <= s->cluster) return 0;
  }
  return 1;
}

static Stamp stamp_of(const Clocks* c, int64_t now) {
  const int64_t first = block_of(c, c->first);
  return (Stamp){(int32_t)now + 1, c->block[block_of(c, now) - first], c->warp[warp_of(c, now) - first * warps_of(c)],
                 c->arrived[now - c->first]};
}

static int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

static void add_reader(const Clocks* c, Cell* cell, const Stamp* stamp, int64_t now) {
  if (cell->readers == NOBODY || ordered(c, &cell->read, cell->readers, now)) {
    cell->readers = ONE_THREAD;
    cell->read = *stamp;
    return;
  }
  const int64_t other = cell->read.thread - 1;
  const int level = other == now                             ? ONE_THREAD
                    : warp_of(c, other) == warp_of(c, now)   ? ONE_WARP
                    : block_of(c, other) == block_of(c, now) ? ONE_BLOCK
                                                             : SEVERAL_BLOCKS;
  cell->readers = larger(cell->readers, level);
  cell->read.block = larger(cell->read.block, stamp->block);
  cell->read.warp = larger(cell->read.warp, stamp->warp);
  cell->read.cluster = larger(cell->read.cluster, stamp->cluster);
}

// Whether a thread knows that an asynchronous operation is over.
static int has_seen(const Clocks* c, int32_t number, int64_t now) {
  const int32_t* copy = c->copies + 4 * (number - 1);
  return c->seen[((now - c->first) * c->barriers + copy[0]) * 2 + copy[2]] > copy[1];
}

enum Access { READ, WRITE, ATOMIC };
enum Verdict { FINE, UNWRITTEN, READ_AFTER_WRITE, WRITE_AFTER_WRITE, WRITE_AFTER_READ, UNDER_WAY, SOURCE_UNDER_WAY };

static enum Verdict touch(const Clocks* c, Cell* cell, const Stamp* stamp, int64_t now, int access, int must_be_written) {
  if (cell->copy != 0) {
    const int is_source = c->copies[4 * (cell->copy - 1) + 3];
    const int landed = has_seen(c, cell->copy, now);
    if (!landed && !is_source) return UNDER_WAY;
    if (!landed && access != READ) return SOURCE_UNDER_WAY;
  } else if (cell->write.thread == 0) {
    if (must_be_written && access != WRITE) return UNWRITTEN;
  } else if (!(access == ATOMIC && cell->atomic) && !ordered(c, &cell->write, ONE_THREAD, now)) {
    return access == READ ? READ_AFTER_WRITE : WRITE_AFTER_WRITE;
  }
  if (access == READ) {
    add_reader(c, cell, stamp, now);
    return FINE;
  }
  if (cell->readers != NOBODY && !ordered(c, &cell->read, cell->readers, now)) return WRITE_AFTER_READ;
  cell->write = *stamp;
  cell->readers = NOBODY;
  cell->atomic = access == ATOMIC;
  cell->copy = 0;
  return FINE;
}

// Whether another block, or an asynchronous operation, may still touch a granule when `thread` leaves, the last of its block.
static int is_shared_with_others(const Clocks* c, const Cell* cell, int64_t thread) {
  const int64_t here = block_of(c, thread);
  if (cell->copy != 0 && !has_seen(c, cell->copy, thread)) return 1;
  if (cell->copy == 0 && cell->write.thread != 0 && block_of(c, cell->write.thread - 1) != here &&
      !ordered(c, &cell->write, ONE_THREAD, thread)) {
    return 1;
  }
  const int foreign =
      cell->readers == SEVERAL_BLOCKS || (cell->readers != NOBODY && block_of(c, cell->read.thread - 1) != here);
  return foreign && !ordered(c, &cell->read, cell->readers, thread);
}
