// Gate, residual sum, LayerNorm and modulation of a transformer with adaptive norms, forward and backward, each in one
// pass over the data on the CPU. Mathematics and symbols: kernels/speed_kernels/gate_residual_norm_modulate/op.py.
//
// A row (one token's channels) stays in the first-level cache between its few loops, which read and write the tensors
// where they compute. The mean is a sum of doubles; other sums over channels are floats over kBlock channels, doubles
// over the blocks, and doubles alone where floats overflow, so that no finite float32 row is spoiled. Work is cut by
// shapes alone, never by the number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "elements.h"

namespace {

using namespace speed;

// Rows of one sample whose sums over tokens one task takes; fewer would write more partial sums.
constexpr int64_t kChunkRows = 32;
// The sums over tokens: of d_y, of d_y n, of branch d_x, of d_x.
enum Sum { kShift = 0, kScale, kGate, kDx, kSums };
// Channels whose sum is taken in float32.
constexpr int64_t kBlock = 64;
// Elements that make a task worth a thread.
constexpr int64_t kGrain = 32768;

// Rows of [num_samples, ...] tensors in the compute dtype, `stride` elements apart, unpacked when the sample changes,
// with `offset` added.
struct Modulation {
  const void* rows;
  int64_t stride;
  int32_t dtype;
  std::vector<float> values;
  float offset;
  int64_t sample = -1;

  Modulation(const void* rows_, int64_t stride_, int32_t dtype_, int64_t num_channels, float offset_ = 0.0f)
      : rows(rows_), stride(stride_), dtype(dtype_), values(num_channels, 0.0f), offset(offset_) {}

  const float* of(int64_t b) {
    if (rows != nullptr && b != sample) {
      load(rows, dtype, b * stride, values.data(), values.size());
      for (float& value : values) value += offset;
    }
    sample = b;
    return values.data();
  }
};

// Calls `work` with the types of the residual stream (float32 or bfloat16) and of everything else.
template <typename Work>
void with_types(int32_t stream_dtype, int32_t dtype, const Work& work) {
  const auto with_stream = [&](auto stream) {
    if (dtype == kFloat32) return work(stream, Float32{});
    if (dtype == kFloat16) return work(stream, Float16{});
    return work(stream, BFloat16{});
  };
  if (stream_dtype == kFloat32) return with_stream(Float32{});
  return with_stream(BFloat16{});
}

// The row at an offset of a tensor that may be absent.
template <typename Element>
Element* row_of(Element* rows, int64_t offset) {
  return rows == nullptr ? nullptr : rows + offset;
}

// Sums of doubles stay out of the loops that round: together the compiler makes much slower code of them.
inline double sum(const float* values, int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

// The row of the rounded sum, into the tensor and `s`.
template <typename Stream, typename Compute>
void add_branch(const typename Stream::Stored* __restrict__ x, const typename Compute::Stored* __restrict__ branch,
                const float* __restrict__ gate, const float* __restrict__ bias,
                typename Stream::Stored* __restrict__ out, float* __restrict__ s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float value = Stream::get(x[i]) + gate[i] * (Compute::get(branch[i]) + bias[i]);
    const typename Stream::Stored rounded = Stream::put(value);
    out[i] = rounded;
    s[i] = Stream::get(rounded);
  }
}

// s less high + low, in place. Returns the sum of the squares.
inline double centre(float* __restrict__ s, float high, float low, int64_t n) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) {
      s[i] = s[i] - high - low;
      part += s[i] * s[i];
    }
    total += part;
  }
  if (std::isfinite(total)) return total;
  total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(s[i]) * s[i];
  return total;
}

int64_t num_chunks_of(int64_t num_tokens) { return (num_tokens + kChunkRows - 1) / kChunkRows; }

