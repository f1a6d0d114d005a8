// Products of many rows, such as a prompt, with weights of 4 or 8 bits: a panel of weights is unpacked
// once for the rows of a task.
//
// A vector holds one block of kVectorColumns columns. The integers of A are read four at a time and
// spread over the vector, so that a tile of rows stays in the first cache.

#pragma once

#include "n_bits.h"

#include <array>
#include <utility>

namespace loradeploy::n_bits {

constexpr int kVectorColumns = 4 * kLanes;
constexpr int kPanelColumns = kTileVectors * kVectorColumns;
constexpr int64_t kSmallestBlock = 32;
constexpr int64_t kPanelBytes = 24576;  // unpacked weights that stay in the first cache
constexpr int64_t kPanelBlocks = kPanelBytes / (kSmallestBlock * kPanelColumns);
constexpr int64_t kManyRows = 96;         // the largest number of rows of a task

// A quantized row: the integers of all blocks, then of each block the scale, then the start of the
// sums of products.
inline int64_t integer_bytes(const Product& product) {
  return (product.blocks * product.block + kBytes - 1) / kBytes * kBytes;
}
inline int64_t many_row_bytes(const Product& product) {
  return integer_bytes(product) + (product.blocks * 8 + kBytes - 1) / kBytes * kBytes;
}

template <typename Layout>
void quantize_many(const Product& product, const float* x, uint8_t* to) {
  const int64_t bytes = integer_bytes(product);
  float* const scales = reinterpret_cast<float*>(to + bytes);
  int32_t* const starts = reinterpret_cast<int32_t*>(scales + product.blocks);
  const bool symmetric = product.zero_points == nullptr;
  for (int64_t block = 0; block < product.blocks; ++block) {
    const int64_t first = block * Layout::block;
    const int64_t count = std::min<int64_t>(product.in - first, Layout::block);
    scales[block] = quantize_block<Layout::block>(x + first, count, to + first);
    starts[block] = Layout::start(to + first, symmetric);
  }
  std::fill(to + product.blocks * Layout::block, to + bytes, uint8_t{0});
  if constexpr (Layout::bits == 4) {
    for (int64_t at = 0; at < bytes; at += kBytes) store(to + at, evens_first(load(to + at)));
  }
}

// Weights of kPanelColumns columns in the order in which they are multiplied.
struct Panel {
  alignas(64) uint8_t weights[kPanelBytes];  // [block][step][vector]
  Floats scales[kPanelBlocks][kTileVectors];
  Integers zero_points[kPanelBlocks][kTileVectors];
};

// 16 bytes at `from` of each column of a vector, four after four.
inline void transposed(const uint8_t* const (&columns)[kVectorColumns], int64_t from,
                       Integers (&v)[4]) {
  for (int column = 0; column < 4; ++column) v[column] = every_fourth(columns + column, from);
  transpose(v);
}

// The panel of the columns from `column` on and of some blocks; columns after the last are the last.
template <typename Layout, bool has_zero_points>
void unpack(const Product& product, int64_t column, int64_t first, int64_t blocks, Panel& panel) {
  for (int vector = 0; vector < kTileVectors; ++vector) {
    const uint8_t* weights[kVectorColumns];
    const uint8_t* scales[kVectorColumns];
    const uint8_t* zero_points[kVectorColumns];
    for (int at = 0; at < kVectorColumns; ++at) {
      const int64_t own = std::min(column + vector * kVectorColumns + at, product.out - 1);
      weights[at] = product.weights + (own * product.blocks + first) * Layout::block_bytes;
      scales[at] = reinterpret_cast<const uint8_t*>(product.scales + own * product.blocks + first);
      if constexpr (has_zero_points) zero_points[at] = product.zero_points + own * product.zero_bytes;
    }
    uint8_t* to = panel.weights + vector * kBytes;
    const auto put = [&](Integers step) {
      store(to, step);
      to += kTileVectors * kBytes;
    };
    for (int64_t from = 0; from < blocks * Layout::block_bytes; from += 16) {
      Integers v[4];
      transposed(weights, from, v);
      for (Integers own : v) {
        if constexpr (Layout::bits == 4) {
          put(low_nibbles(own));
          put(high_nibbles(own));
        } else {
          put(without_offset(own));
        }
      }
    }
    int64_t block = 0;
    for (; block + 4 <= blocks; block += 4) {
      Integers v[4];
      transposed(scales, block * 4, v);
      for (int at = 0; at < 4; ++at) store(&panel.scales[block + at][vector], v[at]);
    }
    for (; block < blocks; ++block) {
      auto* own = reinterpret_cast<uint8_t*>(&panel.scales[block][vector]);
      for (int at = 0; at < kVectorColumns; ++at) std::memcpy(own + 4 * at, scales[at] + block * 4, 4);
    }
    if constexpr (has_zero_points) {
      for (block = 0; block < blocks; ++block) {
        alignas(64) int32_t all[kVectorColumns];
        const int64_t own = first + block;
        for (int at = 0; at < kVectorColumns; ++at) {
          all[at] = Layout::zero_point(zero_points[at], own);
        }
        panel.zero_points[block][vector] = load(all);
      }
    }
  }
}

// The parts of a row's sums.
using Sums = Floats[kParts][kTileVectors];

// Adds the products of `rows` quantized rows and the blocks of a panel; `first`: its first block.
template <typename Layout, bool has_zero_points, int rows>
void multiply_tile(const Product& product, const Panel& panel, int64_t first, int64_t blocks,
                   const uint8_t* x, Sums* sums) {
  const int64_t row_bytes = many_row_bytes(product), scales_at = integer_bytes(product);
  const uint8_t* weights = panel.weights;
  const uint8_t* four = x + first * Layout::block;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* const scales = x + scales_at + (first + block) * 4;
    const uint8_t* const starts = scales + product.blocks * 4;
    const auto start = [&](int row, int vector) {
      const Integers own = spread_integer(starts + row * row_bytes);
      return has_zero_points ? multiply_short(own, panel.zero_points[block][vector]) : own;
    };
    Sum<Layout::bits> own[rows][kTileVectors];
    for (int row = 0; row < rows; ++row) {
      for (int vector = 0; vector < kTileVectors; ++vector) {
        own[row][vector].begin(start(row, vector));
      }
    }
    for (int step = 0; step < Layout::steps; step += 8) {
// Unrolled, or sums are copied at each step (gcc 12).
#pragma GCC unroll 8
      for (int at = 0; at < 8; ++at, weights += kTileVectors * kBytes, four += 4) {
        Integers w[kTileVectors];
        for (int vector = 0; vector < kTileVectors; ++vector) {
          w[vector] = in_register(load(weights + vector * kBytes));
        }
        for (int row = 0; row < rows; ++row) {
          const Integers integers = spread_integer(four + row * row_bytes);
          for (int vector = 0; vector < kTileVectors; ++vector) {
            own[row][vector].add(w[vector], integers);
          }
        }
      }
      for (auto& sums_of_row : own) {
        for (auto& sum : sums_of_row) sum.widen();
      }
    }
    for (int row = 0; row < rows; ++row) {
      const Floats scale = spread_float(scales + row * row_bytes);
      for (int vector = 0; vector < kTileVectors; ++vector) {
        Floats& sum = sums[row][(first + block) % kParts][vector];
        sum = multiply_add(to_floats(own[row][vector].total(start(row, vector))),
                           multiply(panel.scales[block][vector], scale), sum);
      }
    }
    // The sums stay in memory: registers are for integers.
    asm volatile("" : : : "memory");
  }
}

