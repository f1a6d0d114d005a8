// Vectors of floats, and the exponential function that attention and SwiGLU share.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define INLINED __attribute__((always_inline))

namespace loradeploy {

// Calls act(0), …, act(count - 1), each with a constant. A compiler keeps an array of vectors in
// registers only if it knows all indices early; a loop over them is too late for g++.
template <int count, typename Act>
INLINED inline void each(const Act& act) {
  if constexpr (count > 0) {
    each<count - 1>(act);
    act(std::integral_constant<int, count - 1>());
  }
}

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;  // floats of a vector
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4), may_alias));

inline Floats load(const float* place) { return *reinterpret_cast<const Floats*>(place); }
inline void store(float* place, Floats numbers) { *reinterpret_cast<Floats*>(place) = numbers; }
inline Floats all(float number) { return number - Floats{}; }
inline Integers bits_of(Floats numbers) { return reinterpret_cast<Integers>(numbers); }
inline Floats floats_of(Integers bits) { return reinterpret_cast<Floats>(bits); }

inline constexpr int32_t kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^x in each lane, within 1 ulp: 0 below -87 (no denormal numbers), infinity above 88.3, and NaN
// for NaN. e^x = 2^n e^r with n = round(x / ln 2) and |r| ≤ ln 2 / 2.
//
// `upwards`: whether x may be above 0.
template <bool upwards = true>
inline Floats exponential(Floats x) {
  x = x < -104.0f ? all(-104.0f) : x;  // NaN stays NaN
  if constexpr (upwards) x = x > 89.0f ? all(89.0f) : x;
  const Floats rounding = all(12582912.0f);  // 1.5 · 2²³: adding it rounds to whole numbers
  const Floats shifted = x * 1.44269504088896341f + rounding;
  const Floats n = shifted - rounding;
  Floats r = x - n * 0.693145751953125f;  // ln 2 in two parts: n times the first part is exact
  r = r - n * 1.42860682030941723e-6f;
  Floats p = all(1.98412698e-4f);
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 0.166666667f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Integers power = bits_of(shifted) - (bits_of(rounding) - 127);
  power = power > 1 ? power : Integers{};  // 2^n = 0
  if constexpr (upwards) {
    const Integers infinite = Integers{} + 255;
    power = power > infinite ? infinite : power;
  }
  return p * floats_of(power << 23);
}

// tanh(x) in each lane: a series near 0, where 1 - 2 / (e^2x + 1) would lose digits.
inline Floats hyperbolic_tangent(Floats x) {
  const Floats square = x * x;
  Floats series = all(2.18694885e-2f);
  series = series * square - 5.39682540e-2f;
  series = series * square + 0.133333333f;
  series = series * square - 0.333333333f;
  const Floats near = x + x * square * series;
  const Floats far = 1.0f - 2.0f / (exponential(x + x) + 1.0f);
  const Floats size = x < 0.0f ? -x : x;
  return size < 0.25f ? near : far;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LORADEPLOY_SHUFFLES
#endif
#endif

// The lanes, each in place of the one at the distance `half`.
template <int half>
inline Floats turned(Floats numbers) {
#if !defined(LORADEPLOY_SHUFFLES)
  Floats result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = numbers[lane ^ half];
  return result;
#elif defined(__AVX512F__)
  return __builtin_shufflevector(
      numbers, numbers, 0 ^ half, 1 ^ half, 2 ^ half, 3 ^ half, 4 ^ half, 5 ^ half, 6 ^ half,
      7 ^ half, 8 ^ half, 9 ^ half, 10 ^ half, 11 ^ half, 12 ^ half, 13 ^ half, 14 ^ half, 15 ^ half);
#elif defined(__AVX__)
  return __builtin_shufflevector(numbers, numbers, 0 ^ half, 1 ^ half, 2 ^ half, 3 ^ half, 4 ^ half,
                                 5 ^ half, 6 ^ half, 7 ^ half);
#else
  return __builtin_shufflevector(numbers, numbers, 0 ^ half, 1 ^ half, 2 ^ half, 3 ^ half);
#endif
}

inline float sum_of(Floats numbers) {
  if constexpr (kLanes == 16) numbers = numbers + turned<8>(numbers);
  if constexpr (kLanes >= 8) numbers = numbers + turned<4>(numbers);
  numbers = numbers + turned<2>(numbers);
  return (numbers + turned<1>(numbers))[0];
}

inline Floats larger(Floats one, Floats other) { return one > other ? one : other; }

inline float largest_of(Floats numbers) {
  if constexpr (kLanes == 16) numbers = larger(numbers, turned<8>(numbers));
  if constexpr (kLanes >= 8) numbers = larger(numbers, turned<4>(numbers));
  numbers = larger(numbers, turned<2>(numbers));
  return larger(numbers, turned<1>(numbers))[0];
}

}  // namespace loradeploy