// A row in e4m3, and its scale: what kernels/speed_kernels/e4m3.py says.
template <typename Compute>
float quantise(const typename Compute::Stored* __restrict__ y, uint8_t* __restrict__ values, int64_t n) {
  // Magnitudes are in the order of their bits, and above all of them is what is not a number.
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(Compute::get(y[i])) & 0x7fffffffu);
  float scale = std::bit_cast<float>(largest) / 448.0f;
  if (scale < std::numeric_limits<float>::min()) scale = std::numeric_limits<float>::min();
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < n; ++i) values[i] = to_e4m3(Compute::get(y[i]) * inverse);
  return scale;
}

template <typename Compute>
void modulate(const float* __restrict__ centred, float rstd, const float* __restrict__ one_plus_scale,
              const float* __restrict__ shift, typename Compute::Stored* __restrict__ y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = Compute::put(centred[i] * rstd * one_plus_scale[i] + shift[i]);
}

// One row of the backward pass before its means are known: n, g and their sums; the sums over tokens grow.
template <typename Stream, typename Compute>
void differentiate_norm(const typename Compute::Stored* __restrict__ d_y,
                        const typename Stream::Stored* __restrict__ stream, const float* __restrict__ one_plus_scale,
                        float mean, float rstd, float* __restrict__ normed, float* __restrict__ g,
                        float* __restrict__ shift_sum, float* __restrict__ scale_sum, int64_t n, double& total,
                        double& along) {
  total = along = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    float part = 0.0f, part_along = 0.0f;
#pragma omp simd reduction(+ : part, part_along)
    for (int64_t i = begin; i < end; ++i) {
      const float d = Compute::get(d_y[i]);
      const float at = (Stream::get(stream[i]) - mean) * rstd;
      const float scaled = d * one_plus_scale[i];
      normed[i] = at;
      g[i] = scaled;
      shift_sum[i] += d;
      scale_sum[i] += d * at;
      part += scaled;
      part_along += scaled * at;
    }
    total += part;
    along += part_along;
  }
  if (std::isfinite(total) && std::isfinite(along)) return;
  total = along = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    total += g[i];
    along += static_cast<double>(g[i]) * normed[i];
  }
}

// d_x of a row, into the tensor; with a gate also d_branch, and the sums over tokens grow by this row.
template <typename Stream, typename Compute, bool kGated, bool kHasSum>
void write_row(const float* __restrict__ g, const float* __restrict__ normed, float rstd, float mean_g, float mean_gn,
               const typename Stream::Stored* __restrict__ d_sum, const typename Compute::Stored* __restrict__ branch,
               const float* __restrict__ gate, typename Stream::Stored* __restrict__ d_x,
               typename Compute::Stored* __restrict__ d_branch, float* __restrict__ gate_sum,
               float* __restrict__ d_x_sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float d = rstd * (g[i] - mean_g - normed[i] * mean_gn);
    if constexpr (kHasSum) d += Stream::get(d_sum[i]);
    d_x[i] = Stream::put(d);
    if constexpr (kGated) {
      gate_sum[i] += Compute::get(branch[i]) * d;
      d_x_sum[i] += d;
      d_branch[i] = Compute::put(gate[i] * d);
    }
  }
}

}  // namespace

