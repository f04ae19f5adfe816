// A block of the weight stays in its own layout, where its last stride is 1: 32 of its rows by 32 of the hidden states give a
// 32 x 32 block of the transposed result, which is transposed in registers when it is stored in rows. Only the hidden states,
// the small operand, are rearranged. Instructions and operand order follow Intel's "Architecture Instruction Set Extensions", TDPBF16PS and VDPBF16PS.
// Both take subnormal numbers for 0, which moves no logit by more than 1e-36.
#include "cpu/wide_product.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// GCC 12's AVX-512 headers trip its own warning when their intrinsics are inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace erc {
namespace {

#define ERC_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define ERC_AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))

constexpr int kBlock = kProductBlock;
constexpr int kStep = 32;  // elements of a tile's row
// Steps whose terms are added one after the other. The sums of such pieces are added then: the error is that of a blocked sum.
// A tile has two sums for each result, a vector one, so its pieces are shorter.
constexpr int64_t kTilePiece = 512 / kStep, kVectorPiece = 128 / kStep;

using Sums = float[kBlock][kBlock];  // of a block, [column of the result][row]

enum class Isa { kNone, kAvx512, kAmx };

Isa find_isa() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!has_avx512 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return Isa::kNone;
  const char* wanted = std::getenv("ERC_CPU_ISA");  // "avx512": vectors of it, no tiles
  if (wanted != nullptr) return std::strcmp(wanted, "avx512") == 0 ? Isa::kAvx512 : Isa::kNone;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  const bool has_amx = (d & (1u << 22)) && (d & (1u << 24));
  return has_amx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? Isa::kAmx : Isa::kAvx512;
}

Isa isa() {
  static const Isa found = find_isa();
  return found;
}

int64_t steps(const WideProduct& call) { return (call.width + kStep - 1) / kStep; }

// The hidden states of a block: for each pair of neighbours in the width, those of 32 rows, in two tiles of 16.
const uint16_t* packed_tile(const uint16_t* packed, int64_t num_steps, int64_t block, int64_t half, int64_t step) {
  return packed + ((block * 2 + half) * num_steps + step) * 16 * kStep;
}

ERC_AVX512 void sum_by_vectors(const uint16_t* weight, int64_t stride, const uint16_t* packed, int64_t num_steps, int64_t block,
                               int64_t begin, int64_t end, Sums& sums) {
  constexpr int kRows = 8;  // with two vectors each: the registers that hold sums
  for (int first = 0; first < kBlock; first += kRows) {
    __m512 sum[kRows][2] = {};
    for (int64_t step = begin; step < end; ++step) {
      const uint16_t* low = packed_tile(packed, num_steps, block, 0, step);
      const uint16_t* high = packed_tile(packed, num_steps, block, 1, step);
      for (int64_t pair = 0; pair < kStep / 2; ++pair) {
        const __m512bh x0 = (__m512bh)_mm512_loadu_si512(low + 32 * pair), x1 = (__m512bh)_mm512_loadu_si512(high + 32 * pair);
        for (int r = 0; r < kRows; ++r) {
          int both;
          std::memcpy(&both, weight + (first + r) * stride + step * kStep + 2 * pair, 4);
          const __m512bh w = (__m512bh)_mm512_set1_epi32(both);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x0, w);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x1, w);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int64_t half = 0; half < 2; ++half) {
        float* to = sums[first + r] + 16 * half;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][half]));
      }
    }
  }
}

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Tiles 0 to 3 hold the sums, 4 and 5 the weight, 6 and 7 the hidden states.
ERC_AMX void sum_by_tiles(const uint16_t* weight, int64_t stride, const uint16_t* packed, int64_t num_steps, int64_t block,
                          int64_t begin, int64_t end, Sums& sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = begin; step < end; ++step) {
    _tile_loadd(4, weight + step * kStep, 2 * stride);
    _tile_loadd(6, packed_tile(packed, num_steps, block, 0, step), 2 * kStep);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, packed_tile(packed, num_steps, block, 1, step), 2 * kStep);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, weight + 16 * stride + step * kStep, 2 * stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) Sums piece;
  _tile_stored(0, &piece[0][0], sizeof(piece[0]));
  _tile_stored(1, &piece[0][16], sizeof(piece[0]));
  _tile_stored(2, &piece[16][0], sizeof(piece[0]));
  _tile_stored(3, &piece[16][16], sizeof(piece[0]));
  for (int j = 0; j < kBlock; ++j) {
    for (int i = 0; i < kBlock; ++i) sums[j][i] += piece[j][i];
  }
}

// 16 x 16, in four rounds that each exchange the lanes of pairs of vectors.
ERC_AVX512 inline void transpose(__m512 (&v)[16]) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int s = 1; s < 16; s *= 2) {
    const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(s));
    const __m512i first = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(16 - s));
    const __m512i second =
        _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(s)), odd, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & s) continue;
      const __m512 a = v[i], b = v[i + s];
      v[i] = _mm512_permutex2var_ps(a, first, b);
      v[i + s] = _mm512_permutex2var_ps(a, second, b);
    }
  }
}

