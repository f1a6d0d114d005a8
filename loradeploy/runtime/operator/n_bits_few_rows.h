// Products of a few rows, such as a decode step, with weights of 4 or 8 bits: weights are unpacked
// into registers.
//
// The weights of a column are read in the order of the file. The sums of kLanes blocks, a unit, of
// four columns are one vector.

#pragma once

#include "n_bits.h"

#include <type_traits>

namespace loradeploy::n_bits {

constexpr int kVectors = kParts / kLanes;  // that hold the parts of four columns
constexpr int64_t kFewRows = 4;            // whose sums stay in registers
constexpr int64_t kAhead = 8192;           // bytes of weights that are fetched ahead

// Four columns of weights; columns beyond the last are the last.
template <typename Layout>
struct Group {
  Group(const Product& product, int64_t column) {
    for (int64_t at = 0; at < 4; ++at) {
      const int64_t own = std::min(column + at, product.out - 1);
      weights[at] = product.weights + own * product.blocks * Layout::block_bytes;
      scales[at] = product.scales + own * product.blocks;
      zero_points[at] =
          product.zero_points == nullptr ? nullptr : product.zero_points + own * product.zero_bytes;
    }
  }

  const uint8_t* unit_weights(int column, int64_t unit) const {
    return weights[column] + unit * kLanes * Layout::block_bytes;
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

  const uint8_t* weights[4];
  const float* scales[4];
  const uint8_t* zero_points[4];
};

#if defined(LORADEPLOY_DOT_PRODUCTS)

// A vector has four weights of each block and column. The integers of A are repeated for the columns.
template <typename Layout>
struct Unit {
  static constexpr int64_t integer_bytes = Layout::steps * kBytes;

  static void arrange(const uint8_t* integers, uint8_t* to) {
    for (int step = 0; step < Layout::steps; step += 4) {
      Integers four = lanes_at<Layout::block>(integers, step / 4, kLanes);
      if constexpr (Layout::bits == 4) four = evens_first(four);
      const Integers each[4] = {spread<0>(four), spread<1>(four), spread<2>(four), spread<3>(four)};
      for (int at = 0; at < 4; ++at) store(to + (step + at) * kBytes, each[at]);
    }
  }

  template <typename Lanes, int rows>
  static void multiply(const Group<Layout>& group, int64_t unit, Lanes lanes, const uint8_t* x,
                       int64_t row_bytes, Sum<Layout::bits> (&sums)[rows]) {
    const auto add = [&](Integers weights) {
      for (int at = 0; at < rows; ++at) sums[at].add(weights, load(x + at * row_bytes));
      x += kBytes;
    };
#pragma GCC unroll 8
    for (int piece = 0; piece < Layout::block_bytes / 16; ++piece) {
      Integers v[4];
      for (int column = 0; column < 4; ++column) {
        const uint8_t* own = group.unit_weights(column, unit);
        v[column] = lanes_at<Layout::block_bytes>(own, piece, lanes);
        __builtin_prefetch(own + kBytes * piece + kAhead);
      }
      transpose(v);
      for (Integers own : v) {
        if constexpr (Layout::bits == 4) {
          add(low_nibbles(own));
          add(high_nibbles(own));
        } else {
          add(without_offset(own));
        }
      }
    }
  }
};

#else

// A vector has weights of one column: of one block, or of kLanes blocks of 16 bytes. Its sums are
// added at the end.
template <typename Layout>
struct Unit {
  static constexpr int64_t integer_bytes = kLanes * Layout::block;
  static constexpr int parts = Layout::block_bytes == 16 ? 1 : kLanes;

  static void arrange(const uint8_t* integers, uint8_t* to) {
    if constexpr (Layout::bits == 8) {
      std::memcpy(to, integers, integer_bytes);
    } else {
      for (int at = 0; at < integer_bytes; at += 64) store_evens_first(integers + at, to + at);
    }
  }

