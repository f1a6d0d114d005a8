// The operator loradeploy.MatMulNBits: A Bᵀ with weights of 4 or 8 bits, as the operator of the same
// name of com.microsoft computes it with accuracy_level 4, on the CPU.
//
//   A            float [.., K]
//   B            uint8 [N, blocks, block_size bits / 8]   the low bits first; blocks = ⌈K / block_size⌉
//   scales       float [N, blocks] or [N blocks]
//   zero_points  uint8 [N, ⌈blocks bits / 8⌉], or flat; optional: else the middle of the range
//   → float [.., N]
//
// Each block of a row of A is rounded to integers of 8 bits, scaled by its largest magnitude / 127.
// The weights are read where they are: no copy in another order is kept.
//
// Each number of the result is computed in a fixed order: the exact integer sum of a block, then the
// sum over every fourth block in four parts. So the result of a row does not depend on other rows,
// on the number of threads or on the width of vectors.
//
// Vectors hold kLanes blocks of four columns, so that sums need not be moved between columns; the
// integers of A are repeated for the columns.

#include "integer_vectors.h"
#include "kernel.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

namespace loradeploy {

#if defined(LORADEPLOY_INTEGER_VECTORS)
namespace {

constexpr int kBytes = 16 * kLanes;         // of a vector
constexpr int kParts = 4;                   // sums over every fourth block
constexpr int kVectors = kParts / kLanes;   // that hold these sums of four columns
constexpr int kGroups = 4;                  // groups of four columns in a panel
constexpr int kColumns = 4 * kGroups;
constexpr int64_t kSmallestBlock = 32, kLargestBlock = 128;
constexpr int64_t kPanelBytes = 16384;      // unpacked weights that stay in the first cache
constexpr int64_t kPanelUnits = kPanelBytes / (kGroups * kSmallestBlock / 4 * kBytes);
constexpr int64_t kTaskRows = 72;           // the largest number of rows of a task
constexpr int64_t kAhead = 8192;            // bytes of weights that are fetched ahead
constexpr int64_t kDirectRows = 4;          // up to which weights are unpacked into registers
constexpr int64_t kQuantizedBytes = 4 << 20;  // rows that are quantized before they are multiplied
constexpr int64_t kTaskProducts = 1 << 19;  // multiplications of a task, if there are enough

// A call, whose sizes were checked. A unit is kLanes blocks.
struct Product {
  const float* x;
  const uint8_t* weights;      // [out, blocks, block_bytes]
  const float* scales;         // [out, blocks]
  const uint8_t* zero_points;  // [out, zero_bytes], or null: the middle of the range
  float* result;
  int64_t in, out, block, blocks, zero_bytes;

