// The operator loradeploy.Attention: ONNX's Attention (opset 23) of 4-D inputs, on the CPU.
//
//   q      float [batch, heads, queries, size]
//   k      float [batch, key heads, keys, size]         heads: a multiple of key heads
//   v      float [batch, key heads, keys, value size]
//   mask   bool or float, optional: [queries, keys], [1 or heads, queries, keys] or
//          [1 or batch, 1 or heads, queries, keys]
//   scale, softcap, is_causal   attributes
//   → float [batch, heads, queries, value size]: softmax(softcap(scale · q kᵀ) + mask) v
//
// A query that sees no key (all false, -infinity or the lowest float) gets zeros, as in onnxruntime.

#include "flash.h"

#include <cmath>

namespace loradeploy {
namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

class AttentionKernel {
 public:
  static constexpr const char* name = "Attention";
  static constexpr Value inputs[] = {
      {kFloat}, {kFloat}, {kFloat}, {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, true}};
  static constexpr Value outputs[] = {{kFloat}};

  static void infer(const ShapeContext& context) {
    OpenShape y = context.input(0);
    const OpenShape v = context.input(2);
    if (y.sizes.size() != 4 || v.sizes.size() != 4) return;
    y.sizes[3] = v.sizes[3], y.names[3] = v.names[3];
    context.output(0, y);
  }

  explicit AttentionKernel(const Node& node)
      : scale_(node.number("scale", 0)),
        softcap_(node.number("softcap", 0)),
        is_causal_(node.integer("is_causal", 0) != 0) {
    if (node.integer("qk_matmul_output_mode", 0) != 0) {
      throw Refused("qk_matmul_output_mode is not computed");
    }
    if (!(scale_ >= 0) || !(softcap_ >= 0)) throw Refused("scale or softcap is negative");
  }

  void compute(const Call& call) const {
    const Input q = call.input(0, "q", 4), k = call.input(1, "k", 4), v = call.input(2, "v", 4);
    const Input mask = call.input(3, "mask");
    const int64_t batch = q.shape[0], heads = q.shape[1], queries = q.shape[2], size = q.shape[3];
    const int64_t key_heads = k.shape[1], keys = k.shape[2], value_size = v.shape[3];
    k.require_shape({batch, key_heads, keys, size});
    v.require_shape({batch, key_heads, keys, value_size});
    if (key_heads == 0 || heads % key_heads != 0 || size == 0) {
      throw Refused("q is " + text_of(q.shape) + ", k " + text_of(k.shape) +
                    ": the number of heads is no multiple");
    }
    // Where the diagonal begins is not the same in all implementations.
    if (is_causal_ && queries != keys) {
      throw Refused("is_causal with " + std::to_string(queries) + " queries and " +
                    std::to_string(keys) + " keys");
    }
    Attention own{};
    own.batch = batch, own.heads = heads, own.key_heads = key_heads, own.queries = queries;
    own.size = size, own.value_size = value_size;
    own.scale = scale_ == 0 ? 1 / std::sqrt(static_cast<float>(size)) : scale_;
    own.softcap = softcap_;
    own.q = {q.as<float>(), heads * queries * size, queries * size, size};
    own.k = {k.as<float>(), key_heads * keys * size, keys * size, size};
    own.v = {v.as<float>(), key_heads * keys * value_size, keys * value_size, value_size};
    own.mask = mask_of(mask, q.shape, keys);
    own.keys.assign(batch, keys);
    own.first.assign(batch, is_causal_ ? 1 : Attention::kAll);
    float* y = static_cast<float*>(call.output(0, {batch, heads, queries, value_size}));
    own.y = {y, heads * queries * value_size, queries * value_size, value_size};
    attend(own, call);
  }

 private:
  static Mask mask_of(const Input& mask, const Shape& q, int64_t keys) {
    Mask own;
    if (!mask.given()) return own;
    const size_t axes = mask.shape.size();
    if (axes < 2 || axes > 4) throw Refused("mask is " + text_of(mask.shape));
    Shape shape(4 - axes, 1);  // the axes that are left out
    shape.insert(shape.end(), mask.shape.begin(), mask.shape.end());
    const bool fits = (shape[0] == 1 || shape[0] == q[0]) && (shape[1] == 1 || shape[1] == q[1]) &&
                      shape[2] == q[2] && shape[3] == keys;
    if (!fits) {
      throw Refused("mask is " + text_of(mask.shape) + ", expected " +
                    text_of({q[0], q[1], q[2], keys}) + ", or 1 in the first two axes");
    }
    own.row = keys;
    own.head = shape[1] == 1 ? 0 : q[2] * keys;
    own.batch = shape[0] == 1 ? 0 : shape[1] * q[2] * keys;
    if (mask.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL) {
      own.seen = mask.as<uint8_t>();
    } else if (mask.type == kFloat) {
      own.added = mask.as<float>();
    } else {
      throw Refused("mask is neither bool nor float");
    }
    return own;
  }

  float scale_, softcap_;
  bool is_causal_;
};

}  // namespace

const OrtCustomOp* attention() { return operator_of<AttentionKernel>(); }

}  // namespace loradeploy
