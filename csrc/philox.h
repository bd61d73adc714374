// Addressed random numbers, as kernels/speed_kernels/philox.py defines them: Philox4x32-10 words, normals by
// Box-Muller, and the integer draw of a row. Bits are equal to the reference, normals within a few units in the last
// place: the logarithm, sine and cosine are short polynomials over the ranges that occur, so that every loop is
// straight-line code that the compiler turns into vectors of any width.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace speed {

enum Stream : uint32_t { kStreamT = 0, kStreamEps = 1, kStreamDropout = 9 };

struct Key {
  uint32_t k0, k1;
  explicit Key(int64_t seed)
      : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}
};

// Elements are handled in tiles that stay in the first-level cache. A tile is a whole number of blocks of four.
constexpr int64_t kTile = 512;
constexpr int64_t kTileBlocks = kTile / 4;

// A unit of work: elements of one sample that one thread handles in a row.
constexpr int64_t kChunk = 16 * kTile;

// Chunks that cover the elements of every sample; a sample without elements is one chunk.
struct Chunks {
  int64_t per_sample;
  int64_t grain;  // below which a second thread costs more than it helps

  explicit Chunks(int64_t num_elements)
      : per_sample(std::max<int64_t>(1, (num_elements + kChunk - 1) / kChunk)),
        grain(std::max<int64_t>(1, 2 * kChunk / std::max<int64_t>(1, std::min(num_elements, kChunk)))) {}
};

// Words are read through this type where they were written as pairs.
typedef uint32_t __attribute__((may_alias)) word_t;

