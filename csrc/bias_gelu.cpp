// Bias and GELU (tanh approximation) on the CPU: the forward pass, and the backward pass with the bias's gradient.
// Mathematics and symbols: kernels/speed_kernels/bias_gelu/op.py.

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "elements.h"

namespace {

using namespace speed;

constexpr int64_t kTileColumns = 512;    // a row's part that one call of load() brings in
constexpr int64_t kMinRows = 16;         // of a run of rows with a column sum of its own
constexpr int64_t kRuns = 64;            // at most so many
constexpr int64_t kGrain = 64 * 1024;    // elements below which a second thread costs more than it helps
constexpr float kTwiceK = 1.5957691216057308f;
constexpr float kCube = 0.044715f;

// exp(-q(u)): infinity far below zero, and then sigmoid(q) = 1 / (1 + exp(-q)) is zero.
inline float exp_minus_q(float u) { return speed::exp(-(u * (kTwiceK + kTwiceK * kCube * (u * u)))); }

// Within +-10.05; not a number stays so. Beyond, the slope is 0 or 1 to within 1e-35 and powers of u may be infinite.
inline float bounded(float u) {
  const float v = u < -10.05f ? -10.05f : u;
  return v > 10.05f ? 10.05f : v;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<float> as_floats(const void* bias, int32_t dtype, int64_t num_columns) {
  std::vector<float> values(num_columns, 0.0f);
  if (bias != nullptr) load(bias, dtype, 0, values.data(), num_columns);
  return values;
}

}  // namespace

// x and y: [num_rows, num_columns]; bias: [num_columns] or null.
extern "C" void speed_bias_gelu(const void* x, const void* bias, void* y, int32_t dtype, int64_t num_rows,
                                int64_t num_columns) {
  const std::vector<float> b = as_floats(bias, dtype, num_columns);
  const int64_t num_blocks = ceil_div(num_columns, kTileColumns);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(num_columns, kTileColumns));
  at::parallel_for(0, num_rows * num_blocks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float u[kTileColumns];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % num_blocks * kTileColumns;
      const int64_t at = item / num_blocks * num_columns + first;
      const int64_t n = std::min(kTileColumns, num_columns - first);
      load(x, dtype, at, u, n);
      for (int64_t i = 0; i < n; ++i) {
        const float v = u[i] + b[first + i];
        u[i] = v * (1.0f / (1.0f + exp_minus_q(v)));
      }
      store(y, dtype, at, u, n);
    }
  });
}

// d_y, x and d_x: [num_rows, num_columns]; bias and d_bias: [num_columns] or null. Rows are cut into runs by the shape
// alone, whose column sums are added in order: any number of threads gives the same result.
extern "C" void speed_bias_gelu_backward(const void* d_y, const void* x, const void* bias, void* d_x, void* d_bias,
                                         int32_t dtype, int64_t num_rows, int64_t num_columns) {
  const std::vector<float> b = as_floats(bias, dtype, num_columns);
  const int64_t num_blocks = ceil_div(num_columns, kTileColumns);
  const int64_t rows = std::max(kMinRows, ceil_div(num_rows, kRuns));
  const int64_t num_runs = ceil_div(num_rows, rows);
  const int64_t grain = std::max<int64_t>(1, kGrain / (rows * std::min(num_columns, kTileColumns)));
  std::vector<double> partial(d_bias == nullptr ? 0 : num_runs * num_columns);
  at::parallel_for(0, num_runs * num_blocks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float u[kTileColumns], g[kTileColumns];
    alignas(64) double sum[kTileColumns];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t run = item / num_blocks;
      const int64_t first = item % num_blocks * kTileColumns;
      const int64_t n = std::min(kTileColumns, num_columns - first);
      const float* offset = b.data() + first;
      std::fill(sum, sum + n, 0.0);
      for (int64_t row = run * rows; row < std::min((run + 1) * rows, num_rows); ++row) {
        const int64_t at = row * num_columns + first;
        load(d_y, dtype, at, g, n);
        load(x, dtype, at, u, n);
        for (int64_t i = 0; i < n; ++i) {
          const float v = bounded(u[i] + offset[i]);
          const float e = exp_minus_q(v);
          const float s = 1.0f / (1.0f + e);
          const float bend = v * (kTwiceK + 3.0f * kTwiceK * kCube * (v * v)) * (e * s);
          g[i] = g[i] * (s + s * bend);
        }
        for (int64_t i = 0; i < n; ++i) sum[i] += g[i];
        store(d_x, dtype, at, g, n);
      }
      if (d_bias != nullptr) std::copy(sum, sum + n, partial.begin() + run * num_columns + first);
    }
  });
  if (d_bias == nullptr) return;
  std::vector<float> total(num_columns);
  for (int64_t run = 1; run < num_runs; ++run) {
    for (int64_t i = 0; i < num_columns; ++i) partial[i] += partial[run * num_columns + i];
  }
  std::copy(partial.begin(), partial.begin() + num_columns, total.begin());
  store(d_bias, dtype, 0, total.data(), num_columns);
}
