// Gate, residual sum, LayerNorm and modulation of a transformer with adaptive norms, forward and backward, each in one
// pass over the data on the CPU. Mathematics and symbols: kernels/speed_kernels/gate_residual_norm_modulate/op.py.
//
// A row (one token's channels) stays in the first-level cache while it is worked on. Statistics are sums of doubles, in
// which no finite float32 row overflows. Work is cut by shapes alone, never by the number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "elements.h"

namespace {

using namespace speed;

// Rows of one sample whose sums over tokens one task takes; fewer would write more partial sums.
constexpr int64_t kChunkRows = 32;
// The sums over tokens: of d_y, of d_y n, of branch d_x, of d_x.
enum Sum { kShift = 0, kScale, kGate, kDx, kSums };
// Elements that make a task worth a thread.
constexpr int64_t kGrain = 32768;

// Rows of [num_samples, ...] tensors in the compute dtype, `stride` elements apart, unpacked when the sample changes.
struct Modulation {
  const void* rows;
  int64_t stride;
  int32_t dtype;
  std::vector<float> values;
  int64_t sample = -1;

  Modulation(const void* rows_, int64_t stride_, int32_t dtype_, int64_t num_channels)
      : rows(rows_), stride(stride_), dtype(dtype_), values(num_channels, 0.0f) {}

  const float* of(int64_t b) {
    if (rows != nullptr && b != sample) load(rows, dtype, b * stride, values.data(), values.size());
    sample = b;
    return values.data();
  }
};

inline double sum(const float* values, int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

inline double sum_of_squares(const float* values, double centre, int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const double distance = values[i] - centre;
    total += distance * distance;
  }
  return total;
}

int64_t num_chunks_of(int64_t num_tokens) { return (num_tokens + kChunkRows - 1) / kChunkRows; }

// One row of the backward pass up to d_x, which replaces d_sum. The sums over tokens grow by this row.
inline void differentiate_row(const float* __restrict__ d_y, const float* __restrict__ stream,
                              const float* __restrict__ scale, float mean, float rstd, float* __restrict__ n,
                              float* __restrict__ d_sum, float* __restrict__ shift_sum, float* __restrict__ scale_sum,
                              int64_t num) {
  double total = 0.0, along = 0.0;
#pragma omp simd reduction(+ : total, along)
  for (int64_t i = 0; i < num; ++i) {
    const float normed = (stream[i] - mean) * rstd;
    const float g = d_y[i] * (1.0f + scale[i]);
    n[i] = normed;
    shift_sum[i] += d_y[i];
    scale_sum[i] += d_y[i] * normed;
    total += g;
    along += static_cast<double>(g) * normed;
  }
  const float mean_g = static_cast<float>(total / num), mean_gn = static_cast<float>(along / num);
  for (int64_t i = 0; i < num; ++i) {
    d_sum[i] += rstd * (d_y[i] * (1.0f + scale[i]) - mean_g - n[i] * mean_gn);
  }
}

}  // namespace

// x, sum: [num_samples, num_tokens, num_channels] in stream_dtype; branch, y: the same in dtype; gate, shift, scale:
// rows of num_channels, `stride` elements apart; bias: [num_channels] or null. Without a gate (null) there is no branch
// and no sum, and x is normed. mean, rstd: [num_samples, num_tokens].
extern "C" void speed_gate_residual_norm_modulate(const void* x, int32_t stream_dtype, const void* branch, int32_t dtype,
                                                  const void* gate, int64_t gate_stride, const void* bias,
                                                  const void* shift, int64_t shift_stride, const void* scale,
                                                  int64_t scale_stride, void* sum_out, void* y, float* mean_out,
                                                  float* rstd_out, int64_t num_samples, int64_t num_tokens,
                                                  int64_t num_channels, double eps) {
  const int64_t n = num_channels;
  const int64_t grain = std::max<int64_t>(1, kGrain / n);
  at::parallel_for(0, num_samples * num_tokens, grain, [&](int64_t begin, int64_t end) {
    Modulation gates(gate, gate_stride, dtype, n), shifts(shift, shift_stride, dtype, n);
    Modulation scales(scale, scale_stride, dtype, n), biases(bias, 0, dtype, n);
    std::vector<float> stream_row(n), branch_row(n);
    float* __restrict__ s = stream_row.data();
    float* __restrict__ v = branch_row.data();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / num_tokens;
      load(x, stream_dtype, row * n, s, n);
      if (gate != nullptr) {
        const float* __restrict__ gate_row = gates.of(b);
        const float* __restrict__ bias_row = biases.of(0);
        load(branch, dtype, row * n, v, n);
        for (int64_t i = 0; i < n; ++i) s[i] += gate_row[i] * (v[i] + bias_row[i]);
        store(sum_out, stream_dtype, row * n, s, n);
        // The statistics are those of the rounded sum.
        if (stream_dtype != kFloat32) load(sum_out, stream_dtype, row * n, s, n);
      }
      const double mean = sum(s, n) / n;
      const double rstd = 1.0 / std::sqrt(sum_of_squares(s, mean, n) / n + eps);
      // The mean in two floats: where it is large, what one float leaves of it matters.
      const float high = static_cast<float>(mean), low = static_cast<float>(mean - high);
      const float inverse = static_cast<float>(rstd);
      const float* __restrict__ shift_row = shifts.of(b);
      const float* __restrict__ scale_row = scales.of(b);
      for (int64_t i = 0; i < n; ++i) v[i] = (s[i] - high - low) * inverse * (1.0f + scale_row[i]) + shift_row[i];
      store(y, dtype, row * n, v, n);
      mean_out[row] = high;
      rstd_out[row] = inverse;
    }
  });
}

