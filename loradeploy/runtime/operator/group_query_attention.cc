// The operator loradeploy.GroupQueryAttention: com.microsoft.GroupQueryAttention without rotary
// embeddings, packed inputs, windows, biases and quantized caches, on the CPU.
//
//   q                       float [batch, sequence, heads · size]
//   k, v                    float [batch, sequence, key heads · size]
//   past_key, past_value    float [batch, key heads, past, size]
//   seqlens_k               int32 [batch]: a row's tokens with the new ones, minus one
//   total_sequence_length   int32, one number
//   num_heads, kv_num_heads, scale, softcap   attributes
//   → y float [batch, sequence, heads · size], present_key, present_value
//     [batch, key heads, max(past, total_sequence_length), size]
//
// A row's tokens come first in the cache, then the new ones. If present_key is the buffer of
// past_key, only the new ones are written, and likewise for values. Otherwise the past is copied, and
// zeros follow. A query sees the tokens before it and itself. A prompt (total_sequence_length is
// `sequence`) begins at position 0 in all rows, and is padded on the right.

#include "flash.h"

#include <cmath>

namespace loradeploy {
namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
// The number of floats from which several threads copy faster than one.
constexpr int64_t kCopyParallelFrom = 1 << 16;

// The cache of keys or of values: [batch, heads, …, size].
struct Cache {
  const float* past;
  float* present;
  int64_t past_length, present_length, heads, size;

  // Appends the new tokens of one head, of which `tokens` are at the distance `stride`.
  void append(int64_t batch, int64_t head, int64_t used, const float* added, int64_t tokens,
              int64_t stride) const {
    const int64_t pair = batch * heads + head;
    float* to = present + pair * present_length * size;
    const bool copies = past != present;
    if (copies && used > 0) {
      std::memcpy(to, past + pair * past_length * size, used * size * sizeof(float));
    }
    for (int64_t token = 0; token < tokens; ++token) {
      std::memcpy(to + (used + token) * size, added + token * stride, size * sizeof(float));
    }
    if (copies) std::fill(to + (used + tokens) * size, to + present_length * size, 0.0f);
  }

  // Whether the buffers overlap without being the same: then the past would be written over.
  bool overlaps(int64_t batch) const {
    if (past == present) return past_length != present_length;
    const auto begin = reinterpret_cast<uintptr_t>(past);
    const auto other = reinterpret_cast<uintptr_t>(present);
    const int64_t heads_bytes = batch * heads * size * static_cast<int64_t>(sizeof(float));
    return begin < other + present_length * heads_bytes && other < begin + past_length * heads_bytes;
  }
};

class GroupQueryAttention {
 public:
  static constexpr const char* name = "GroupQueryAttention";
  static constexpr Value inputs[] = {{kFloat}, {kFloat}, {kFloat}, {kFloat},
                                     {kFloat}, {kInt32}, {kInt32}};
  static constexpr Value outputs[] = {{kFloat}, {kFloat}, {kFloat}};
  static constexpr InPlace in_place[] = {{3, 1}, {4, 2}};

  static void infer(const ShapeContext& context) {
    context.output(0, context.input(0));
    for (const InPlace& cache : in_place) {
      OpenShape present = context.input(cache.input);
      if (present.sizes.size() != 4) continue;
      present.sizes[2] = -1, present.names[2] = "";
      context.output(cache.output, present);
    }
  }

  explicit GroupQueryAttention(const Node& node)
      : heads_(node.integer("num_heads")),
        key_heads_(node.integer("kv_num_heads")),
        scale_(node.number("scale", 0)),
        softcap_(node.number("softcap", 0)) {
    if (heads_ <= 0 || key_heads_ <= 0 || heads_ % key_heads_ != 0) {
      throw Refused("num_heads " + std::to_string(heads_) + " is no multiple of kv_num_heads " +
                    std::to_string(key_heads_));
    }
    if (!(scale_ >= 0) || !(softcap_ >= 0)) throw Refused("scale or softcap is negative");
    const std::pair<const char*, int64_t> fixed[] = {
        {"do_rotary", 0}, {"local_window_size", -1}, {"smooth_softmax", 0}, {"qk_output", 0},
        {"kv_cache_bit_width", 0}};
    for (const auto& [attribute, value] : fixed) {
      const int64_t own = node.integer(attribute, value);
      if (own != value && !(value == 0 && own == -1)) {
        throw Refused(std::string(attribute) + " is " + std::to_string(own) +
                      ", which is not computed");
      }
    }
  }

