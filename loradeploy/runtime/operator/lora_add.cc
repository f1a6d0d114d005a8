// The operator loradeploy.LoraAdd: y + (x A[id]) B[id] for each row of a batch, on the CPU.
//
//   y              float [batch, sequence, out]   the base's product
//   x              float [batch, sequence, in]
//   A              float [adapters, in, rank]     padded to the largest rank
//   B              float [adapters, rank, out]    with zeros in rows beyond an adapter's own rank
//   adapter_ids    int64 [batch] or [1]           the slot of each row in A and B
//   adapter_ranks  int64 [adapters, targets], or [0, targets]: all adapters have the full rank
//   target         attribute, the column of adapter_ranks
//   → float [batch, sequence, out]
//
// The factors of an adapter are read once for all of its rows, and only up to its rank. Each number
// of the result is computed in a fixed order: the sum over `in` in four parts of every fourth
// element, then the sum over the rank, then y. So the result of a row does not depend on other rows,
// on the stored rank, on the number of threads or on the width of vectors.

#include "kernel.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace loradeploy {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats of a vector
constexpr int kRows = 4;    // rows that are computed together: all sums stay in registers
constexpr int kColumns = 4;  // vectors of outputs that are computed together
#elif defined(__AVX__)
constexpr int kWidth = 8;
constexpr int kRows = 2;
constexpr int kColumns = 4;
#else
constexpr int kWidth = 4;
constexpr int kRows = 2;
constexpr int kColumns = 4;
#endif
constexpr int kParts = 4;  // sums over every fourth element of x
constexpr int64_t kTaskRows = 32;  // the largest number of rows of a task; a multiple of kRows
constexpr int64_t kTasks = 8;      // of one adapter, if it has enough rows
// The number of multiplications from which several threads are faster than one.
constexpr int64_t kParallelFrom = 1 << 17;

template <int width>
struct Vector {
  typedef float Type __attribute__((vector_size(width * sizeof(float)), aligned(4), may_alias));
};
template <>
struct Vector<1> {
  typedef float Type;
};

// low[row][0…width) = Σ_i x[row][i] A[i][0…width); `stride`: from one row of A to the next.
template <int rows, int width>
void down_columns(const float* const* x, const float* A, int64_t in, int64_t stride, float* low,
                  int64_t low_stride) {
  using V = typename Vector<width>::Type;
  V sums[rows][kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= in; i += kParts) {
    for (int part = 0; part < kParts; ++part) {
      const V a = *reinterpret_cast<const V*>(A + (i + part) * stride);
      for (int row = 0; row < rows; ++row) sums[row][part] += a * x[row][i + part];
    }
  }
  for (int part = 0; i < in; ++i, ++part) {
    const V a = *reinterpret_cast<const V*>(A + i * stride);
    for (int row = 0; row < rows; ++row) sums[row][part] += a * x[row][i];
  }
  for (int row = 0; row < rows; ++row) {
    *reinterpret_cast<V*>(low + row * low_stride) =
        (sums[row][0] + sums[row][1]) + (sums[row][2] + sums[row][3]);
  }
}

template <int rows, int width>
int64_t down_from(int64_t column, const float* const* x, const float* A, int64_t in, int64_t stride,
                  int64_t rank, float* low) {
  for (; column + width <= rank; column += width) {
    down_columns<rows, width>(x, A + column, in, stride, low + column, rank);
  }
  if constexpr (width > 1) {
    return down_from<rows, width / 2>(column, x, A, in, stride, rank, low);
  }
  return column;
}