using Tile = void (*)(const Product&, const Panel&, int64_t, int64_t, const uint8_t*, Sums*);
template <typename Layout, bool has_zero_points, int... at>
constexpr std::array<Tile, sizeof...(at)> tiles_of(std::integer_sequence<int, at...>) {
  return {multiply_tile<Layout, has_zero_points, at + 1>...};
}

// Writes the sums of `rows` rows from `row` on to kPanelColumns columns of the result.
inline void store_rows(const Product& product, int64_t row, int64_t rows, int64_t column,
                       const Sums* sums) {
  for (int64_t at = 0; at < rows; ++at) {
    float values[kPanelColumns];
    for (int vector = 0; vector < kTileVectors; ++vector) {
      const Floats sum = add(add(sums[at][0][vector], sums[at][1][vector]),
                             add(sums[at][2][vector], sums[at][3][vector]));
      store_floats(values + vector * kVectorColumns, sum);
    }
    store_columns(product, row + at, column, values, kPanelColumns);
  }
}

// Fetches the lines that store_rows will write: the rows of a prompt's result are far from each other.
inline void prefetch_rows(const Product& product, int64_t row, int64_t rows, int64_t column) {
  const int64_t columns = std::min<int64_t>(kPanelColumns, product.out - column);
  for (int64_t at = 0; at < rows; ++at) {
    const float* const place = product.result + (row + at) * product.out + column;
    for (int64_t line = 0; line < columns; line += 16) __builtin_prefetch(place + line, 1);
  }
}

// `rows` rows from `row` on, whose quantized values are `x`, and kPanelColumns columns.
template <typename Layout, bool has_zero_points>
void multiply_panel(const Product& product, int64_t row, int64_t rows, const uint8_t* x,
                    int64_t column) {
  static constexpr auto tiles =
      tiles_of<Layout, has_zero_points>(std::make_integer_sequence<int, kTileRows<Layout::bits>>());
  constexpr int64_t most = kPanelBytes / (Layout::block * kPanelColumns);
  Panel panel;
  Sums sums[kManyRows];
  for (int64_t first = 0; first < product.blocks; first += most) {
    const int64_t blocks = std::min(most, product.blocks - first);
    const bool is_last = first + blocks == product.blocks;
    unpack<Layout, has_zero_points>(product, column, first, blocks, panel);
    constexpr int64_t tile = kTileRows<Layout::bits>;
    for (int64_t at = 0, left = (rows + tile - 1) / tile; left > 0; --left) {
      const int64_t own = (rows - at + left - 1) / left;
      Sums* const own_sums = sums + (blocks == product.blocks ? 0 : at);
      if (first == 0) {
        for (int64_t of = 0; of < own; ++of) {
          for (auto& part : own_sums[of]) std::fill(part, part + kTileVectors, float_zeros());
        }
      }
      if (is_last) prefetch_rows(product, row + at, own, column);
      tiles[own - 1](product, panel, first, blocks, x + at * many_row_bytes(product), own_sums);
      if (is_last) store_rows(product, row + at, own, column, own_sums);
      at += own;
    }
  }
}

// Up to kManyRows rows, and the columns begin…end.
template <typename Layout, bool has_zero_points>
void multiply_many(const Product& product, int64_t row, int64_t rows, const uint8_t* x,
                   int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; column += kPanelColumns) {
    multiply_panel<Layout, has_zero_points>(product, row, rows, x, column);
  }
}

}  // namespace loradeploy::n_bits
