// The training loss of a diffusion model and its gradient, in one pass on the CPU: regenerates the noise from its
// address, compares the network's output with the target C x0 + D eps and, with a learned variance, adds the
// variational term. Mathematics and symbols: kernels/speed_kernels/loss/op.py.

#include <ATen/Parallel.h>

#include <limits>
#include <vector>

#include "elements.h"
#include "philox.h"

namespace {

using namespace speed;

constexpr double kBitsPerNat = 1.4426950408889634;

// What all elements of one sample share.
struct Sample {
  float c, d;            // target = c x0 + d eps
  float mse_gradient;    // d total / d (error^2 / 2)
  float range;           // LOGVAR_MAX - LOGVAR_MIN
  float log_var_min;
  float mean_gap;
  float gap_precision;   // mean_gap^2 exp(-LOGVAR_MIN)
  float vb_gradient;     // d total / d (variational term of one element in nats) * d (log variance) / dv
};

// sum of values[0 .. n): float lanes whose number the compiler chooses, the same for any number of threads.
inline double sum(const float* values, int64_t n) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

// KL(true posterior || model) of one element in nats, and its derivative by the model's log variance.
inline void divergence(const Sample& s, float error, float v, float& nats, float& slope) {
  const float y = (v + 1.0f) * (0.5f * s.range);  // log variance above LOGVAR_MIN
  float e, e_minus_1;
  exponential(-y, e, e_minus_1);
  const float gap = e * (s.gap_precision * (error * error));
  nats = 0.5f * ((y + e_minus_1) + gap);
  slope = -0.5f * (e_minus_1 + gap);
}

// ln of a number in [1e-12, 1]; not a number stays so.
inline float log_probability(float p) {
  const Split split(p);
  return static_cast<float>(split.exponent) * 0.6931471805599453f + log1p_short(split.m - 1.0f) + (p - p);
}

inline float clamp(float x, float bound) {
  const float y = x < -bound ? -bound : x;
  return y > bound ? bound : y;
}

// Negative log likelihood of x0 in bins of width 2/255 under the model's Gaussian, in nats, and its derivative by the
// log variance. The cumulative distribution is the logistic function s of q(z) = 2 sqrt(2/pi) (z + 0.044715 z^3), and
// s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)) keeps its relative accuracy in the tails.
inline void likelihood(const Sample& s, float error, float x0, float v, float& nats, float& slope) {
  constexpr float kHalfBin = 1.0f / 255.0f, kCube = 0.044715f, kTwice = 1.5957691216057308f;
  const float inverse_std = speed::exp(-0.5f * (s.log_var_min + (v + 1.0f) * (0.5f * s.range)));
  const float centre = s.mean_gap * error;
  const float p = clamp(inverse_std * (centre + kHalfBin), 100.0f);
  const float m = clamp(inverse_std * (centre - kHalfBin), 100.0f);
  const float e_upper = speed::exp(-clamp(kTwice * p * (1.0f + kCube * (p * p)), 60.0f));
  const float e_lower = speed::exp(-clamp(kTwice * m * (1.0f + kCube * (m * m)), 60.0f));
  const float cdf_upper = 1.0f / (1.0f + e_upper);
  const float cdf_lower = 1.0f / (1.0f + e_lower);
  const float squares = kCube * (p * p + p * m + m * m);
  const float width = kTwice * (2.0f * kHalfBin) * inverse_std * (1.0f + squares);
  const float d_width = -0.5f * kTwice * (2.0f * kHalfBin) * inverse_std * (1.0f + 3.0f * squares);
  const float e_width = speed::exp(-width);
  const float inside = width < 0.34f ? width * expm1_ratio(-width) : 1.0f - e_width;

  const bool left = x0 < -0.999f, right = x0 > 0.999f, edge = left | right;
  const float mass_upper = right ? 1.0f : cdf_upper;
  const float mass_lower = left ? 1.0f : e_lower * cdf_lower;
  const float mass_inside = edge ? 1.0f : inside;
  const float mass = mass_upper * mass_lower * mass_inside;
  // Derivatives of ln mass: of s(a), of s(-b) and of the difference.
  const float d_upper = e_upper * cdf_upper * (-0.5f * kTwice * p * (1.0f + 3.0f * kCube * (p * p)));
  const float d_lower = cdf_lower * (0.5f * kTwice * m * (1.0f + 3.0f * kCube * (m * m)));
  const float d_inside = d_width * e_width / inside;
  const float d_log = (right ? 0.0f : d_upper) + (left ? 0.0f : d_lower) + (edge ? 0.0f : d_inside);
  nats = -log_probability(mass < 1e-12f ? 1e-12f : mass);
  slope = mass < 1e-12f ? 0.0f : -d_log;
}

}  // namespace

