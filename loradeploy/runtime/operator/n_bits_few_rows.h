// Products of a few rows, such as a decode step, with weights of 4 or 8 bits: weights are unpacked
// into registers.
//
// A vector holds kLanes blocks, a unit, of four columns: the weights of a column are read in the
// order of the file. The integers of A are repeated for the columns.

#pragma once

#include "n_bits.h"

namespace loradeploy::n_bits {

constexpr int kVectors = kParts / kLanes;  // that hold the parts of four columns
constexpr int64_t kFewRows = 4;            // whose sums stay in registers
constexpr int64_t kAhead = 8192;           // bytes of weights that are fetched ahead

inline int64_t units_of(const Product& product) { return (product.blocks + kLanes - 1) / kLanes; }
template <typename Layout>
constexpr int64_t unit_bytes = (Layout::steps + 2) * kBytes;
template <typename Layout>
int64_t few_row_bytes(const Product& product) {
  return units_of(product) * unit_bytes<Layout>;
}

// Quantized rows are [unit][step]: four integers of each lane's block, once for every column; then
// the start of the sums of products, and the scales.
template <typename Layout>
void quantize_few(const Product& product, const float* x, uint8_t* to) {
  alignas(64) uint8_t bytes[kLanes * Layout::block];
  const bool symmetric = product.zero_points == nullptr;
  const Integers middle = all_bytes(symmetric ? 1 << (Layout::bits - 1) : 1);
  const Integers kept = all_integers(symmetric ? -1 : 0xffff);
  const int64_t units = units_of(product), in = product.in;
  for (int64_t unit = 0; unit < units; ++unit, to += unit_bytes<Layout>) {
    float* scales = reinterpret_cast<float*>(to + (Layout::steps + 1) * kBytes);
    for (int64_t lane = 0; lane < kLanes; ++lane, scales += 4) {
      const int64_t first = (unit * kLanes + lane) * Layout::block;
      const int64_t count = std::clamp<int64_t>(in - first, 0, Layout::block);
      const float scale =
          quantize_block<Layout::block>(x + (count ? first : 0), count, bytes + lane * Layout::block);
      scales[0] = scales[1] = scales[2] = scales[3] = scale;
    }
    Integers sums[2] = {zeros(), zeros()};
    for (int step = 0; step < Layout::steps; step += 4) {
      Integers four = lanes_at<Layout::block>(bytes, step / 4, kLanes);
      if constexpr (Layout::bits == 4) four = evens_first(four);
      const Integers each[4] = {spread<0>(four), spread<1>(four), spread<2>(four), spread<3>(four)};
      for (int at = 0; at < 4; ++at) {
        store(to + (step + at) * kBytes, each[at]);
        sums[at % 2] = dot<8>(sums[at % 2], middle, each[at]);
      }
    }
    const Integers negative = subtract(subtract(zeros(), sums[0]), sums[1]);
    store(to + Layout::steps * kBytes, and_bits(negative, kept));
  }
}

// Four columns of weights; columns beyond the last are the last.
template <typename Layout>
struct Group {
  Group(const Product& product, int64_t column) : blocks(product.blocks) {
    for (int64_t at = 0; at < 4; ++at) {
      const int64_t own = std::min(column + at, product.out - 1);
      weights[at] = product.weights + own * product.blocks * Layout::block_bytes;
      scales[at] = product.scales + own * product.blocks;
      zero_points[at] =
          product.zero_points == nullptr ? nullptr : product.zero_points + own * product.zero_bytes;
    }
  }

  // Calls act(unit, lanes) for each unit: the last one may have fewer blocks than lanes.
  template <typename Act>
  void units(const Act& act) const {
    const int64_t whole = blocks / kLanes;
    for (int64_t unit = 0; unit < whole; ++unit) act(unit, kLanes);
    if (blocks % kLanes) act(whole, static_cast<int>(blocks % kLanes));
  }
  // Calls act(weights) for each step of the unit.
  template <typename Act>
  void steps(int64_t unit, int lanes, const Act& act) const {
#pragma GCC unroll 8
    for (int piece = 0; piece < Layout::block_bytes / 16; ++piece) {
      Integers v[4];
      for (int column = 0; column < 4; ++column) {
        const uint8_t* own = weights[column] + unit * kLanes * Layout::block_bytes;
        v[column] = lanes_at<Layout::block_bytes>(own, piece, lanes);
        __builtin_prefetch(own + kBytes * piece + kAhead);
      }
      transpose(v);
      for (Integers own : v) {
        if constexpr (Layout::bits == 4) {
          act(low_nibbles(own));
          act(high_nibbles(own));
        } else {
          act(own);
        }
      }
    }
  }
  Floats unit_scales(int64_t unit, int lanes) const {
    const float* own[4];
    for (int column = 0; column < 4; ++column) own[column] = scales[column] + unit * kLanes;
    return scales_at(own, lanes);
  }
  Integers unit_zero_points(int64_t unit, int lanes) const {
    alignas(64) int32_t all[4 * kLanes] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t block = unit * kLanes + lane;
      for (int column = 0; column < 4; ++column) {
        all[4 * lane + column] = Layout::zero_point(zero_points[column], block);
      }
    }
    return load(all);
  }

  int64_t blocks;
  const uint8_t* weights[4];
  const float* scales[4];
  const uint8_t* zero_points[4];
};

// `rows` quantized rows from `row` on, and four columns.
template <typename Layout, bool has_zero_points, int rows>
void multiply_group(const Product& product, int64_t row, const uint8_t* x, int64_t column) {
  const Group<Layout> group(product, column);
  const int64_t row_bytes = few_row_bytes<Layout>(product);
  Floats sums[rows][kVectors];
  for (auto& own : sums) std::fill(own, own + kVectors, float_zeros());
  group.units([&](int64_t unit, int lanes) {
    Integers own[rows];
    for (int at = 0; at < rows; ++at) {
      own[at] = load(x + at * row_bytes + Layout::steps * kBytes);
      if constexpr (has_zero_points) {
        own[at] = multiply_short(own[at], group.unit_zero_points(unit, lanes));
      }
    }
    const uint8_t* next = x;
    group.steps(unit, lanes, [&](Integers weights) {
      for (int at = 0; at < rows; ++at) {
        own[at] = dot<Layout::bits>(own[at], weights, load(next + at * row_bytes));
      }
      next += kBytes;
    });
    const Floats scales = group.unit_scales(unit, lanes);
    for (int at = 0; at < rows; ++at) {
      const Floats scale = load_floats(next + kBytes + at * row_bytes);
      Floats& sum = sums[at][unit % kVectors];
      sum = multiply_add(to_floats(own[at]), multiply(scales, scale), sum);
    }
    x += unit_bytes<Layout>;
  });
  for (int at = 0; at < rows; ++at) {
    float values[4];
    store_sum(values, sums[at]);
    store_columns(product, row + at, column, values, 4);
  }
}

// Up to kFewRows rows, and the columns begin…end.
template <typename Layout, bool has_zero_points>
void multiply_few(const Product& product, int64_t row, int64_t rows, const uint8_t* x, int64_t begin,
                  int64_t end) {
  using Multiply = void (*)(const Product&, int64_t, const uint8_t*, int64_t);
  static constexpr Multiply of[kFewRows] = {
      multiply_group<Layout, has_zero_points, 1>, multiply_group<Layout, has_zero_points, 2>,
      multiply_group<Layout, has_zero_points, 3>, multiply_group<Layout, has_zero_points, 4>};
  for (int64_t column = begin; column < end; column += 4) of[rows - 1](product, row, x, column);
}

}  // namespace loradeploy::n_bits