// As many 64-bit integers as one vector register of the target holds, and their 32 x 32 -> 64 bit product. The
// compiler does not find this instruction by itself: it would multiply all 64 bits.
#if defined(__AVX512F__)
typedef uint64_t lanes_t __attribute__((vector_size(64)));
inline lanes_t multiply(lanes_t a, lanes_t b) {
  return reinterpret_cast<lanes_t>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
#elif defined(__AVX2__)
typedef uint64_t lanes_t __attribute__((vector_size(32)));
inline lanes_t multiply(lanes_t a, lanes_t b) {
  return reinterpret_cast<lanes_t>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
#else
typedef uint64_t lanes_t __attribute__((vector_size(16)));
#if defined(__SSE2__)
inline lanes_t multiply(lanes_t a, lanes_t b) {
  return reinterpret_cast<lanes_t>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
}
#else
inline lanes_t multiply(lanes_t a, lanes_t b) { return (a & 0xffffffffu) * b; }
#endif
#endif
inline uint64_t multiply(uint64_t a, uint64_t b) { return (a & 0xffffffffu) * b; }
constexpr int64_t kLanes = sizeof(lanes_t) / sizeof(uint64_t);

// Philox4x32-10 of one block (Word = uint64_t) or of one block a lane (Word = lanes_t). Words live in the low halves
// of 64-bit integers: the multiplier reads only those, so the high halves may hold anything and nothing is shuffled.
template <class Word>
inline void philox(Word& c0, Word& c1, Word& c2, Word& c3, Key key) {
  uint32_t k0 = key.k0, k1 = key.k1;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Word p0 = multiply(c0, Word{} + uint64_t{0xD2511F53u});
    const Word p1 = multiply(c2, Word{} + uint64_t{0xCD9E8D57u});
    c0 = (p1 >> 32) ^ c1 ^ uint64_t{k0};
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ uint64_t{k1};
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// ln(1 + z) for 1 + z in [sqrt(1/2), sqrt(2)], relative error 2^-24.
inline float log1p_short(float z) {
  float p = 0.08700359612703323f;
  p = p * z - 0.1426747590303421f;
  p = p * z + 0.1491478681564331f;
  p = p * z - 0.165775865316391f;
  p = p * z + 0.19963061809539795f;
  p = p * z - 0.2500133812427521f;
  p = p * z + 0.3333390951156616f;
  return z + (z * z) * (z * p - 0.5f);
}

// A positive float is 2^exponent m with m in [sqrt(1/2), sqrt(2)).
struct Split {
  int32_t exponent;
  float m;
  explicit Split(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x) + (0x3f800000u - 0x3f3504f3u);
    exponent = static_cast<int32_t>(bits >> 23) - 127;
    m = std::bit_cast<float>((bits & 0x007fffffu) + 0x3f3504f3u);
  }
};

// -ln((word + 1/2) 2^-32). A word near 2^32 is taken by its exact distance to it, so that nothing cancels where the
// uniform number is close to 1.
inline float minus_log_uniform(uint32_t word) {
  const float below = static_cast<float>(~word) + 0.5f;
  const Split above(static_cast<float>(word) + 0.5f);
  const float z = above.exponent == 32 ? -0x1p-32f * below : above.m - 1.0f;
  return static_cast<float>(32 - above.exponent) * 0.6931471805599453f - log1p_short(z);
}

// The two normals of a pair of words.
inline void box_muller(uint32_t radius_word, uint32_t angle_word, float& even, float& odd) {
  const float radius = std::sqrt(2.0f * minus_log_uniform(radius_word));
  // f = (2 l - 2^30 + 1) 2^-31 for the thirty low bits l
  const int32_t l = (static_cast<int32_t>((angle_word << 2) ^ 0x80000000u) >> 1) | 1;
  const float f = static_cast<float>(l) * 0x1p-31f;
  const float g = f * f;
  float s = -0.004601657390594482f;
  s = s * g + 0.07968003302812576f;
  s = s * g - 0.6459634900093079f;
  s = s * g + 1.5707963705062866f;
  s *= f;
  float c = 0.0009037664858624339f;
  c = c * g - 0.02086016535758972f;
  c = c * g + 0.25366923213005066f;
  c = c * g - 1.2337005138397217f;
  c = c * g + 1.0f;
  const bool swap = (angle_word & 0x40000000u) != 0;  // odd quadrant
  const uint32_t even_sign = (angle_word + 0x40000000u) & 0x80000000u;
  const uint32_t odd_sign = angle_word & 0x80000000u;
  const float x = radius * (swap ? s : c);
  const float y = radius * (swap ? c : s);
  even = std::bit_cast<float>(std::bit_cast<uint32_t>(x) ^ even_sign);
  odd = std::bit_cast<float>(std::bit_cast<uint32_t>(y) ^ odd_sign);
}

// Random words of a tile, two of a block in every 64-bit integer of the two results.
struct Pairs {
  alignas(64) lanes_t first[kTileBlocks / kLanes];
  alignas(64) lanes_t second[kTileBlocks / kLanes];
};

// Which words of a block are kept beside each other: neighbours (0 1, 2 3), or every other (0 2, 1 3).
enum Order { kNeighbours, kAlternate };

// The words of `num_vectors` vectors of blocks; from one to the next each lane's block and slot grow by these steps.
template <Order order>
inline void words_of_lanes(Key key, lanes_t block, uint64_t block_step, lanes_t slot, uint64_t slot_step, uint32_t step,
                           uint32_t stream, int64_t num_vectors, Pairs& out) {
  for (int64_t i = 0; i < num_vectors; ++i) {
    lanes_t c0 = block;
    lanes_t c1 = slot;
    lanes_t c2 = lanes_t{} + uint64_t{step};
    lanes_t c3 = lanes_t{} + uint64_t{stream};
    philox(c0, c1, c2, c3, key);
    if constexpr (order == kAlternate) std::swap(c1, c2);
    out.first[i] = (c0 & 0xffffffffu) | (c1 << 32);
    out.second[i] = (c2 & 0xffffffffu) | (c3 << 32);
    block += block_step;
    slot += slot_step;
  }
  static_assert(std::endian::native == std::endian::little);
}

// The words of `num_blocks` blocks from `first_block` on, rounded up to whole vectors; returns that number of blocks.
template <Order order>
inline int64_t words_of_blocks(Key key, uint32_t first_block, uint32_t slot, uint32_t step, uint32_t stream,
                               int64_t num_blocks, Pairs& out) {
  lanes_t block = lanes_t{} + uint64_t{first_block};
  for (int64_t lane = 0; lane < kLanes; ++lane) block[lane] += static_cast<uint64_t>(lane);
  const int64_t num_vectors = (num_blocks + kLanes - 1) / kLanes;
  words_of_lanes<order>(key, block, kLanes, lanes_t{} + uint64_t{slot}, 0, step, stream, num_vectors, out);
  return num_vectors * kLanes;
}

// The words of a whole tile.
template <Order order>
inline void words_tile(Key key, uint32_t first_block, uint32_t slot, uint32_t step, uint32_t stream, Pairs& out) {
  words_of_blocks<order>(key, first_block, slot, step, stream, kTileBlocks, out);
}

// The normals of `num_blocks` blocks of words in alternate order.
inline void normals_of_words(const Pairs& pairs, int64_t num_blocks, float* __restrict__ out) {
  const word_t* radius = reinterpret_cast<const word_t*>(pairs.first);
  const word_t* angle = reinterpret_cast<const word_t*>(pairs.second);
  for (int64_t i = 0; i < 2 * num_blocks; ++i) {
    box_muller(radius[i], angle[i], out[2 * i], out[2 * i + 1]);
  }
}

// The normals of the same blocks as `words_of_blocks`.
inline void normals_of_blocks(Key key, uint32_t first_block, uint32_t slot, uint32_t step, uint32_t stream,
                              int64_t num_blocks, float* __restrict__ out) {
  Pairs pairs;
  const int64_t made = words_of_blocks<kAlternate>(key, first_block, slot, step, stream, num_blocks, pairs);
  normals_of_words(pairs, made, out);
}

// The first `n` normals of a tile (of kTile) from `first_block` on. The whole tile, by far the most frequent case, is
// compiled by itself, with all its lengths known.
inline void normals_tile(Key key, uint32_t first_block, uint32_t slot, uint32_t step, uint32_t stream, int64_t n,
                         float* __restrict__ out) {
  if (n == kTile) {
    normals_of_blocks(key, first_block, slot, step, stream, kTileBlocks, out);
  } else {
    normals_of_blocks(key, first_block, slot, step, stream, (n + 3) / 4, out);
  }
}

// The noise of samples that one thread handles in a row, a tile at a time. Samples that fill less than half a vector with
// blocks share vectors, and a tile: each alone would leave most lanes idle. The numbers are the same.
class Noise {
 public:
  // first_slot: of sample 0. end: the thread's last sample + 1.
  Noise(Key key, uint32_t step, int64_t first_slot, int64_t num_elements, int64_t end)
      : key_(key), step_(step), first_slot_(first_slot), end_(end) {
    const int64_t blocks = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>((num_elements + 3) / 4)));
    if (num_elements > 0 && 2 * blocks <= kLanes) blocks_ = blocks;
  }

  // The normals of elements first .. first + n - 1 of a sample; what is written over them is the caller's.
  float* operator()(int64_t sample, int64_t first, int64_t n) {
    if (blocks_ == 0) {
      normals_tile(key_, static_cast<uint32_t>(first / 4), slot(sample), step_, kStreamEps, n, tile_);
      return tile_;
    }
    if (sample >= made_) {
      from_ = sample;
      made_ = std::min(sample + kTileBlocks / blocks_, end_);
      lanes_t block{}, slots = lanes_t{} + uint64_t{slot(sample)};
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        block[lane] = static_cast<uint64_t>(lane % blocks_);
        slots[lane] += static_cast<uint64_t>(lane / blocks_);
      }
      const int64_t num_vectors = ((made_ - from_) * blocks_ + kLanes - 1) / kLanes;
      Pairs pairs;
      words_of_lanes<kAlternate>(key_, block, 0, slots, static_cast<uint64_t>(kLanes / blocks_), step_, kStreamEps,
                                 num_vectors, pairs);
      normals_of_words(pairs, num_vectors * kLanes, tile_);
    }
    return tile_ + (sample - from_) * blocks_ * 4;
  }

 private:
  uint32_t slot(int64_t sample) const { return static_cast<uint32_t>(first_slot_ + sample); }

  alignas(64) float tile_[kTile];
  Key key_;
  uint32_t step_;
  int64_t first_slot_, end_;
  int64_t blocks_ = 0;          // of a sample that shares, a power of two; 0: none does
  int64_t from_ = 0, made_ = 0;  // samples whose noise the tile holds
};

