// AdamW and one or two EMAs of the weights in one pass over memory, and the sum of squares of a gradient.
//
// Tensors come as tables of pointers, so that a list of many small parameters costs no copy and no extra call. The work
// is cut into blocks of kBlock elements of all tensors strung together; a thread takes a contiguous run of blocks. Every
// element goes through the same vector instructions wherever the cuts fall (tails are padded to a whole vector), so the
// result does not depend on the number of threads, nor on how a ZeRO partition cuts the parameters.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "elements.h"

namespace {

constexpr int64_t kBlock = 32768;
constexpr int64_t kLane = 16;  // a whole number of vectors on every instruction set

// Layout of `hyper` and `scalars`: speed_kernels/adamw_ema/layout.py.
enum Hyper { LR, ONE_MINUS_BETA1, ONE_MINUS_BETA2, EPS, WEIGHT_DECAY, CLIP_NORM, EMA_KIND };
enum Scalar {
  APPLY, GRAD_SCALE, BETA2, GRAD_WEIGHT, SQUARE_WEIGHT, DECAY, STEP_SIZE, DENOM_SCALE, DENOM_EPS, EMA_WEIGHT,
  SECOND_EMA_WEIGHT, GRAD_NORM
};

// Types of their own, so that the functions below can be told apart by them.
struct Bfloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

inline float widen(float value) { return value; }

inline float widen(Bfloat16 value) { return speed::from_bfloat16(value.bits); }

inline float widen(Half value) { return speed::from_float16(value.bits); }

inline Bfloat16 narrow(float value) { return {speed::to_bfloat16(value)}; }

template <typename Grad>
struct Streams {
  float* p;
  const Grad* g;
  float* m;
  float* v;
  float* e1;
  float* e2;        // used when kSecond
  Bfloat16* copy;   // used when kCopy
};

// n is a multiple of kLane.
template <typename Grad, bool kSecond, bool kCopy>
void update_lanes(const Streams<Grad>& s, const float* scalars, int64_t n) {
  const float scale = scalars[GRAD_SCALE], beta2 = scalars[BETA2], weight1 = scalars[GRAD_WEIGHT];
  const float weight2 = scalars[SQUARE_WEIGHT], decay = scalars[DECAY], step_size = scalars[STEP_SIZE];
  const float denom_scale = scalars[DENOM_SCALE], eps = scalars[DENOM_EPS];
  const float ema_weight = scalars[EMA_WEIGHT], second_weight = scalars[SECOND_EMA_WEIGHT];
  float* __restrict p = s.p;
  const Grad* __restrict grad = s.g;
  float* __restrict m = s.m;
  float* __restrict v = s.v;
  float* __restrict e1 = s.e1;
  float* __restrict e2 = s.e2;
  Bfloat16* __restrict copy = s.copy;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = widen(grad[i]) * scale;
    const float new_m = m[i] + weight1 * (g - m[i]);
    const float new_v = beta2 * v[i] + weight2 * (g * g);
    const float denom = std::sqrt(new_v) * denom_scale + eps;
    const float new_p = decay * p[i] - step_size * (new_m / denom);
    m[i] = new_m;
    v[i] = new_v;
    p[i] = new_p;
    e1[i] += ema_weight * (new_p - e1[i]);
    if constexpr (kSecond) e2[i] += second_weight * (new_p - e2[i]);
    if constexpr (kCopy) copy[i] = narrow(new_p);
  }
}