// result[row][0…columns · width) = y + Σ_r low[row][r] B[r][0…columns · width)
template <int rows, int columns, int width>
void up_columns(const float* low, const float* B, int64_t rank, int64_t out, const float* const* y,
                float* const* result, int64_t first) {
  using V = typename Vector<width>::Type;
  V sums[rows][columns] = {};
  for (int64_t r = 0; r < rank; ++r) {
    for (int column = 0; column < columns; ++column) {
      const V b = *reinterpret_cast<const V*>(B + r * out + first + column * width);
      for (int row = 0; row < rows; ++row) sums[row][column] += b * low[row * rank + r];
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      const int64_t place = first + column * width;
      *reinterpret_cast<V*>(result[row] + place) =
          *reinterpret_cast<const V*>(y[row] + place) + sums[row][column];
    }
  }
}

template <int rows, int columns, int width>
void up_from(int64_t first, const float* low, const float* B, int64_t rank, int64_t out,
             const float* const* y, float* const* result) {
  for (; first + columns * width <= out; first += columns * width) {
    up_columns<rows, columns, width>(low, B, rank, out, y, result, first);
  }
  if constexpr (columns > 1) {
    up_from<rows, 1, width>(first, low, B, rank, out, y, result);
  } else if constexpr (width > 1) {
    up_from<rows, 1, width / 2>(first, low, B, rank, out, y, result);
  }
}

// The inputs of a call, whose sizes were checked.
struct Tensors {
  const float *y, *x, *A, *B;
  float* result;
  int64_t sequence, in, stored_rank, out;
};

// Rows of the batch, each `sequence` long, that use the same slot; `begin`, `end`: of their tokens.
struct Task {
  const int64_t* batch_rows;
  int64_t slot, rank, begin, end;
  float* low;  // kRows · rank
};

template <int rows>
void update_rows(const Tensors& call, const Task& task, int64_t token) {
  const float *x[rows], *y[rows];
  float* result[rows];
  for (int row = 0; row < rows; ++row) {
    const int64_t batch_row = task.batch_rows[(token + row) / call.sequence];
    const int64_t place = batch_row * call.sequence + (token + row) % call.sequence;
    x[row] = call.x + place * call.in;
    y[row] = call.y + place * call.out;
    result[row] = call.result + place * call.out;
  }
  const float* A = call.A + task.slot * call.in * call.stored_rank;
  const float* B = call.B + task.slot * call.stored_rank * call.out;
  down_from<rows, kWidth>(0, x, A, call.in, call.stored_rank, task.rank, task.low);
  up_from<rows, kColumns, kWidth>(0, task.low, B, task.rank, call.out, y, result);
}

void copy_rows(const Tensors& call, const Task& task) {
  if (call.result == call.y) return;
  for (int64_t token = task.begin; token < task.end; ++token) {
    const int64_t batch_row = task.batch_rows[token / call.sequence];
    const int64_t place = (batch_row * call.sequence + token % call.sequence) * call.out;
    std::memcpy(call.result + place, call.y + place, call.out * sizeof(float));
  }
}

void run_task(const Tensors& call, const Task& task) {
  if (task.rank == 0) return copy_rows(call, task);
  int64_t token = task.begin;
  for (; token + kRows <= task.end; token += kRows) update_rows<kRows>(call, task, token);
  if constexpr (kRows > 2) {
    if (token + 2 <= task.end) {
      update_rows<2>(call, task, token);
      token += 2;
    }
  }
  if (token < task.end) update_rows<1>(call, task, token);
}

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kInteger = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

class LoraAdd {
 public:
  static constexpr const char* name = "LoraAdd";
  static constexpr Value inputs[] = {{kFloat}, {kFloat},   {kFloat},
                                     {kFloat}, {kInteger}, {kInteger}};
  static constexpr Value outputs[] = {{kFloat}};
  static constexpr InPlace in_place[] = {{0, 0}};  // the result may be written over y

  static void infer(const ShapeContext& context) { context.output(0, context.input(0)); }

  explicit LoraAdd(const Node& node) : target_(node.integer("target")) {}

