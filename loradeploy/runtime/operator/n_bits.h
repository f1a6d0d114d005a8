// What products of few and of many rows with weights of 4 or 8 bits share.
//
// Each block of a row of A is rounded to integers of 8 bits, scaled by its largest magnitude / 127.
// Each number of the result is computed in a fixed order: the exact integer sum of a block, then the
// sum over every fourth block in four parts, (0 + 1) + (2 + 3). So the result of a row does not
// depend on other rows, on the number of threads or on the width of vectors.

#pragma once

#include "integer_vectors.h"

#include <algorithm>
#include <limits>

namespace loradeploy::n_bits {

constexpr int kBytes = 16 * kLanes;  // of a vector
constexpr int kParts = 4;            // sums over every fourth block

// A call, whose sizes were checked.
struct Product {
  const float* x;
  const uint8_t* weights;      // [out, blocks, block_bytes]
  const float* scales;         // [out, blocks]
  const uint8_t* zero_points;  // [out, zero_bytes], or null: the middle of the range
  float* result;
  int64_t in, out, block, blocks, zero_bytes;
};

// The layout of weights: `block` inputs of a column are `block_bytes` bytes with one scale. A step
// multiplies four of them.
template <int bits_, int block_>
struct Layout {
  static constexpr int bits = bits_, block = block_;
  static constexpr int block_bytes = block * bits / 8;
  static constexpr int steps = block / 4;
  static constexpr int offset = bits == 8 ? kOffset : 0;  // what weights are multiplied without

  // The zero point of a block, from those of its column.
  static int32_t zero_point(const uint8_t* column, int64_t at) {
    return (bits == 8 ? column[at] : column[at / 2] >> at % 2 * 4 & 15) - offset;
  }

  // Where the sum of the products of a block begins, if all zero points are the middle of the range;
  // or its factor of 16 bits, by which each zero point is multiplied.
  static int32_t start(const uint8_t* integers, bool symmetric) {
    const int32_t sum = sum_of_bytes(integers, block);
    return symmetric ? -sum * ((1 << (bits - 1)) - offset) : -sum & 0xffff;
  }
};

// Quantizes the `count` numbers that a block has, and returns their scale.
template <int block>
float quantize_block(const float* x, int64_t count, uint8_t* result) {
  alignas(64) float padded[block];
  if (count < block) {
    std::fill(std::copy(x, x + count, padded), padded + block, 0.0f);
    x = padded;
  }
  const float most = largest(x, block);
  const float factor = 127.0f / most;
  // All are zero, or too small for a factor; or one is infinite or not a number, and so is the row.
  if (!(factor > 0 && factor <= std::numeric_limits<float>::max())) {
    std::memset(result, 0, block);
    return most - most;
  }
  round_to_bytes(x, block, factor, result);
  return most / 127.0f;
}

inline void store_columns(const Product& product, int64_t row, int64_t column, const float* values,
                   int64_t count) {
  count = std::min(count, product.out - column);
  std::memcpy(product.result + row * product.out + column, values, count * sizeof(float));
}

}  // namespace loradeploy::n_bits
