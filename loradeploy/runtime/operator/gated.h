// silu(gate) · up, where silu(x) = x / (1 + e^-x). A number depends on two only.

#pragma once

#include "vectors.h"

#include <algorithm>

namespace loradeploy {

inline Floats gated(Floats gate, Floats up) { return gate / (1.0f + exponential(-gate)) * up; }

inline void multiply_gated(const float* gate, const float* up, float* result, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(result + i, gated(load(gate + i), load(up + i)));
  if (i == count) return;
  float rest[3][kLanes] = {};
  std::copy(gate + i, gate + count, rest[0]);
  std::copy(up + i, up + count, rest[1]);
  store(rest[2], gated(load(rest[0]), load(rest[1])));
  std::copy(rest[2], rest[2] + (count - i), result + i);
}

}  // namespace loradeploy