  void compute(const Call& call) const {
    const Input y = call.input(0, "y", 3), x = call.input(1, "x", 3);
    const Input A = call.input(2, "A", 3), B = call.input(3, "B", 3);
    const Input ids = call.input(4, "adapter_ids", 1);
    const Input ranks = call.input(5, "adapter_ranks", 2);
    const int64_t batch = x.shape[0], sequence = x.shape[1], in = x.shape[2];
    const int64_t slots = A.shape[0], rank = A.shape[2], out = B.shape[2];
    y.require_shape({batch, sequence, out});
    A.require_shape({slots, in, rank});
    B.require_shape({slots, rank, out});
    if (ids.shape[0] != batch) ids.require_shape({1});
    const bool has_ranks = ranks.shape[0] != 0;
    if (has_ranks) ranks.require_shape({slots, ranks.shape[1]});
    if (has_ranks && (target_ < 0 || target_ >= ranks.shape[1])) {
      throw Refused("target " + std::to_string(target_) + " is not in adapter_ranks " +
                    text_of(ranks.shape));
    }
    float* result = static_cast<float*>(call.output(0, y.shape));
    if (batch == 0 || sequence == 0 || out == 0) return;

    const Tensors tensors{y.as<float>(), x.as<float>(), A.as<float>(), B.as<float>(), result,
                          sequence,      in,            rank,          out};
    std::vector<Task> tasks;
    // The rows of the batch, ordered by slot.
    const int64_t* own_ids = ids.as<int64_t>();
    std::vector<std::pair<int64_t, int64_t>> by_slot(batch);
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t id = own_ids[ids.shape[0] == 1 ? 0 : row];
      if (id < -slots || id >= slots) {
        throw Refused("adapter_ids has " + std::to_string(id) + ", there are " +
                      std::to_string(slots) + " slots");
      }
      by_slot[row] = {id < 0 ? id + slots : id, row};
    }
    std::sort(by_slot.begin(), by_slot.end());
    std::vector<int64_t> batch_rows(batch);
    int64_t multiplications = 0, low_size = 0;
    for (int64_t row = 0; row < batch;) {
      const int64_t slot = by_slot[row].first, begin = row;
      for (; row < batch && by_slot[row].first == slot; ++row) batch_rows[row] = by_slot[row].second;
      int64_t own_rank = rank;
      if (has_ranks) {
        own_rank = ranks.as<int64_t>()[slot * ranks.shape[1] + target_];
        if (own_rank < 0 || own_rank > rank) {
          throw Refused("adapter_ranks has " + std::to_string(own_rank) + ", A has the rank " +
                        std::to_string(rank));
        }
      }
      const int64_t tokens = (row - begin) * sequence;
      const int64_t share = (tokens / kTasks + kRows - 1) / kRows * kRows;
      const int64_t size = std::clamp<int64_t>(share, kRows, kTaskRows);
      for (int64_t token = 0; token < tokens; token += size) {
        tasks.push_back({batch_rows.data() + begin, slot, own_rank, token,
                         std::min(token + size, tokens), nullptr});
        low_size += kRows * own_rank;
      }
      multiplications += tokens * own_rank * (in + out);
    }
    std::vector<float> low(low_size);
    float* next = low.data();
    for (Task& task : tasks) {
      task.low = next;
      next += kRows * task.rank;
    }
    if (tasks.size() > 1 && multiplications >= kParallelFrom) {
      // The largest first: a thread that began it last would keep the others waiting.
      std::stable_sort(tasks.begin(), tasks.end(), [](const Task& one, const Task& other) {
        return one.rank * (one.end - one.begin) > other.rank * (other.end - other.begin);
      });
      call.parallel(tasks.size(), [&](size_t index) { run_task(tensors, tasks[index]); });
    } else {
      for (const Task& task : tasks) run_task(tensors, task);
    }
  }

 private:
  int64_t target_;
};

}  // namespace

const OrtCustomOp* lora_add() { return operator_of<LoraAdd>(); }

}  // namespace loradeploy
