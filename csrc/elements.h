// Elements of tensors in float32, float16 or bfloat16, moved to and from float tiles; the packed rows of a step table;
// and the exponential. Everything is straight-line code in loops that the compiler vectorises.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace speed {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Columns of a row of the step table.
enum Column { kA = 0, kB, kC, kD, kW, kLogVarMin, kLogVarMax, kMeanGap, kColumns };

inline float from_bfloat16(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

inline float from_float16(uint16_t x) {
  const uint32_t magnitude = (x & 0x7fffu) << 13;
  // The exponents' biases differ by 112; multiplying also handles subnormal numbers.
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;
  return std::bit_cast<float>(value | static_cast<uint32_t>(x & 0x8000u) << 16);
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Adding 1/2 rounds to multiples of 2^-24, the spacing of the subnormal numbers.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t value = magnitude >= 0x47800000u ? special : finite;
  return static_cast<uint16_t>(value | (bits >> 16 & 0x8000u));
}

// To e4m3: four bits of exponent, three of mantissa; no infinity, and not a number beyond 448.
inline uint8_t to_e4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - 0x3c000000u) >> 20;
  // Adding 2^14 rounds to multiples of 2^-9, the spacing of the subnormal numbers.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 16384.0f) - 0x46800000u;
  const uint32_t finite = magnitude < 0x3c800000u ? subnormal : normal;
  const uint32_t value = magnitude > 0x43e80000u ? 0x7fu : finite;
  return static_cast<uint8_t>(value | (bits >> 24 & 0x80u));
}

// A dtype as a type, for loops that read and write tensors where they compute.
struct Float32 {
  using Stored = float;
  static float get(Stored x) { return x; }
  static Stored put(float x) { return x; }
};
struct Float16 {
  using Stored = uint16_t;
  static float get(Stored x) { return from_float16(x); }
  static Stored put(float x) { return to_float16(x); }
};
struct BFloat16 {
  using Stored = uint16_t;
  static float get(Stored x) { return from_bfloat16(x); }
  static Stored put(float x) { return to_bfloat16(x); }
};

inline void load(const void* tensor, int32_t dtype, int64_t offset, float* __restrict__ out, int64_t n) {
  if (dtype == kFloat32) {
    std::memcpy(out, static_cast<const float*>(tensor) + offset, n * sizeof(float));
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(tensor) + offset;
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_bfloat16(in[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = from_float16(in[i]);
  }
}

inline void store(void* tensor, int32_t dtype, int64_t offset, const float* __restrict__ in, int64_t n) {
  if (dtype == kFloat32) {
    std::memcpy(static_cast<float*>(tensor) + offset, in, n * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(tensor) + offset;
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(in[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float16(in[i]);
  }
}

// (exp(r) - 1) / r for |r| <= 0.35, relative error 2^-26.
inline float expm1_ratio(float r) {
  float p = 0.0013888867106288671f;
  p = p * r + 0.008370300754904747f;
  p = p * r + 0.04166717082262039f;
  p = p * r + 0.1666649430990219f;
  p = p * r + 0.4999999701976776f;
  return p * r + 1.0f;
}

// exp(x) and exp(x) - 1, relative error 2^-22 each; infinity above 88.73, exp about 2e-38 below -86.6, and not a number
// stays so.
inline void exponential(float x, float& exp, float& expm1) {
  float y = x < -86.6f ? -86.6f : x;
  y = y > 89.0f ? 89.0f : y;
  // Adding and subtracting 1.5 * 2^23 rounds to an integer.
  const float shifted = y * 1.4426950408889634f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  // 2^(n - 1): the factor 2 is applied last, since 2^128 is no float.
  const float half = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) - 0x4b400000u + 126u) << 23);
  const float q = r * expm1_ratio(r);
  exp = 2.0f * (half * q + half);
  expm1 = 2.0f * (half * q + (half - 0.5f));
}

inline float exp(float x) {
  float value, unused;
  exponential(x, value, unused);
  return value;
}

}  // namespace speed