  void compute(const Call& call) const {
    const Input q = call.input(0, "q", 3), k = call.input(1, "k", 3), v = call.input(2, "v", 3);
    const Input past_key = call.input(3, "past_key", 4);
    const Input past_value = call.input(4, "past_value", 4);
    const Input last = call.input(5, "seqlens_k", 1);
    const Input all_tokens = call.input(6, "total_sequence_length");
    const int64_t batch = q.shape[0], sequence = q.shape[1], size = q.shape[2] / heads_;
    if (size == 0 || q.shape[2] % heads_ != 0) {
      throw Refused("q is " + text_of(q.shape) + " with " + std::to_string(heads_) + " heads");
    }
    k.require_shape({batch, sequence, key_heads_ * size});
    v.require_shape({batch, sequence, key_heads_ * size});
    const int64_t past = past_key.shape[2];
    past_key.require_shape({batch, key_heads_, past, size});
    past_value.require_shape({batch, key_heads_, past, size});
    last.require_shape({batch});
    if (all_tokens.shape.size() > 1 || (all_tokens.shape.size() == 1 && all_tokens.shape[0] != 1)) {
      throw Refused("total_sequence_length is " + text_of(all_tokens.shape) + ", expected one number");
    }
    const int64_t total = *all_tokens.as<int32_t>();
    if (total > past && total != past + sequence) {
      throw Refused("total_sequence_length is " + std::to_string(total) + ", the past has " +
                    std::to_string(past) + " positions and there are " + std::to_string(sequence) +
                    " new ones");
    }
    const int64_t present = std::max(total, past);
    const bool is_prompt = sequence == total;
    if (!is_prompt && sequence > 1 && batch > 1) {
      throw Refused("several rows have several new tokens after a past");
    }
    if (sequence > present) {
      throw Refused("there are " + std::to_string(sequence) + " new tokens for " +
                    std::to_string(present) + " positions");
    }

    Attention own{};
    own.batch = batch, own.heads = heads_, own.key_heads = key_heads_, own.queries = sequence;
    own.size = own.value_size = size;
    own.scale = scale_ == 0 ? 1 / std::sqrt(static_cast<float>(size)) : scale_;
    own.softcap = softcap_;
    std::vector<int64_t> used(batch);
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t tokens = int64_t{last.as<int32_t>()[row]} + 1;
      if (tokens < 1 || tokens > present || (!is_prompt && tokens < sequence)) {
        throw Refused("seqlens_k has " + std::to_string(tokens - 1) + " for " +
                      std::to_string(sequence) + " new tokens and " + std::to_string(present) +
                      " positions");
      }
      used[row] = is_prompt ? 0 : tokens - sequence;
      own.keys.push_back(tokens);
      own.first.push_back(used[row] + 1);
    }

    float* y = static_cast<float*>(call.output(0, q.shape));
    const Shape shape{batch, key_heads_, present, size};
    const auto cache = [&](size_t output, const Input& given) {
      return Cache{given.as<float>(), static_cast<float*>(call.output(output, shape)),
                   past, present, key_heads_, size};
    };
    const Cache keys = cache(1, past_key), values = cache(2, past_value);
    if (batch == 0) return;
    if (keys.overlaps(batch) || values.overlaps(batch)) {
      throw Refused("past and present are different parts of one buffer");
    }
    const int64_t width = key_heads_ * size;
    const auto append = [&](size_t pair) {
      const int64_t row = static_cast<int64_t>(pair) / key_heads_, head = pair % key_heads_;
      const int64_t place = row * sequence * width + head * size;
      keys.append(row, head, used[row], k.as<float>() + place, sequence, width);
      values.append(row, head, used[row], v.as<float>() + place, sequence, width);
    };
    const int64_t pairs = batch * key_heads_;
    const bool in_place = keys.past == keys.present && values.past == values.present;
    if (pairs * (in_place ? sequence : present) * size >= kCopyParallelFrom) {
      call.parallel(pairs, append);
    } else {
      for (int64_t pair = 0; pair < pairs; ++pair) append(pair);
    }
    own.q = {q.as<float>(), sequence * heads_ * size, size, heads_ * size};
    own.y = {y, sequence * heads_ * size, size, heads_ * size};
    own.k = {keys.present, present * width, present * size, size};
    own.v = {values.present, present * width, present * size, size};
    attend(own, call);
  }

 private:
  int64_t heads_, key_heads_;
  float scale_, softcap_;
};

}  // namespace

const OrtCustomOp* group_query_attention() { return operator_of<GroupQueryAttention>(); }

}  // namespace loradeploy