  int64_t units() const { return (blocks + kLanes - 1) / kLanes; }
  int64_t steps() const { return block / 4; }
  int64_t unit_bytes() const { return (steps() + 2) * kBytes; }
  int64_t row_bytes() const { return units() * unit_bytes(); }
};

// The layout of weights: `block` inputs of a column are `block_bytes` bytes with one scale.
template <int bits_, int block_>
struct Layout {
  static constexpr int bits = bits_, block = block_;
  static constexpr int block_bytes = block * bits / 8;
  static constexpr int steps = block / 4;  // of a unit: 16 bytes of each lane
  static constexpr int unit_bytes = (steps + 2) * kBytes;
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

// Quantized rows are [unit][step]: four integers of each lane's block, once for every column; then
// the start of the sums of products, and the scales.
template <typename Layout>
void quantize_row(const Product& product, const float* x, uint8_t* to) {
  alignas(64) uint8_t bytes[kLanes * Layout::block];
  const bool symmetric = product.zero_points == nullptr;
  const Integers middle = all_bytes(symmetric ? 1 << (Layout::bits - 1) : 1);
  const Integers kept = all_integers(symmetric ? -1 : 0xffff);
  const int64_t units = product.units(), in = product.in;
  for (int64_t unit = 0; unit < units; ++unit, to += Layout::unit_bytes) {
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
      Integers four = lanes_at<Layout::block>(bytes + 4 * step, kLanes);
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
  void units(int64_t first, int64_t count, const Act& act) const {
    const int64_t whole = std::min(first + count, blocks / kLanes);
    for (int64_t unit = first; unit < whole; ++unit) act(unit, kLanes);
    if (whole < first + count) act(whole, static_cast<int>(blocks % kLanes));
  }
  // Calls act(weights) for each step of the unit.
  template <typename Act>
  void steps(int64_t unit, int lanes, const Act& act) const {
#pragma GCC unroll 8
    for (int piece = 0; piece < Layout::block_bytes / 16; ++piece) {
      Integers v[4];
      for (int column = 0; column < 4; ++column) {
        const uint8_t* own = weights[column] + unit * kLanes * Layout::block_bytes + 16 * piece;
        v[column] = lanes_at<Layout::block_bytes>(own, lanes);
        __builtin_prefetch(weights[column] + unit * kLanes * Layout::block_bytes + kBytes * piece +
                           kAhead);
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
        all[4 * lane + column] = Layout::bits == 8
                                     ? zero_points[column][block]
                                     : zero_points[column][block / 2] >> block % 2 * 4 & 15;
      }
    }
    return load(all);
  }

  int64_t blocks;
  const uint8_t* weights[4];
  const float* scales[4];
  const uint8_t* zero_points[4];
};

// Weights of kColumns columns in the order in which they are multiplied.
struct Panel {
  alignas(64) uint8_t weights[kPanelBytes];  // [unit][step][group]
  Floats scales[kPanelUnits][kGroups];
  Integers zero_points[kPanelUnits][kGroups];
};

template <typename Layout, bool has_zero_points>
void unpack(const Product& product, int64_t column, int64_t first, int64_t units, Panel& panel) {
  for (int64_t at = 0; at < kGroups; ++at) {
    const Group<Layout> group(product, column + 4 * at);
    uint8_t* to = panel.weights + at * kBytes;
    group.units(first, units, [&](int64_t unit, int lanes) {
      uint8_t* own = to;
      group.steps(unit, lanes, [&](Integers weights) {
        store(own, weights);
        own += kGroups * kBytes;
      });
      to += Layout::steps * kGroups * kBytes;
      panel.scales[unit - first][at] = group.unit_scales(unit, lanes);
      if constexpr (has_zero_points) {
        panel.zero_points[unit - first][at] = group.unit_zero_points(unit, lanes);
      }
    });
  }
}

using Sums = Floats[kVectors][kGroups];

// Adds the products of `rows` quantized rows and a panel; `first`: its first unit.
template <int bits, bool has_zero_points, int rows>
void multiply_tile(const Product& product, const Panel& panel, int64_t first, int64_t units,
                   const uint8_t* x, Sums* sums) {
  const int64_t row_bytes = product.row_bytes(), steps = product.steps();
  x += first * product.unit_bytes();
  const uint8_t* weights = panel.weights;
  for (int64_t unit = 0; unit < units; ++unit) {
    Integers own[rows][kGroups];
    for (int row = 0; row < rows; ++row) {
      const Integers start = load(x + row * row_bytes + steps * kBytes);
      for (int group = 0; group < kGroups; ++group) {
        own[row][group] = has_zero_points
                              ? multiply_short(start, panel.zero_points[unit][group])
                              : start;
      }
    }
    const uint8_t* const end = x + steps * kBytes;
    do {
// Unrolled, or sums are copied at each step (gcc 12).
#pragma GCC unroll 8
      for (int step = 0; step < 8; ++step, weights += kGroups * kBytes, x += kBytes) {
        Integers w[kGroups];
        for (int group = 0; group < kGroups; ++group) w[group] = load(weights + group * kBytes);
        for (int row = 0; row < rows; ++row) {
          const Integers four = load(x + row * row_bytes);
          for (int group = 0; group < kGroups; ++group) {
            own[row][group] = dot<bits>(own[row][group], w[group], four);
          }
        }
      }
    } while (x < end);
    x += kBytes;
    for (int row = 0; row < rows; ++row) {
      const Floats scale = load_floats(x + row * row_bytes);
      for (int group = 0; group < kGroups; ++group) {
        Floats& sum = sums[row][(first + unit) % kVectors][group];
        sum = multiply_add(to_floats(own[row][group]),
                           multiply(panel.scales[unit][group], scale), sum);
      }
    }
    x += kBytes;
    // The sums stay in memory: registers are for integers.
    asm volatile("" : : : "memory");
  }
}

template <int bits, bool has_zero_points>
void multiply_rows(const Product& product, const Panel& panel, int64_t first, int64_t units,
                   int64_t rows, const uint8_t* x, Sums* sums) {
  using Tile = void (*)(const Product&, const Panel&, int64_t, int64_t, const uint8_t*, Sums*);
  static constexpr Tile tiles[] = {
      multiply_tile<bits, has_zero_points, 1>,
      multiply_tile<bits, has_zero_points, 2>,
      multiply_tile<bits, has_zero_points, std::min(3, kTileRows)>,
      multiply_tile<bits, has_zero_points, std::min(4, kTileRows)>,
      multiply_tile<bits, has_zero_points, std::min(5, kTileRows)>,
      multiply_tile<bits, has_zero_points, std::min(6, kTileRows)>,
  };
  for (int64_t left = (rows + kTileRows - 1) / kTileRows; left > 0; --left) {
    const int64_t own = (rows + left - 1) / left;
    tiles[own - 1](product, panel, first, units, x, sums);
    x += own * product.row_bytes();
    sums += own;
    rows -= own;
  }
}

void store_columns(const Product& product, int64_t row, int64_t column, const float* values,
                   int64_t count) {
  count = std::min(count, product.out - column);
  std::memcpy(product.result + row * product.out + column, values, count * sizeof(float));
}

// Rows from `row` on, whose quantized values are `x`, and kColumns columns.
template <typename Layout, bool has_zero_points>
void multiply_panel(const Product& product, int64_t row, int64_t rows, const uint8_t* x,
                    int64_t column) {
  Panel panel;
  Sums sums[kTaskRows];
  for (int64_t at = 0; at < rows; ++at) {
    for (auto& vectors : sums[at]) std::fill(vectors, vectors + kGroups, float_zeros());
  }
  constexpr int64_t most = kPanelBytes / (kGroups * Layout::steps * kBytes);
  for (int64_t first = 0; first < product.units(); first += most) {
    const int64_t units = std::min(most, product.units() - first);
    unpack<Layout, has_zero_points>(product, column, first, units, panel);
    multiply_rows<Layout::bits, has_zero_points>(product, panel, first, units, rows, x, sums);
  }
  for (int64_t at = 0; at < rows; ++at) {
    float values[kColumns];
    for (int group = 0; group < kGroups; ++group) {
      Floats parts[kVectors];
      for (int part = 0; part < kVectors; ++part) parts[part] = sums[at][part][group];
      store_sum(values + 4 * group, parts);
    }
    store_columns(product, row + at, column, values, kColumns);
  }
}

// The same for few rows and four columns, without a panel.
template <typename Layout, bool has_zero_points, int rows>
void multiply_group(const Product& product, int64_t row, const uint8_t* x, int64_t column) {
  const Group<Layout> group(product, column);
  const int64_t row_bytes = product.row_bytes();
  Floats sums[rows][kVectors];
  for (auto& own : sums) std::fill(own, own + kVectors, float_zeros());
  group.units(0, product.units(), [&](int64_t unit, int lanes) {
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
    x += Layout::unit_bytes;
  });
  for (int at = 0; at < rows; ++at) {
    float values[4];
    store_sum(values, sums[at]);
    store_columns(product, row + at, column, values, 4);
  }
}

template <typename Layout, bool has_zero_points>
void multiply(const Product& product, int64_t row, int64_t rows, const uint8_t* x, int64_t begin,
              int64_t end) {
  using Direct = void (*)(const Product&, int64_t, const uint8_t*, int64_t);
  static constexpr Direct direct[kDirectRows] = {
      multiply_group<Layout, has_zero_points, 1>, multiply_group<Layout, has_zero_points, 2>,
      multiply_group<Layout, has_zero_points, 3>, multiply_group<Layout, has_zero_points, 4>};
  if (rows <= kDirectRows) {
    for (int64_t at = begin; at < end; at += 4) direct[rows - 1](product, row, x, at);
  } else {
    for (int64_t at = begin; at < end; at += kColumns) {
      multiply_panel<Layout, has_zero_points>(product, row, rows, x, at);
    }
  }
}

struct Freed {
  void operator()(uint8_t* bytes) const { ::operator delete[](bytes, std::align_val_t(64)); }
};

// All rows; parallel(count, act) runs act(0), …, act(count - 1).
template <typename Layout, typename Parallel>
void multiply_all(const Product& product, int64_t rows, const Parallel& parallel) {
  const int64_t row_bytes = product.row_bytes();
  const int64_t most = std::min(
      rows, std::max(kQuantizedBytes / row_bytes / kTaskRows, int64_t{1}) * kTaskRows);
  const std::unique_ptr<uint8_t[], Freed> quantized(
      static_cast<uint8_t*>(::operator new[](most * row_bytes, std::align_val_t(64))));
  uint8_t* const x = quantized.get();
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t own = std::min(most, rows - first);
    const int64_t together = std::max<int64_t>(1, (1 << 14) / product.in);
    parallel((own + together - 1) / together, [&](size_t task) {
      const int64_t begin = task * together, end = std::min(begin + together, own);
      for (int64_t row = begin; row < end; ++row) {
        quantize_row<Layout>(product, product.x + (first + row) * product.in, x + row * row_bytes);
      }
    });
    const int64_t row_tasks = (own + kTaskRows - 1) / kTaskRows;
    const int64_t task_rows = (own + row_tasks - 1) / row_tasks;
    const int64_t wide = kTaskProducts / (task_rows * product.in);
    const int64_t columns = std::max<int64_t>(1, wide / kColumns) * kColumns;
    const int64_t column_tasks = (product.out + columns - 1) / columns;
    parallel(row_tasks * column_tasks, [&](size_t task) {
      const int64_t row = task / column_tasks * task_rows;
      const int64_t begin = task % column_tasks * columns;
      const int64_t end = std::min(begin + columns, product.out);
      const int64_t count = std::min(task_rows, own - row);
      if (product.zero_points == nullptr) {
        multiply<Layout, false>(product, first + row, count, x + row * row_bytes, begin, end);
      } else {
        multiply<Layout, true>(product, first + row, count, x + row * row_bytes, begin, end);
      }
    });
  }
}

using Function = void (*)(const Product&, int64_t rows, const Call&);

template <int bits, int block>
void multiply_call(const Product& product, int64_t rows, const Call& call) {
  multiply_all<Layout<bits, block>>(product, rows, [&](size_t count, const auto& act) {
    if (count > 1) {
      call.parallel(count, act);
    } else {
      act(0);
    }
  });
}

struct Variant {
  int64_t bits, block;
  Function multiply;
};
constexpr Variant kVariants[] = {
    {4, 32, multiply_call<4, 32>}, {4, 64, multiply_call<4, 64>}, {4, 128, multiply_call<4, 128>},
    {8, 32, multiply_call<8, 32>}, {8, 64, multiply_call<8, 64>}, {8, 128, multiply_call<8, 128>},
};

class MatMulNBits {
 public:
  static constexpr const char* name = "MatMulNBits";
  static constexpr Value inputs[] = {{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                     {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
                                     {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                     {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, true}};
  static constexpr Value outputs[] = {{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}};

  explicit MatMulNBits(const Node& node)
      : in_(node.integer("K")),
        out_(node.integer("N")),
        bits_(node.integer("bits", 4)),
        block_(node.integer("block_size")) {
    if (in_ < 1 || out_ < 1) {
      throw Refused("K is " + std::to_string(in_) + " and N is " + std::to_string(out_));
    }
    for (const Variant& variant : kVariants) {
      if (variant.bits == bits_ && variant.block == block_) multiply_ = variant.multiply;
    }
    if (multiply_ == nullptr) {
      throw Refused("bits " + std::to_string(bits_) + " in blocks of " + std::to_string(block_) +
                    " are not supported");
    }
  }

  static void infer(const ShapeContext& context) {
    OpenShape shape = context.input(0);
    if (!shape.sizes.empty()) {
      shape.sizes.back() = context.integer("N");
      shape.names.back().clear();
    }
    context.output(0, shape);
  }

  void compute(const Call& call) const {
    const Input A = call.input(0, "A"), B = call.input(1, "B", 3), scales = call.input(2, "scales");
    const Input zero_points = call.input(3, "zero_points");
    const int64_t blocks = (in_ + block_ - 1) / block_, block_bytes = block_ * bits_ / 8;
    const int64_t zero_bytes = (blocks * bits_ + 7) / 8;
    if (A.shape.empty() || A.shape.back() != in_) {
      throw Refused("A is " + text_of(A.shape) + ", its last axis must be K, " +
                    std::to_string(in_));
    }
    B.require_shape({out_, blocks, block_bytes});
    if (scales.shape != Shape{out_ * blocks}) scales.require_shape({out_, blocks});
    if (zero_points.given() && zero_points.shape != Shape{out_ * zero_bytes}) {
      zero_points.require_shape({out_, zero_bytes});
    }
    Shape shape = A.shape;
    shape.back() = out_;
    int64_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
    const Product product{A.as<float>(),
                          B.as<uint8_t>(),
                          scales.as<float>(),
                          zero_points.as<uint8_t>(),
                          static_cast<float*>(call.output(0, shape)),
                          in_,
                          out_,
                          block_,
                          blocks,
                          zero_bytes};
    if (rows > 0) multiply_(product, rows, call);
  }

 private:
  int64_t in_, out_, bits_, block_;
  Function multiply_ = nullptr;
};

}  // namespace

const OrtCustomOp* mat_mul_n_bits() { return operator_of<MatMulNBits>(); }

#else

const OrtCustomOp* mat_mul_n_bits() { return nullptr; }

#endif

}  // namespace loradeploy
