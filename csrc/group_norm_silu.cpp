// Group normalisation with weight, bias and SiLU on the CPU, for images in channels-last memory: [samples, pixels,
// channels]. Mathematics and symbols: kernels/speed_kernels/group_norm_silu/op.py.
//
// A sample's pixels are cut into runs by its shape alone; what is summed over a run is summed in order afterwards. So
// any number of threads gives the same result.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "elements.h"

namespace {

using namespace speed;

constexpr int64_t kLanes = 256;              // channels that are handled at a time
constexpr int64_t kBatch = 16;               // pixels whose statistics are taken at a time
constexpr int64_t kRunElements = 64 * 1024;  // of a run of pixels, about
constexpr int64_t kGrain = 32 * 1024;        // elements below which a second thread costs more than it helps

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A batch, and how its pixels are cut into runs.
struct Shape {
  int64_t samples, pixels, channels, groups;
  int64_t width, run, num_runs;
  Shape(int64_t samples, int64_t pixels, int64_t channels, int64_t groups)
      : samples(samples), pixels(pixels), channels(channels), groups(groups), width(channels / groups) {
    run = std::min(pixels, ceil_div(std::max<int64_t>(1, kRunElements / channels), kBatch) * kBatch);
    num_runs = ceil_div(pixels, run);
  }
  int64_t size(int64_t index) const { return std::min(run, pixels - index * run); }  // of a run
};

// For every run and block of channels of every sample: f(sample, run, first channel, number of channels).
template <typename F>
void for_each_part(const Shape& shape, const F& f) {
  const int64_t blocks = ceil_div(shape.channels, kLanes);
  const int64_t grain = std::max<int64_t>(1, kGrain / (shape.run * std::min(shape.channels, kLanes)));
  at::parallel_for(0, shape.samples * shape.num_runs * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * kLanes;
      const int64_t run = item / blocks % shape.num_runs;
      f(item / blocks / shape.num_runs, run, first, std::min(kLanes, shape.channels - first));
    }
  });
}

std::vector<float> as_floats(const void* values, int32_t dtype, int64_t n) {
  std::vector<float> floats(n);
  load(values, dtype, 0, floats.data(), n);
  return floats;
}

// Each channel's mean and sum of squared differences to it over one run.
struct Statistics {
  alignas(64) float x[kBatch * kLanes];
  alignas(64) float centre[kLanes], shift[kLanes], square[kLanes];
  double mean[kLanes], squares[kLanes];

  void take(const void* tensor, int32_t dtype, int64_t at, int64_t stride, int64_t pixels, int64_t n) {
    std::fill(mean, mean + n, 0.0);
    std::fill(squares, squares + n, 0.0);
    for (int64_t first = 0; first < pixels; first += kBatch) {
      const int64_t rows = std::min(kBatch, pixels - first);
      const float inverse = 1.0f / static_cast<float>(rows);
      std::fill(centre, centre + n, 0.0f);
      for (int64_t row = 0; row < rows; ++row) {
        load(tensor, dtype, at + (first + row) * stride, x + row * kLanes, n);
        for (int64_t i = 0; i < n; ++i) centre[i] += x[row * kLanes + i] * inverse;
      }
      std::fill(shift, shift + n, 0.0f);
      std::fill(square, square + n, 0.0f);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < n; ++i) {
          const float delta = x[row * kLanes + i] - centre[i];
          shift[i] += delta;
          square[i] += delta * delta;
        }
      }
      // Chan's formula, with what rounding left between the centre and the mean.
      const double before = static_cast<double>(first), count = static_cast<double>(rows);
      const double after = count / (before + count);
      for (int64_t i = 0; i < n; ++i) {
        const double rest = shift[i] / count;
        const double gap = centre[i] + rest - mean[i];
        mean[i] += gap * after;
        squares[i] += (square[i] - count * rest * rest) + gap * gap * before * after;
      }
    }
  }
};

// Two values of every channel of one sample, of float [samples, 2, channels], from channel `first` on.
struct Pair {
  const float *one, *two;
  Pair(const Shape& shape, int64_t sample, int64_t first, const float* values)
      : one(values + sample * 2 * shape.channels + first), two(one + shape.channels) {}
};

