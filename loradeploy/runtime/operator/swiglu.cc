// The operators loradeploy.SwiGLU and loradeploy.SiluMul: silu(gate) · up, on the CPU.
//
//   SwiGLU    x float [..., 2 n]: gate, then up         → float [..., n]
//   SiluMul   gate, up float, of one shape              → float of this shape
//
// One pass over memory, where Split, Sigmoid, Mul and Mul need four.

#include "gated.h"
#include "kernel.h"

#include <algorithm>

namespace loradeploy {
namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr int64_t kTaskNumbers = 1 << 14;

// `rows` rows of `size` results, whose inputs are `stride` apart.
void multiply_rows(const Call& call, const float* gate, const float* up, float* result,
                   int64_t rows, int64_t size, int64_t stride) {
  const int64_t share = std::max<int64_t>(kTaskNumbers / std::max<int64_t>(size, 1), 1);
  const auto act = [&](size_t task) {
    const int64_t begin = static_cast<int64_t>(task) * share;
    for (int64_t row = begin; row < std::min(begin + share, rows); ++row) {
      multiply_gated(gate + row * stride, up + row * stride, result + row * size, size);
    }
  };
  const int64_t tasks = (rows + share - 1) / share;
  if (tasks > 1) {
    call.parallel(tasks, act);
  } else if (tasks == 1) {
    act(0);
  }
}

int64_t product_of(const Shape& shape) {
  int64_t product = 1;
  for (int64_t size : shape) product *= size;
  return product;
}

class SwiGLU {
 public:
  static constexpr const char* name = "SwiGLU";
  static constexpr Value inputs[] = {{kFloat}};
  static constexpr Value outputs[] = {{kFloat}};

  static void infer(const ShapeContext& context) {
    OpenShape shape = context.input(0);
    if (shape.sizes.empty()) return;
    shape.names.back().clear();
    if (shape.sizes.back() > 0) shape.sizes.back() /= 2;
    context.output(0, shape);
  }

  explicit SwiGLU(const Node&) {}

  void compute(const Call& call) const {
    const Input x = call.input(0, "x");
    if (x.shape.empty() || x.shape.back() % 2 != 0) {
      throw Refused("x is " + text_of(x.shape) + ", expected an even last axis");
    }
    Shape shape = x.shape;
    const int64_t size = shape.back() /= 2;
    float* result = static_cast<float*>(call.output(0, shape));
    const int64_t rows = size == 0 ? 0 : product_of(shape) / size;
    multiply_rows(call, x.as<float>(), x.as<float>() + size, result, rows, size, 2 * size);
  }
};

class SiluMul {
 public:
  static constexpr const char* name = "SiluMul";
  static constexpr Value inputs[] = {{kFloat}, {kFloat}};
  static constexpr Value outputs[] = {{kFloat}};
  static constexpr InPlace in_place[] = {{0, 0}};  // the result may be written over gate

  static void infer(const ShapeContext& context) { context.output(0, context.input(0)); }

  explicit SiluMul(const Node&) {}

  void compute(const Call& call) const {
    const Input gate = call.input(0, "gate"), up = call.input(1, "up");
    up.require_shape(gate.shape);
    float* result = static_cast<float*>(call.output(0, gate.shape));
    const int64_t count = product_of(gate.shape), size = std::min(count, kTaskNumbers);
    if (count == 0) return;
    const int64_t rows = count / size, rest = count % size;
    multiply_rows(call, gate.as<float>(), up.as<float>(), result, rows, size, size);
    multiply_gated(gate.as<float>() + rows * size, up.as<float>() + rows * size, result + rows * size,
                   rest);
  }
};

}  // namespace

const OrtCustomOp* swiglu() { return operator_of<SwiGLU>(); }
const OrtCustomOp* silu_mul() { return operator_of<SiluMul>(); }

}  // namespace loradeploy