// out and grad: [num_samples, channels * num_elements] with channels 2 with a learned variance (prediction, then v) and
// 1 without; x0: [num_samples, num_elements]. losses: [3, num_samples] (total, mean squared error, variational bits).
// Returns 0, or 1 + the number of the first sample whose row is not in the table (nothing is written then).
extern "C" int64_t speed_loss(const void* out, int32_t out_dtype, const void* x0, int32_t x0_dtype, const int64_t* row_B,
                              const float* rows, const int64_t* address, float* total, float* losses, void* grad,
                              int64_t num_samples, int64_t num_elements, int64_t num_rows, int64_t seed,
                              int32_t learned_variance, double vb_scale, int32_t weight_vb, double grad_scale) {
  for (int64_t b = 0; b < num_samples; ++b) {
    if (row_B[b] < 0 || row_B[b] >= num_rows) return b + 1;
  }
  const Key key(seed);
  const uint32_t step = static_cast<uint32_t>(address[0]);
  const int64_t channels = learned_variance ? 2 : 1;
  const int64_t num_chunks = (num_elements + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, 2 * kChunk / std::max<int64_t>(1, std::min(num_elements, kChunk)));
  std::vector<double> squares(num_samples * num_chunks), bounds(num_samples * num_chunks, 0.0);

  at::parallel_for(0, num_samples * num_chunks, grain, [&](int64_t begin, int64_t end) {
    Noise noise(key, step, address[1], num_elements, (end + num_chunks - 1) / num_chunks);
    alignas(64) float x[kTile], f[kTile], v[kTile], term[kTile], slope[kTile];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / num_chunks;
      const int64_t start = item % num_chunks * kChunk;
      const int64_t stop = std::min(start + kChunk, num_elements);
      const float* row = rows + row_B[b] * kColumns;
      Sample s{};
      s.c = row[kC];
      s.d = row[kD];
      s.mse_gradient = static_cast<float>(2.0 * grad_scale * row[kW] / num_elements);
      if (learned_variance) {
        const double vb_weight = vb_scale * (weight_vb ? row[kW] : 1.0f);
        s.range = row[kLogVarMax] - row[kLogVarMin];
        s.log_var_min = row[kLogVarMin];
        s.mean_gap = row[kMeanGap];
        s.gap_precision = static_cast<float>(std::exp(-double{row[kLogVarMin]}) * row[kMeanGap] * row[kMeanGap]);
        s.vb_gradient = static_cast<float>(grad_scale * vb_weight * kBitsPerNat / num_elements * 0.5 * s.range);
      }
      double squares_sum = 0.0, bound_sum = 0.0;
      for (int64_t first = start; first < stop; first += kTile) {
        const int64_t n = std::min(kTile, stop - first);
        const int64_t at_f = b * channels * num_elements + first;
        const int64_t at_v = at_f + num_elements;
        float* eps = noise(b, first, n);
        load(x0, x0_dtype, b * num_elements + first, x, n);
        load(out, out_dtype, at_f, f, n);
        for (int64_t i = 0; i < n; ++i) {
          const float error = f[i] - (s.c * x[i] + s.d * eps[i]);
          eps[i] = error;  // from here on this tile holds errors
          term[i] = error * error;
          f[i] = s.mse_gradient * error;
        }
        squares_sum += sum(term, n);
        store(grad, out_dtype, at_f, f, n);
        if (!learned_variance) continue;
        load(out, out_dtype, at_v, v, n);
        if (row_B[b] == 0) {
          for (int64_t i = 0; i < n; ++i) likelihood(s, eps[i], x[i], v[i], term[i], slope[i]);
        } else {
          for (int64_t i = 0; i < n; ++i) divergence(s, eps[i], v[i], term[i], slope[i]);
        }
        for (int64_t i = 0; i < n; ++i) slope[i] *= s.vb_gradient;
        bound_sum += sum(term, n);
        store(grad, out_dtype, at_v, slope, n);
      }
      squares[item] = squares_sum;
      bounds[item] = bound_sum;
    }
  });

  double all = 0.0;
  for (int64_t b = 0; b < num_samples; ++b) {
    double square = 0.0, bound = 0.0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      square += squares[b * num_chunks + chunk];
      bound += bounds[b * num_chunks + chunk];
    }
    const double weight = rows[row_B[b] * kColumns + kW];
    const double mse = square / num_elements;
    const double vb = bound / num_elements * kBitsPerNat;
    const double loss = weight * mse + (learned_variance ? vb_scale * (weight_vb ? weight : 1.0) * vb : 0.0);
    losses[b] = static_cast<float>(loss);
    losses[num_samples + b] = static_cast<float>(mse);
    losses[2 * num_samples + b] = static_cast<float>(vb);
    all += loss;
  }
  *total = static_cast<float>(grad_scale * all);
  return 0;
}