// x, sum: [num_samples, num_tokens, num_channels] in stream_dtype; branch, y: the same in dtype; gate, shift, scale:
// rows of num_channels, `stride` elements apart; bias: [num_channels] or null. Without a gate (null) there is no branch
// and no sum, and x is normed. mean, rstd: [num_samples, num_tokens]. e4m3, row_scale: y's rows in e4m3 and their scales,
// shaped as y and mean; or null.
extern "C" void speed_gate_residual_norm_modulate(const void* x, int32_t stream_dtype, const void* branch, int32_t dtype,
                                                  const void* gate, int64_t gate_stride, const void* bias,
                                                  const void* shift, int64_t shift_stride, const void* scale,
                                                  int64_t scale_stride, void* sum_out, void* y, float* mean_out,
                                                  float* rstd_out, uint8_t* e4m3, float* row_scale, int64_t num_samples, int64_t num_tokens,
                                                  int64_t num_channels, double eps) {
  const int64_t n = num_channels;
  const int64_t grain = std::max<int64_t>(1, kGrain / n);
  with_types(stream_dtype, dtype, [&](auto stream_type, auto type) {
    using Stream = decltype(stream_type);
    using Compute = decltype(type);
    const auto* x_rows = static_cast<const typename Stream::Stored*>(x);
    const auto* branch_rows = static_cast<const typename Compute::Stored*>(branch);
    auto* sum_rows = static_cast<typename Stream::Stored*>(sum_out);
    auto* y_rows = static_cast<typename Compute::Stored*>(y);
    at::parallel_for(0, num_samples * num_tokens, grain, [&](int64_t begin, int64_t end) {
      Modulation gates(gate, gate_stride, dtype, n), shifts(shift, shift_stride, dtype, n);
      Modulation scales(scale, scale_stride, dtype, n, 1.0f), biases(bias, 0, dtype, n);
      std::vector<float> stream_row(n);
      float* s = stream_row.data();
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / num_tokens;
        if (gate != nullptr) {
          add_branch<Stream, Compute>(x_rows + row * n, branch_rows + row * n, gates.of(b), biases.of(0),
                                      sum_rows + row * n, s, n);
        } else {
          load(x, stream_dtype, row * n, s, n);
        }
        const double mean = sum(s, n) / n;
        // The mean in two floats: where it is large, what one float leaves of it matters.
        const float high = static_cast<float>(mean), low = static_cast<float>(mean - high);
        const float inverse = static_cast<float>(1.0 / std::sqrt(centre(s, high, low, n) / n + eps));
        modulate<Compute>(s, inverse, scales.of(b), shifts.of(b), y_rows + row * n, n);
        if (e4m3 != nullptr) row_scale[row] = quantise<Compute>(y_rows + row * n, e4m3 + row * n, n);
        mean_out[row] = high;
        rstd_out[row] = inverse;
      }
    });
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
  with_types(stream_dtype, dtype, [&](auto stream_type, auto type) {
    using Stream = decltype(stream_type);
    using Compute = decltype(type);
    const auto* d_sum_rows = static_cast<const typename Stream::Stored*>(d_sum);
    const auto* d_y_rows = static_cast<const typename Compute::Stored*>(d_y);
    const auto* stream_rows = static_cast<const typename Stream::Stored*>(stream);
    const auto* branch_rows = static_cast<const typename Compute::Stored*>(branch);
    auto* d_x_rows = static_cast<typename Stream::Stored*>(d_x);
    auto* d_branch_rows = static_cast<typename Compute::Stored*>(d_branch);
    const auto write = gate != nullptr ? (d_sum != nullptr ? write_row<Stream, Compute, true, true>
                                                           : write_row<Stream, Compute, true, false>)
                                       : (d_sum != nullptr ? write_row<Stream, Compute, false, true>
                                                           : write_row<Stream, Compute, false, false>);
    at::parallel_for(0, num_samples * num_chunks, grain, [&](int64_t begin, int64_t end) {
      Modulation gates(gate, gate_stride, dtype, n), scales(scale, scale_stride, dtype, n, 1.0f);
      std::vector<float> rows(2 * n);
      float *g = rows.data(), *normed = g + n;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / num_chunks;
        const int64_t first = b * num_tokens + item % num_chunks * kChunkRows;
        const int64_t last = std::min(first + kChunkRows, (b + 1) * num_tokens);
        float* sums = partial.data() + item * kSums * n;
        const float *scale_row = scales.of(b), *gate_row = gates.of(b);
        for (int64_t row = first; row < last; ++row) {
          const int64_t at = row * n;
          double total, along;
          differentiate_norm<Stream, Compute>(d_y_rows + at, stream_rows + at, scale_row, mean[row], rstd[row], normed,
                                              g, sums + kShift * n, sums + kScale * n, n, total, along);
          write(g, normed, rstd[row], static_cast<float>(total / n), static_cast<float>(along / n),
                row_of(d_sum_rows, at), row_of(branch_rows, at), gate_row, d_x_rows + at, row_of(d_branch_rows, at),
                sums + kGate * n, sums + kDx * n, n);
        }
      }
    });
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