void fill(const Shape& shape, int64_t group, double one, double two, float* values) {
  float* start = values + group / shape.groups * 2 * shape.channels + group % shape.groups * shape.width;
  std::fill(start, start + shape.width, static_cast<float>(one));
  std::fill(start + shape.channels, start + shape.channels + shape.width, static_cast<float>(two));
}

inline float sigmoid(float z) { return 1.0f / (1.0f + speed::exp(-z)); }

// Slope of z sigmoid(z). Beyond +-87 it is 0 or 1 to within 1e-35.
inline float silu_slope(float z) {
  const float low = z < -87.0f ? -87.0f : z;
  const float v = low > 87.0f ? 87.0f : low;
  const float e = speed::exp(-v);
  const float s = 1.0f / (1.0f + e);
  return s + s * (v * (e * s));
}

// x becomes x_hat and d_y the gradient by the SiLU's argument.
inline void normalise(Pair statistics, const float* weight, const float* bias, int32_t silu, int64_t n,
                      float* __restrict__ x, float* __restrict__ d_y) {
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - statistics.one[i]) * statistics.two[i];
  if (!silu) return;
  for (int64_t i = 0; i < n; ++i) d_y[i] *= silu_slope(x[i] * weight[i] + bias[i]);
}

}  // namespace

// statistics: float [samples, 2, channels], written: mean and rstd of every channel's group.
extern "C" void speed_group_norm_silu(const void* x, int32_t dtype, const void* weight, int32_t weight_dtype,
                                      const void* bias, int32_t bias_dtype, float* statistics, void* y,
                                      int64_t samples, int64_t pixels, int64_t channels, int64_t groups, double eps,
                                      int32_t silu) {
  const Shape shape(samples, pixels, channels, groups);
  const std::vector<float> w = as_floats(weight, weight_dtype, channels), b = as_floats(bias, bias_dtype, channels);
  std::vector<double> means(samples * shape.num_runs * channels), squares(means.size());
  for_each_part(shape, [&](int64_t sample, int64_t run, int64_t first, int64_t n) {
    Statistics part;
    const int64_t at = (sample * pixels + run * shape.run) * channels + first;
    part.take(x, dtype, at, channels, shape.size(run), n);
    const int64_t to = (sample * shape.num_runs + run) * channels + first;
    std::copy(part.mean, part.mean + n, means.begin() + to);
    std::copy(part.squares, part.squares + n, squares.begin() + to);
  });
  at::parallel_for(0, samples * groups, 64, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t start = item / groups * shape.num_runs * channels + item % groups * shape.width;
      const double total = static_cast<double>(pixels) * static_cast<double>(shape.width);
      double sum = 0.0, square = 0.0;
      for (int64_t run = 0; run < shape.num_runs; ++run) {
        for (int64_t i = 0; i < shape.width; ++i) sum += means[start + run * channels + i] * shape.size(run);
      }
      const double centre = sum / total;
      for (int64_t run = 0; run < shape.num_runs; ++run) {
        for (int64_t i = 0; i < shape.width; ++i) {
          const double gap = means[start + run * channels + i] - centre;
          square += squares[start + run * channels + i] + gap * gap * shape.size(run);
        }
      }
      fill(shape, item, centre, 1.0 / std::sqrt(square / total + eps), statistics);
    }
  });
  for_each_part(shape, [&](int64_t sample, int64_t run, int64_t first, int64_t n) {
    const Pair pair(shape, sample, first, statistics);
    const float *weight_C = w.data() + first, *bias_C = b.data() + first;
    alignas(64) float z[kLanes];
    for (int64_t row = 0; row < shape.size(run); ++row) {
      const int64_t at = (sample * pixels + run * shape.run + row) * channels + first;
      load(x, dtype, at, z, n);
      for (int64_t i = 0; i < n; ++i) z[i] = (z[i] - pair.one[i]) * pair.two[i] * weight_C[i] + bias_C[i];
      if (silu) {
        for (int64_t i = 0; i < n; ++i) z[i] *= sigmoid(z[i]);
      }
      store(y, dtype, at, z, n);
    }
  });
}