// As above; d_sum may be null (zero). d_gate, d_shift, d_scale: [num_samples, num_channels] in dtype; d_bias:
// [num_channels] in dtype, null without a bias. Without a gate nothing is written to d_branch, d_gate and d_bias.
extern "C" void speed_gate_residual_norm_modulate_backward(
    const void* d_sum, const void* d_y, const void* stream, int32_t stream_dtype, const float* mean, const float* rstd,
    const void* branch, int32_t dtype, const void* gate, int64_t gate_stride, const void* bias, const void* scale,
    int64_t scale_stride, void* d_x, void* d_branch, void* d_gate, void* d_shift, void* d_scale, void* d_bias,
    int64_t num_samples, int64_t num_tokens, int64_t num_channels) {
  const int64_t n = num_channels, num_chunks = num_chunks_of(num_tokens);
  std::vector<float> partial(num_samples * num_chunks * kSums * n);  // zeros
  const int64_t grain = std::max<int64_t>(1, kGrain / (n * std::max<int64_t>(1, std::min(num_tokens, kChunkRows))));
  at::parallel_for(0, num_samples * num_chunks, grain, [&](int64_t begin, int64_t end) {
    Modulation gates(gate, gate_stride, dtype, n), scales(scale, scale_stride, dtype, n);
    std::vector<float> rows(5 * n);
    float* __restrict__ d_y_row = rows.data();
    float* __restrict__ stream_row = d_y_row + n;
    float* __restrict__ normed_row = stream_row + n;
    float* __restrict__ d_x_row = normed_row + n;
    float* __restrict__ branch_row = d_x_row + n;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / num_chunks;
      const int64_t first = b * num_tokens + item % num_chunks * kChunkRows;
      const int64_t last = std::min(first + kChunkRows, (b + 1) * num_tokens);
      float* sums = partial.data() + item * kSums * n;
      const float* scale_row = scales.of(b);
      for (int64_t row = first; row < last; ++row) {
        load(d_y, dtype, row * n, d_y_row, n);
        load(stream, stream_dtype, row * n, stream_row, n);
        if (d_sum != nullptr) {
          load(d_sum, stream_dtype, row * n, d_x_row, n);
        } else {
          std::fill(d_x_row, d_x_row + n, 0.0f);
        }
        differentiate_row(d_y_row, stream_row, scale_row, mean[row], rstd[row], normed_row, d_x_row, sums + kShift * n,
                          sums + kScale * n, n);
        store(d_x, stream_dtype, row * n, d_x_row, n);
        if (gate == nullptr) continue;
        load(branch, dtype, row * n, branch_row, n);
        const float* __restrict__ gate_row = gates.of(b);
        float* __restrict__ gate_sum = sums + kGate * n;
        float* __restrict__ d_x_sum = sums + kDx * n;
        for (int64_t i = 0; i < n; ++i) {
          gate_sum[i] += branch_row[i] * d_x_row[i];
          d_x_sum[i] += d_x_row[i];
          branch_row[i] = gate_row[i] * d_x_row[i];
        }
        store(d_branch, dtype, row * n, branch_row, n);
      }
    }
  });

  // Second stage: a sample's chunks in order; then gate times the sums of d_x, over the samples in order.
  std::vector<double> d_x_total(d_bias != nullptr ? num_samples * n : 0);
  at::parallel_for(0, num_samples, std::max<int64_t>(1, kGrain / (kSums * n)), [&](int64_t begin, int64_t end) {
    Modulation biases(bias, 0, dtype, n);
    std::vector<double> totals(kSums * n);
    std::vector<float> rounded(n);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        const float* sums = partial.data() + (b * num_chunks + chunk) * kSums * n;
        for (int64_t i = 0; i < kSums * n; ++i) totals[i] += sums[i];
      }
      const auto write = [&](void* out, Sum which) {
        for (int64_t i = 0; i < n; ++i) rounded[i] = static_cast<float>(totals[which * n + i]);
        store(out, dtype, b * n, rounded.data(), n);
      };
      write(d_shift, kShift);
      write(d_scale, kScale);
      if (gate == nullptr) continue;
      const float* bias_row = biases.of(0);
      for (int64_t i = 0; i < n; ++i) totals[kGate * n + i] += bias_row[i] * totals[kDx * n + i];
      write(d_gate, kGate);
      if (d_bias != nullptr) std::copy_n(totals.data() + kDx * n, n, d_x_total.data() + b * n);
    }
  });
  if (d_bias == nullptr) return;
  Modulation gates(gate, gate_stride, dtype, n);
  std::vector<double> total(n, 0.0);
  std::vector<float> rounded(n);
  for (int64_t b = 0; b < num_samples; ++b) {
    const float* gate_row = gates.of(b);
    for (int64_t i = 0; i < n; ++i) total[i] += gate_row[i] * d_x_total[b * n + i];
  }
  for (int64_t i = 0; i < n; ++i) rounded[i] = static_cast<float>(total[i]);
  store(d_bias, dtype, 0, rounded.data(), n);
}