template <typename Grad, bool kSecond, bool kCopy>
void update_part(const Streams<Grad>& s, const float* scalars, int64_t n) {
  const int64_t whole = n / kLane * kLane, rest = n - whole;
  if (whole) update_lanes<Grad, kSecond, kCopy>(s, scalars, whole);
  if (!rest) return;
  float p[kLane] = {}, m[kLane] = {}, v[kLane] = {}, e1[kLane] = {}, e2[kLane] = {};
  Grad g[kLane] = {};
  Bfloat16 copy[kLane] = {};
  std::copy_n(s.p + whole, rest, p);
  std::copy_n(s.g + whole, rest, g);
  std::copy_n(s.m + whole, rest, m);
  std::copy_n(s.v + whole, rest, v);
  std::copy_n(s.e1 + whole, rest, e1);
  if constexpr (kSecond) std::copy_n(s.e2 + whole, rest, e2);
  update_lanes<Grad, kSecond, kCopy>({p, g, m, v, e1, e2, copy}, scalars, kLane);
  std::copy_n(p, rest, s.p + whole);
  std::copy_n(m, rest, s.m + whole);
  std::copy_n(v, rest, s.v + whole);
  std::copy_n(e1, rest, s.e1 + whole);
  if constexpr (kSecond) std::copy_n(e2, rest, s.e2 + whole);
  if constexpr (kCopy) std::copy_n(copy, rest, s.copy + whole);
}

// Calls work(tensor, first element, number of elements, index of the block) for every part of a block that lies in one
// tensor, on many threads. All parts of a block come one after another on one thread.
template <typename Work>
void for_each_part(int64_t num_tensors, const int64_t* sizes, const Work& work) {
  std::vector<int64_t> first(num_tensors + 1, 0);  // place of each tensor in the string of all elements
  for (int64_t t = 0; t < num_tensors; ++t) first[t + 1] = first[t] + sizes[t];
  const int64_t total = first[num_tensors];
  at::parallel_for(0, (total + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    int64_t t = std::upper_bound(first.begin(), first.end(), begin * kBlock) - first.begin() - 1;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t stop = std::min(total, (block + 1) * kBlock);
      for (int64_t place = block * kBlock; place < stop;) {
        while (place >= first[t + 1]) ++t;
        const int64_t n = std::min(stop, first[t + 1]) - place;
        work(t, place - first[t], n, block);
        place += n;
      }
    }
  });
}

template <typename Grad, bool kSecond, bool kCopy>
void update_all(int64_t num_tensors, const int64_t* sizes, const int64_t* table, const float* scalars) {
  // table [7, num_tensors]: addresses of p, g, m, v, e1, e2, copy.
  const auto address = [&](int stream, int64_t t) { return table[stream * num_tensors + t]; };
  for_each_part(num_tensors, sizes, [&](int64_t t, int64_t start, int64_t n, int64_t) {
    Streams<Grad> s;
    s.p = reinterpret_cast<float*>(address(0, t)) + start;
    s.g = reinterpret_cast<const Grad*>(address(1, t)) + start;
    s.m = reinterpret_cast<float*>(address(2, t)) + start;
    s.v = reinterpret_cast<float*>(address(3, t)) + start;
    s.e1 = reinterpret_cast<float*>(address(4, t)) + start;
    s.e2 = kSecond ? reinterpret_cast<float*>(address(5, t)) + start : nullptr;
    s.copy = kCopy ? reinterpret_cast<Bfloat16*>(address(6, t)) + start : nullptr;
    update_part<Grad, kSecond, kCopy>(s, scalars, n);
  });
}

template <typename Grad>
void update_grad(int64_t num_tensors, const int64_t* sizes, const int64_t* table, const float* scalars,
                 bool second, bool copy) {
  if (second && copy) return update_all<Grad, true, true>(num_tensors, sizes, table, scalars);
  if (second) return update_all<Grad, true, false>(num_tensors, sizes, table, scalars);
  if (copy) return update_all<Grad, false, true>(num_tensors, sizes, table, scalars);
  update_all<Grad, false, false>(num_tensors, sizes, table, scalars);
}

template <typename Grad>
double squares(int64_t num_tensors, const int64_t* sizes, const int64_t* table) {
  const int64_t total = std::accumulate(sizes, sizes + num_tensors, int64_t{0});
  std::vector<double> partial((total + kBlock - 1) / kBlock, 0.0);
  for_each_part(num_tensors, sizes, [&](int64_t t, int64_t start, int64_t n, int64_t block) {
    const Grad* __restrict g = reinterpret_cast<const Grad*>(table[t]) + start;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const double value = widen(g[i]);
      sum += value * value;
    }
    partial[block] += sum;
  });
  double sum = 0.0;  // in order: the result does not depend on the number of threads
  for (double value : partial) sum += value;
  return sum;
}

