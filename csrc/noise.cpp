// The forward process on the CPU: draws every sample's row of the step table, or takes the one it is given, generates its
// noise from its address and writes x_t = A x0 + B eps. Reads x0 once, writes x_t once, stores no noise. And the noise
// alone. See kernels/speed_kernels/noise/op.py.

#include <ATen/Parallel.h>

#include "elements.h"
#include "philox.h"

using namespace speed;

// x0 and x_t: [num_samples, num_elements], contiguous. address: (step, global slot of the first sample).
// chosen: the samples' rows, or null to draw them by `cdf`, which may be null otherwise.
// stride: 0 for independent draws, else speed_kernels.philox.stratum_stride(num_slots).
// Returns 0, or 1 + the number of the first sample whose chosen row is not in the table (nothing is written then).
extern "C" int64_t speed_noise(const void* x0, int32_t x0_dtype, void* x_t, int32_t x_t_dtype, const int64_t* cdf,
                               const int64_t* chosen, const float* rows, const float* time, const int64_t* address,
                               int64_t* row_out, float* time_out, int64_t num_samples, int64_t num_elements,
                               int64_t num_rows, int64_t seed, int64_t num_slots, int64_t stride) {
  for (int64_t b = 0; chosen != nullptr && b < num_samples; ++b) {
    if (chosen[b] < 0 || chosen[b] >= num_rows) return b + 1;
  }
  const Key key(seed);
  const uint32_t step = static_cast<uint32_t>(address[0]);
  const RowDraw draw(key, step, cdf, num_rows, num_slots, stride);
  const Chunks chunks(num_elements);
  at::parallel_for(0, num_samples * chunks.per_sample, chunks.grain, [&](int64_t begin, int64_t end) {
    Noise noise(key, step, address[1], num_elements, (end + chunks.per_sample - 1) / chunks.per_sample);
    alignas(64) float x[kTile];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / chunks.per_sample;
      const int64_t start = item % chunks.per_sample * kChunk;
      const int64_t slot = address[1] + sample;
      const int64_t row = chosen == nullptr ? draw(slot) : chosen[sample];
      if (start == 0) {
        row_out[sample] = row;
        time_out[sample] = time[row];
      }
      const float a = rows[row * kColumns + kA];
      const float b = rows[row * kColumns + kB];
      const int64_t stop = std::min(start + kChunk, num_elements);
      for (int64_t first = start; first < stop; first += kTile) {
        const int64_t n = std::min(kTile, stop - first);
        const int64_t offset = sample * num_elements + first;
        const float* eps = noise(sample, first, n);
        load(x0, x0_dtype, offset, x, n);
        for (int64_t i = 0; i < n; ++i) x[i] = a * x[i] + b * eps[i];
        store(x_t, x_t_dtype, offset, x, n);
      }
    }
  });
  return 0;
}

// out: [num_samples, num_elements], the noise that speed_noise adds at this address.
extern "C" void speed_normals(float* out, const int64_t* address, int64_t num_samples, int64_t num_elements,
                              int64_t seed) {
  const Key key(seed);
  const uint32_t step = static_cast<uint32_t>(address[0]);
  const Chunks chunks(num_elements);
  at::parallel_for(0, num_samples * chunks.per_sample, chunks.grain, [&](int64_t begin, int64_t end) {
    Noise noise(key, step, address[1], num_elements, (end + chunks.per_sample - 1) / chunks.per_sample);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / chunks.per_sample;
      const int64_t start = item % chunks.per_sample * kChunk;
      const int64_t stop = std::min(start + kChunk, num_elements);
      for (int64_t first = start; first < stop; first += kTile) {
        const int64_t n = std::min(kTile, stop - first);
        store(out, kFloat32, sample * num_elements + first, noise(sample, first, n), n);
      }
    }
  });
}