ERC_AVX512 void store_columns(const WideProduct& call, int64_t column, int64_t row, const Sums& sums) {
  const int64_t columns = std::min<int64_t>(kBlock, call.num_columns - column);
  for (int64_t i = 0; i < std::min<int64_t>(kBlock, call.num_rows - row); i += 16) {
    const __mmask16 there = __mmask16((1u << std::min<int64_t>(16, call.num_rows - row - i)) - 1);
    for (int64_t j = 0; j < columns; ++j) {
      float* to = call.out + (column + j) * call.out_strides.inner + row + i;
      const __m512 before = call.accumulate ? _mm512_maskz_loadu_ps(there, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, there, _mm512_add_ps(before, _mm512_loadu_ps(&sums[j][i])));
    }
  }
}

ERC_AVX512 void store_rows(const WideProduct& call, int64_t column, int64_t row, const Sums& sums) {
  for (int j = 0; j < kBlock; j += 16) {
    const int64_t columns = std::min<int64_t>(16, call.num_columns - column - j);
    if (columns <= 0) return;
    const __mmask16 there = __mmask16((1u << columns) - 1);
    const __m512 bias = call.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, call.bias + column + j);
    for (int i = 0; i < kBlock; i += 16) {
      __m512 v[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) v[r] = _mm512_loadu_ps(&sums[j + r][i]);
      transpose(v);
      const int64_t rows = std::min<int64_t>(16, call.num_rows - row - i);
      for (int r = 0; r < rows; ++r) {
        float* to = call.out + (row + i + r) * call.out_strides.outer + column + j;
        __m512 value = _mm512_add_ps(v[r], bias);
        if (call.accumulate) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(there, to));
        if (columns == 16 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
          _mm512_stream_ps(to, value);  // a whole line: memory need not be read first
        } else {
          _mm512_mask_storeu_ps(to, there, value);
        }
      }
    }
  }
}

ERC_AMX void save_tiles(TileConfig& config) { _tile_storeconfig(&config); }
ERC_AMX void load_tiles(const TileConfig& config) { _tile_loadconfig(&config); }

}  // namespace

const char* wide_product_isa() {
  switch (isa()) {
    case Isa::kAmx: return "amx";
    case Isa::kAvx512: return "avx512_bf16";
    default: return "";
  }
}

int64_t wide_product_packed(const WideProduct& call) {
  return (call.num_rows + kBlock - 1) / kBlock * kBlock * steps(call) * kStep;
}

void pack_wide_product(const WideProduct& call, uint16_t* packed) {
  std::memset(packed, 0, 2 * wide_product_packed(call));
  for (int64_t i = 0; i < call.num_rows; ++i) {
    const uint16_t* row = call.rows + i * call.row_strides.outer;
    uint16_t* to = const_cast<uint16_t*>(packed_tile(packed, steps(call), i / kBlock, i % kBlock / 16, 0)) + i % 16 * 2;
    for (int64_t k = 0; k < call.width; ++k) to[k / 2 * 32 + k % 2] = row[k * call.row_strides.inner];
  }
}

void run_wide_product(const WideProduct& call, const uint16_t* packed, int64_t begin, int64_t end) {
  const int64_t num_steps = steps(call), padded = num_steps * kStep;
  const bool amx = isa() == Isa::kAmx;
  const int64_t steps_of_piece = amx ? kTilePiece : kVectorPiece;
  TileConfig before{}, ours{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  if (amx) {
    save_tiles(before);
    load_tiles(ours);
  }
  const bool in_rows = call.out_strides.inner == 1;
  std::vector<uint16_t> copy;  // of a block that is not whole, with zeros, or not in rows
  for (int64_t at = begin; at < end; ++at) {
    const int64_t column = at * kBlock, columns = std::min<int64_t>(kBlock, call.num_columns - column);
    const uint16_t* weight = call.weight + column * call.weight_strides.outer;
    const int64_t inner = call.weight_strides.inner;
    int64_t stride = call.weight_strides.outer;
    if (columns < kBlock || call.width < padded || inner != 1) {
      copy.assign(kBlock * padded, 0);
      for (int64_t k = 0; k < call.width; ++k) {
        for (int64_t j = 0; j < columns; ++j) copy[j * padded + k] = weight[j * stride + k * inner];
      }
      weight = copy.data(), stride = padded;
    }
    for (int64_t row = 0; row < call.num_rows; row += kBlock) {
      alignas(64) Sums sums = {};
      for (int64_t piece = 0; piece < num_steps; piece += steps_of_piece) {
        const int64_t stop = std::min(piece + steps_of_piece, num_steps);
        (amx ? sum_by_tiles : sum_by_vectors)(weight, stride, packed, num_steps, row / kBlock, piece, stop, sums);
      }
      (in_rows ? store_rows : store_columns)(call, column, row, sums);
    }
  }
  _mm_sfence();
  if (amx) load_tiles(before);
}

}  // namespace erc

#else

namespace erc {

const char* wide_product_isa() { return ""; }
int64_t wide_product_packed(const WideProduct&) { return 0; }
void pack_wide_product(const WideProduct&, uint16_t*) {}
void run_wide_product(const WideProduct&, const uint16_t*, int64_t, int64_t) {}

}  // namespace erc

#endif