// The row that a sample trains on.
struct RowDraw {
  Key key;
  uint32_t step;
  const int64_t* cdf;
  int64_t num_rows;
  int64_t num_slots;
  int64_t stride;  // 0: independent draws; else the stride between strata
  int64_t shift = 0;

  RowDraw(Key key_, uint32_t step_, const int64_t* cdf_, int64_t num_rows_, int64_t num_slots_, int64_t stride_)
      : key(key_), step(step_), cdf(cdf_), num_rows(num_rows_), num_slots(num_slots_), stride(stride_) {
    uint64_t c0 = 1, c1 = 0, c2 = step, c3 = kStreamT;
    philox(c0, c1, c2, c3, key);
    shift = static_cast<int64_t>(c1 & 0xffffffffu) % num_slots;
  }

  int64_t operator()(int64_t slot) const {
    uint64_t c0 = 0, c1 = static_cast<uint32_t>(slot), c2 = step, c3 = kStreamT;
    philox(c0, c1, c2, c3, key);
    int64_t u = static_cast<int64_t>(c0 & 0xffffffffu);
    if (stride != 0) u = ((((slot * stride + shift) % num_slots) << 32) + u) / num_slots;
    return std::min<int64_t>(std::upper_bound(cdf, cdf + num_rows, u) - cdf, num_rows - 1);
  }
};

}  // namespace speed