  template <typename Lanes, int rows>
  static void multiply(const Group<Layout>& group, int64_t unit, Lanes lanes, const uint8_t* x,
                       int64_t row_bytes, Sum<Layout::bits> (&sums)[rows]) {
    Integers own_sums[rows][parts][4];
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      const uint8_t* weights = group.unit_weights(column, unit);
      for (int line = 0; line < kLanes * Layout::block_bytes; line += 64) {
        __builtin_prefetch(weights + line + kAhead);
      }
      Sum<Layout::bits> own[rows][parts];
      for (auto& row : own) {
        for (auto& part : row) part.begin(zeros());
      }
      const uint8_t* integers = x;
#pragma GCC unroll 2
      for (int part = 0; part < parts; ++part) {
        if (part >= lanes) break;
#pragma GCC unroll 4
        for (int at = 0; at < Layout::block_bytes * kLanes / parts; at += kBytes) {
          const Integers v = parts == 1 && lanes == 1 ? lower_lane(weights) : load(weights);
          for (int row = 0; row < rows; ++row) {
            const uint8_t* place = integers + row * row_bytes;
            if constexpr (Layout::bits == 4) {
              own[row][part].add(low_nibbles(v), load(place));
              own[row][part].add(high_nibbles(v), load(place + kBytes));
            } else {
              own[row][part].add(without_offset(v), load(place));
            }
          }
          weights += kBytes;
          integers += kBytes * 8 / Layout::bits;
        }
      }
      for (int row = 0; row < rows; ++row) {
        for (int part = 0; part < parts; ++part) {
          own[row][part].widen();
          own_sums[row][part][column] = own[row][part].total(zeros());
        }
      }
    }
    for (int row = 0; row < rows; ++row) {
      const Integers first = lane_sums(own_sums[row][0]);
      sums[row].sum = parts == 1 ? first : lanes_added(first, lane_sums(own_sums[row][parts - 1]));
    }
  }
};

#endif

inline int64_t units_of(const Product& product) { return (product.blocks + kLanes - 1) / kLanes; }
template <typename Layout>
constexpr int64_t unit_bytes = Unit<Layout>::integer_bytes + 2 * kBytes;
template <typename Layout>
int64_t few_row_bytes(const Product& product) {
  return units_of(product) * unit_bytes<Layout>;
}

// A unit of a quantized row has its integers, the starts of the sums of products, and the scales.
template <typename Layout>
void quantize_few(const Product& product, const float* x, uint8_t* to) {
  alignas(64) uint8_t integers[kLanes * Layout::block];
  const bool symmetric = product.zero_points == nullptr;
  const int64_t units = units_of(product), in = product.in;
  for (int64_t unit = 0; unit < units; ++unit, to += unit_bytes<Layout>) {
    int32_t* starts = reinterpret_cast<int32_t*>(to + Unit<Layout>::integer_bytes);
    float* scales = reinterpret_cast<float*>(to + Unit<Layout>::integer_bytes + kBytes);
    for (int64_t lane = 0; lane < kLanes; ++lane, starts += 4, scales += 4) {
      const int64_t first = (unit * kLanes + lane) * Layout::block;
      const int64_t count = std::clamp<int64_t>(in - first, 0, Layout::block);
      uint8_t* const own = integers + lane * Layout::block;
      std::fill_n(scales, 4, quantize_block<Layout::block>(x + (count ? first : 0), count, own));
      std::fill_n(starts, 4, Layout::start(own, symmetric));
    }
    Unit<Layout>::arrange(integers, to);
  }
}

// `rows` quantized rows from `row` on, and four columns.
template <typename Layout, bool has_zero_points, int rows>
void multiply_group(const Product& product, int64_t row, const uint8_t* x, int64_t column) {
  const Group<Layout> group(product, column);
  const int64_t row_bytes = few_row_bytes<Layout>(product);
  Floats sums[rows][kVectors];
  for (auto& own : sums) std::fill(own, own + kVectors, float_zeros());
  const auto add_unit = [&](int64_t unit, auto lanes) {
    const uint8_t* const starts_at = x + Unit<Layout>::integer_bytes;
    Integers starts[rows];
    Sum<Layout::bits> own[rows];
    for (int at = 0; at < rows; ++at) {
      starts[at] = load(starts_at + at * row_bytes);
      if constexpr (has_zero_points) {
        starts[at] = multiply_short(starts[at], group.unit_zero_points(unit, lanes));
      }
      own[at].begin(starts[at]);
    }
    Unit<Layout>::multiply(group, unit, lanes, x, row_bytes, own);
    const Floats scales = group.unit_scales(unit, lanes);
    for (int at = 0; at < rows; ++at) {
      const Floats scale = load_floats(starts_at + kBytes + at * row_bytes);
      Floats& sum = sums[at][unit % kVectors];
      sum = multiply_add(to_floats(own[at].total(starts[at])), multiply(scales, scale), sum);
    }
    x += unit_bytes<Layout>;
  };
  const int64_t whole = product.blocks / kLanes;
  for (int64_t unit = 0; unit < whole; ++unit) add_unit(unit, std::integral_constant<int, kLanes>());
  if (product.blocks % kLanes) add_unit(whole, static_cast<int>(product.blocks % kLanes));
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
