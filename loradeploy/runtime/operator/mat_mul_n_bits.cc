// The operator loradeploy.MatMulNBits: A Bᵀ with weights of 4 or 8 bits, as the operator of the same
// name of com.microsoft computes it with accuracy_level 4, on the CPU.
//
//   A            float [.., K]
//   B            uint8 [N, blocks, block_size bits / 8]   the low bits first; blocks = ⌈K / block_size⌉
//   scales       float [N, blocks] or [N blocks]
//   zero_points  uint8 [N, ⌈blocks bits / 8⌉], or flat; optional: else the middle of the range
//   → float [.., N]
//
// The weights are read where they are: no copy in another order is kept. How each number is computed
// is described in n_bits.h.

#include "integer_vectors.h"
#include "kernel.h"
#if defined(LORADEPLOY_INTEGER_VECTORS)
#include "n_bits_few_rows.h"
#include "n_bits_many_rows.h"
#endif

#include <memory>
#include <new>

namespace loradeploy {

#if defined(LORADEPLOY_INTEGER_VECTORS)
namespace {

using namespace n_bits;

constexpr int64_t kQuantizedBytes = 4 << 20;  // rows that are quantized before they are multiplied
constexpr int64_t kTaskProducts = 1 << 19;    // multiplications of a task, if there are enough

struct Freed {
  void operator()(uint8_t* bytes) const { ::operator delete[](bytes, std::align_val_t(64)); }
};

// How quantized rows are stored and multiplied.
template <typename Layout>
struct Few {
  static constexpr int64_t rows = kFewRows, columns = 4;
  static int64_t row_bytes(const Product& product) { return few_row_bytes<Layout>(product); }
  static constexpr auto quantize = quantize_few<Layout>;
  template <bool has_zero_points>
  static constexpr auto multiply = multiply_few<Layout, has_zero_points>;
};
template <typename Layout>
struct Many {
  static constexpr int64_t rows = kManyRows, columns = kPanelColumns;
  static int64_t row_bytes(const Product& product) { return many_row_bytes(product); }
  static constexpr auto quantize = quantize_many<Layout>;
  template <bool has_zero_points>
  static constexpr auto multiply = multiply_many<Layout, has_zero_points>;
};

// All rows; parallel(count, act) runs act(0), …, act(count - 1).
template <typename How, typename Parallel>
void multiply_all(const Product& product, int64_t rows, const Parallel& parallel) {
  const int64_t row_bytes = How::row_bytes(product);
  const int64_t most = std::min(
      rows, std::max(kQuantizedBytes / row_bytes / How::rows, int64_t{1}) * How::rows);
  const std::unique_ptr<uint8_t[], Freed> quantized(
      static_cast<uint8_t*>(::operator new[](most * row_bytes, std::align_val_t(64))));
  uint8_t* const x = quantized.get();
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t own = std::min(most, rows - first);
    const int64_t together = std::max<int64_t>(1, (1 << 14) / product.in);
    parallel((own + together - 1) / together, [&](size_t task) {
      const int64_t begin = task * together, end = std::min(begin + together, own);
      for (int64_t row = begin; row < end; ++row) {
        How::quantize(product, product.x + (first + row) * product.in, x + row * row_bytes);
      }
    });
    const int64_t row_tasks = (own + How::rows - 1) / How::rows;
    const int64_t task_rows = (own + row_tasks - 1) / row_tasks;
    const int64_t wide = kTaskProducts / (task_rows * product.in);
    const int64_t columns = std::max<int64_t>(1, wide / How::columns) * How::columns;
    const int64_t column_tasks = (product.out + columns - 1) / columns;
    const auto multiply = product.zero_points == nullptr ? How::template multiply<false>
                                                         : How::template multiply<true>;
    parallel(row_tasks * column_tasks, [&](size_t task) {
      const int64_t row = task / column_tasks * task_rows;
      const int64_t begin = task % column_tasks * columns;
      multiply(product, first + row, std::min(task_rows, own - row), x + row * row_bytes, begin,
               std::min(begin + columns, product.out));
    });
  }
}

using Function = void (*)(const Product&, int64_t rows, const Call&);

template <int bits, int block>
void multiply_call(const Product& product, int64_t rows, const Call& call) {
  const auto parallel = [&](size_t count, const auto& act) {
    if (count > 1) {
      call.parallel(count, act);
    } else {
      act(0);
    }
  };
  if (rows <= kFewRows) {
    multiply_all<Few<Layout<bits, block>>>(product, rows, parallel);
  } else {
    multiply_all<Many<Layout<bits, block>>>(product, rows, parallel);
  }
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