extern "C" void speed_group_norm_silu_backward(const void* d_y, const void* x, int32_t dtype, const void* weight,
                                               int32_t weight_dtype, const void* bias, int32_t bias_dtype,
                                               const float* statistics, void* d_x, void* d_weight, void* d_bias,
                                               int64_t samples, int64_t pixels, int64_t channels, int64_t groups,
                                               int32_t silu) {
  const Shape shape(samples, pixels, channels, groups);
  const std::vector<float> w = as_floats(weight, weight_dtype, channels), b = as_floats(bias, bias_dtype, channels);
  // Sums of d_z and d_z x_hat, of each channel of each run.
  std::vector<double> sums(samples * shape.num_runs * channels), products(sums.size());
  for_each_part(shape, [&](int64_t sample, int64_t run, int64_t first, int64_t n) {
    const Pair pair(shape, sample, first, statistics);
    alignas(64) float g[kLanes], z[kLanes];
    alignas(64) double sum[kLanes], product[kLanes];
    std::fill(sum, sum + n, 0.0);
    std::fill(product, product + n, 0.0);
    for (int64_t row = 0; row < shape.size(run); ++row) {
      const int64_t at = (sample * pixels + run * shape.run + row) * channels + first;
      load(d_y, dtype, at, g, n);
      load(x, dtype, at, z, n);
      normalise(pair, w.data() + first, b.data() + first, silu, n, z, g);
      for (int64_t i = 0; i < n; ++i) {
        sum[i] += g[i];
        product[i] += g[i] * z[i];
      }
    }
    const int64_t part = (sample * shape.num_runs + run) * channels + first;
    std::copy(sum, sum + n, sums.begin() + part);
    std::copy(product, product + n, products.begin() + part);
  });

  std::vector<double> sum_C(channels, 0.0), product_C(channels, 0.0);
  for (int64_t part = 0; part < samples * shape.num_runs; ++part) {
    for (int64_t i = 0; i < channels; ++i) {
      sum_C[i] += sums[part * channels + i];
      product_C[i] += products[part * channels + i];
    }
  }
  std::vector<float> rounded(sum_C.begin(), sum_C.end());
  store(d_bias, bias_dtype, 0, rounded.data(), channels);
  std::copy(product_C.begin(), product_C.end(), rounded.begin());
  store(d_weight, weight_dtype, 0, rounded.data(), channels);

  // Means of weight d_z and weight d_z x_hat over each group.
  std::vector<float> means(samples * 2 * channels);
  at::parallel_for(0, samples * groups, 64, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t channel = item % groups * shape.width;
      const int64_t start = item / groups * shape.num_runs * channels + channel;
      const double total = static_cast<double>(pixels) * static_cast<double>(shape.width);
      double sum = 0.0, product = 0.0;
      for (int64_t run = 0; run < shape.num_runs; ++run) {
        for (int64_t i = 0; i < shape.width; ++i) {
          sum += w[channel + i] * sums[start + run * channels + i];
          product += w[channel + i] * products[start + run * channels + i];
        }
      }
      fill(shape, item, sum / total, product / total, means.data());
    }
  });
  for_each_part(shape, [&](int64_t sample, int64_t run, int64_t first, int64_t n) {
    const Pair pair(shape, sample, first, statistics), mean(shape, sample, first, means.data());
    const float* weight_C = w.data() + first;
    alignas(64) float g[kLanes], z[kLanes];
    for (int64_t row = 0; row < shape.size(run); ++row) {
      const int64_t at = (sample * pixels + run * shape.run + row) * channels + first;
      load(d_y, dtype, at, g, n);
      load(x, dtype, at, z, n);
      normalise(pair, w.data() + first, b.data() + first, silu, n, z, g);
      for (int64_t i = 0; i < n; ++i) g[i] = pair.two[i] * (weight_C[i] * g[i] - mean.one[i] - z[i] * mean.two[i]);
      store(d_x, dtype, at, g, n);
    }
  });
}