// Of the kind half_life: it is at most this share of the updates made so far (layout.py).
constexpr double RAMP_UP = 0.05;

// 1 - decay of one EMA at step t = 1, 2, ...
double ema_weight(double kind, double value, double t) {
  if (kind == 1.0) return std::max(value, 9.0 / (9.0 + t));
  if (kind == 2.0) return -std::expm1((value + 1.0) * std::log1p(-1.0 / t));
  if (kind == 3.0) return -std::expm1(-std::max(value, std::log(2.0) / RAMP_UP / (t - 1.0)));
  return value;
}

}  // namespace

// grad_type: a speed::DType.
extern "C" void adamw_ema_update(int64_t num_tensors, const int64_t* sizes, const int64_t* table, const float* scalars,
                                 int grad_type, int second, int copy) {
  if (scalars[APPLY] == 0.0f) return;
  if (grad_type == speed::kFloat32) return update_grad<float>(num_tensors, sizes, table, scalars, second, copy);
  if (grad_type == speed::kBFloat16) return update_grad<Bfloat16>(num_tensors, sizes, table, scalars, second, copy);
  update_grad<Half>(num_tensors, sizes, table, scalars, second, copy);
}

extern "C" double adamw_ema_squares(int64_t num_tensors, const int64_t* sizes, const int64_t* table, int grad_type) {
  if (grad_type == speed::kFloat32) return squares<float>(num_tensors, sizes, table);
  if (grad_type == speed::kBFloat16) return squares<Bfloat16>(num_tensors, sizes, table);
  return squares<Half>(num_tensors, sizes, table);
}

// skipped, square_sum and grad_scale may be null.
extern "C" void adamw_ema_prepare(float* step, float* skipped, const float* hyper, const float* square_sum,
                                  const float* grad_scale, float* scalars) {
  const double scale = grad_scale ? *grad_scale : 1.0;
  const bool apply = std::isfinite(scale) && (!square_sum || std::isfinite(*square_sum));
  if (apply) *step += 1.0f;
  if (!apply && skipped) *skipped += 1.0f;
  const double t = std::max(1.0f, *step);
  const double norm = square_sum ? std::abs(scale) * std::sqrt(double(*square_sum)) : 0.0;
  const double clip = hyper[CLIP_NORM];
  const double factor = clip > 0.0 ? std::min(1.0, clip / (norm + 1e-6)) : 1.0;
  const double weight1 = hyper[ONE_MINUS_BETA1], weight2 = hyper[ONE_MINUS_BETA2], lr = hyper[LR];
  const double correction1 = -std::expm1(t * std::log1p(-weight1));
  const double correction2 = -std::expm1(t * std::log1p(-weight2));
  scalars[APPLY] = apply ? 1.0f : 0.0f;
  scalars[GRAD_SCALE] = float(scale * factor);
  scalars[BETA2] = float(1.0 - weight2);
  scalars[GRAD_WEIGHT] = float(weight1);
  scalars[SQUARE_WEIGHT] = float(weight2);
  scalars[DECAY] = float(1.0 - lr * hyper[WEIGHT_DECAY]);
  scalars[STEP_SIZE] = float(lr / correction1);
  scalars[DENOM_SCALE] = float(1.0 / std::sqrt(correction2));
  scalars[DENOM_EPS] = hyper[EPS];
  scalars[EMA_WEIGHT] = float(ema_weight(hyper[EMA_KIND], hyper[EMA_KIND + 1], t));
  scalars[SECOND_EMA_WEIGHT] = float(ema_weight(hyper[EMA_KIND + 2], hyper[EMA_KIND + 3], t));
  scalars[GRAD_NORM] = float(norm);
}
