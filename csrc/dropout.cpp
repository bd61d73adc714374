// Addressed dropout on the CPU: every element's random word is made from its address, nothing is stored.
// See kernels/speed_kernels/dropout/op.py.

#include <ATen/Parallel.h>

#include "elements.h"
#include "philox.h"

using namespace speed;

// x and y: [num_samples, num_elements]. address: (seed, step, global slot of the first sample). Elements whose word is
// below `threshold` become zero, the others are multiplied by `scale`.
extern "C" void speed_dropout(const void* x, void* y, int32_t dtype, const int64_t* address, int64_t num_samples,
                              int64_t num_elements, int64_t layer, uint32_t threshold, float scale) {
  const Key key(address[0]);
  const uint32_t step = static_cast<uint32_t>(address[1]);
  const uint32_t stream = kStreamDropout + 256 * static_cast<uint32_t>(layer);
  const Chunks chunks(num_elements);
  at::parallel_for(0, num_samples * chunks.per_sample, chunks.grain, [&](int64_t begin, int64_t end) {
    Pairs pairs;
    alignas(64) float v[kTile];
    const word_t* first_words = reinterpret_cast<const word_t*>(pairs.first);
    const word_t* second_words = reinterpret_cast<const word_t*>(pairs.second);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / chunks.per_sample;
      const int64_t start = item % chunks.per_sample * kChunk;
      const uint32_t slot = static_cast<uint32_t>(address[2] + sample);
      const int64_t stop = std::min(start + kChunk, num_elements);
      for (int64_t first = start; first < stop; first += kTile) {
        const int64_t n = std::min(kTile, stop - first);
        const int64_t offset = sample * num_elements + first;
        words_tile<kNeighbours>(key, static_cast<uint32_t>(first / 4), slot, step, stream, pairs);
        load(x, dtype, offset, v, n);
        for (int64_t i = 0; i < kTile / 4; ++i) {
          for (int64_t j = 0; j < 2; ++j) {
            v[4 * i + j] = first_words[2 * i + j] < threshold ? 0.0f : v[4 * i + j] * scale;
            v[4 * i + 2 + j] = second_words[2 * i + j] < threshold ? 0.0f : v[4 * i + 2 + j] * scale;
          }
        }
        store(y, dtype, offset, v, n);
      }
    }
  });
}
