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
#include "vectors.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace loradeploy {
namespace {

// kSums: sums that stay in registers. kRows: rows that are computed together.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24, kRows = 8;  // of 32 registers
#else
constexpr int kSums = 12, kRows = 4;  // of 16
#endif
constexpr int kParts = 4;    // sums over every fourth element of x
constexpr int kVectors = 4;  // the largest number of vectors of A or B that are used together
// Rows of a task: at least kFewRows and at most kTaskRows, a multiple of kRows, so that an adapter
// has kTasks tasks or more.
constexpr int64_t kFewRows = 4, kTaskRows = 32, kTasks = 8;
// A task whose factors have more floats than kCached uses a block of them for all of its rows before
// the next, of kBlockA or kBlockB floats, which stays in the second cache.
constexpr int64_t kCached = 1 << 17, kBlockA = 1 << 15, kBlockB = 1 << 17;
// The number of multiplications from which several threads are faster than one, and from which they
// divide a task of few rows: its factors are then divided by columns, those of A into kDivided.
constexpr int64_t kParallelFrom = 1 << 17, kDivideFrom = 1 << 18, kDivided = 32;

template <int width>
struct Vector {
  typedef float Type __attribute__((vector_size(width * sizeof(float)), aligned(4), may_alias));
};
template <>
struct Vector<1> {
  typedef float Type;
};

template <int width>
typename Vector<width>::Type load(const float* place) {
  return *reinterpret_cast<const typename Vector<width>::Type*>(place);
}

template <int width>
void store(float* place, typename Vector<width>::Type value) {
  *reinterpret_cast<typename Vector<width>::Type*>(place) = value;
}

// The rows [begin, end) of A, with `stride` from one to the next, and the columns [first, last).
struct Block {
  const float* A;
  int64_t stride, begin, end, first, last;
};

// Sums over `in`, in kParts parts for each row: sums[(row · kParts + part) · stride + column].
struct Sums {
  float* data;
  int64_t stride;

  float* at(int row, int part, int64_t column) const {
    return data + (row * kParts + part) * stride + column;
  }
};

// Adds x A to the parts [part, part + parts) of `vectors` vectors of columns.
template <int rows, int parts, int vectors, int width>
void down_vectors(const float* const* x, const Block& block, int part, int64_t column,
                  const Sums& sums) {
  using V = typename Vector<width>::Type;
  V own[rows][parts][vectors] = {};
  const auto each_sum = [&](const auto& act) INLINED {
    each<rows>([&](auto row) INLINED {
      each<parts>([&](auto p) INLINED {
        each<vectors>([&](auto v) INLINED {
          act(own[row][p][v], sums.at(row, part + p, column + v * width));
        });
      });
    });
  };
  const auto add = [&](int64_t i, auto p) INLINED {
    each<vectors>([&](auto v) INLINED {
      const V a = load<width>(block.A + i * block.stride + column + v * width);
      each<rows>([&](auto row) INLINED { own[row][p][v] += a * x[row][i]; });
    });
  };
  if (block.begin > 0) each_sum([](V& sum, const float* place) INLINED { sum = load<width>(place); });
  int64_t i = block.begin + part;
  for (; i + parts <= block.end; i += kParts) {
    each<parts>([&](auto p) INLINED { add(i + p, p); });
  }
  each<parts>([&](auto p) INLINED {
    if (i + p < block.end) add(i + p, p);
  });
  each_sum([](const V& sum, float* place) INLINED { store<width>(place, sum); });
}

template <int rows, int parts, int vectors, int width>
void down_from(int64_t column, const float* const* x, const Block& block, const Sums& sums) {
  for (; column + vectors * width <= block.last; column += vectors * width) {
    for (int part = 0; part < kParts; part += parts) {
      down_vectors<rows, parts, vectors, width>(x, block, part, column, sums);
    }
  }
  if constexpr (vectors > 1) {
    down_from<rows, parts, 1, width>(column, x, block, sums);
  } else if constexpr (width > 1) {
    down_from<rows, parts, 1, width / 2>(column, x, block, sums);
  }
}

// low[column…last) = the sum of the parts
template <int width>
void add_parts(int64_t column, int64_t last, const Sums& sums, float* low) {
  const auto part = [&](int number) { return load<width>(sums.at(0, number, column)); };
  for (; column + width <= last; column += width) {
    store<width>(low + column, (part(0) + part(1)) + (part(2) + part(3)));
  }
  if constexpr (width > 1) add_parts<width / 2>(column, last, sums, low);
}

// result[row][column…] = y + Σ_r low[row][r] B[r][column…], for `vectors` vectors of columns
template <int rows, int vectors, int width>
void up_vectors(const float* low, const float* B, int64_t rank, int64_t out, const float* const* y,
                float* const* result, int64_t column) {
  using V = typename Vector<width>::Type;
  V sums[rows][vectors] = {};
  for (int64_t r = 0; r < rank; ++r) {
    each<vectors>([&](auto v) INLINED {
      const V b = load<width>(B + r * out + column + v * width);
      each<rows>([&](auto row) INLINED { sums[row][v] += b * low[row * rank + r]; });
    });
  }
  each<rows>([&](auto row) INLINED {
    each<vectors>([&](auto v) INLINED {
      const int64_t place = column + v * width;
      store<width>(result[row] + place, load<width>(y[row] + place) + sums[row][v]);
    });
  });
}

template <int rows, int vectors, int width>
void up_from(int64_t column, int64_t last, const float* low, const float* B, int64_t rank,
             int64_t out, const float* const* y, float* const* result) {
  for (; column + vectors * width <= last; column += vectors * width) {
    up_vectors<rows, vectors, width>(low, B, rank, out, y, result, column);
  }
  if constexpr (vectors > 1) {
    up_from<rows, 1, width>(column, last, low, B, rank, out, y, result);
  } else if constexpr (width > 1) {
    up_from<rows, 1, width / 2>(column, last, low, B, rank, out, y, result);
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
  float* low;   // tokens · rank
  float* sums;  // tokens · kParts · rank

  int64_t tokens() const { return end - begin; }
  bool has_few_rows() const { return tokens() <= kRows; }
  int64_t multiplications(const Tensors& call) const {
    return tokens() * rank * (call.in + call.out);
  }
  // The place of a token in x and y.
  int64_t place(const Tensors& call, int64_t token) const {
    return batch_rows[token / call.sequence] * call.sequence + token % call.sequence;
  }
};

template <int rows>
void down_rows(const Tensors& call, const Task& task, int64_t token, const Block& block) {
  const float* x[rows];
  for (int row = 0; row < rows; ++row) x[row] = call.x + task.place(call, token + row) * call.in;
  const Sums sums{task.sums + (token - task.begin) * kParts * task.rank, task.rank};
  constexpr int parts = rows * kParts <= kSums ? kParts : kParts / 2;
  constexpr int vectors = std::clamp(kSums / (rows * parts), 1, kVectors);
  down_from<rows, parts, vectors, kLanes>(block.first, x, block, sums);
}

template <int rows>
void up_rows(const Tensors& call, const Task& task, int64_t token, int64_t first, int64_t last) {
  const float* y[rows];
  float* result[rows];
  for (int row = 0; row < rows; ++row) {
    const int64_t place = task.place(call, token + row) * call.out;
    y[row] = call.y + place;
    result[row] = call.result + place;
  }
  const float* low = task.low + (token - task.begin) * task.rank;
  const float* B = call.B + task.slot * call.stored_rank * call.out;
  constexpr int vectors = std::min(kSums / rows, kVectors);
  up_from<rows, vectors, kLanes>(first, last, low, B, task.rank, call.out, y, result);
}

// All tokens of a task from `token` on: kRows at once, then half as many, and so on.
template <int rows = kRows>
void down_tokens(const Tensors& call, const Task& task, int64_t token, const Block& block) {
  for (; token + rows <= task.end; token += rows) down_rows<rows>(call, task, token, block);
  if constexpr (rows > 1) {
    if (token < task.end) down_tokens<rows / 2>(call, task, token, block);
  }
}

template <int rows = kRows>
void up_tokens(const Tensors& call, const Task& task, int64_t token, int64_t first, int64_t last) {
  for (; token + rows <= task.end; token += rows) up_rows<rows>(call, task, token, first, last);
  if constexpr (rows > 1) {
    if (token < task.end) up_tokens<rows / 2>(call, task, token, first, last);
  }
}

// `size` in equal shares, as many as `wanted`, each a multiple of `multiple` (but for the last).
int64_t share_of(int64_t size, int64_t wanted, int64_t multiple) {
  const int64_t shares = std::max<int64_t>(1, wanted);
  return std::max<int64_t>(1, (size + shares * multiple - 1) / (shares * multiple)) * multiple;
}

// The columns [first, last) of x A for all tokens of a task.
void down(const Tensors& call, const Task& task, int64_t first, int64_t last) {
  const float* A = call.A + task.slot * call.in * call.stored_rank;
  const int64_t blocks = task.has_few_rows() ? 1 : call.in * task.rank / kBlockA;
  const int64_t depth = share_of(call.in, blocks, 16 * kParts);
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + depth, call.in);
    down_tokens(call, task, task.begin, {A, call.stored_rank, begin, end, first, last});
    begin = end;
  } while (begin < call.in);
  for (int64_t token = 0; token < task.tokens(); ++token) {
    const Sums sums{task.sums + token * kParts * task.rank, task.rank};
    add_parts<kLanes>(first, last, sums, task.low + token * task.rank);
  }
}

// The columns [first, last) of the result for all tokens of a task.
void up(const Tensors& call, const Task& task, int64_t first, int64_t last) {
  const int64_t blocks = task.has_few_rows() ? 1 : (last - first) * task.rank / kBlockB;
  const int64_t width = share_of(last - first, blocks, kVectors * kSums / kRows * kLanes);
  for (int64_t column = first; column < last; column += width) {
    up_tokens(call, task, task.begin, column, std::min(column + width, last));
  }
}

void copy_rows(const Tensors& call, const Task& task) {
  if (call.result == call.y) return;
  for (int64_t token = task.begin; token < task.end; ++token) {
    const int64_t place = task.place(call, token) * call.out;
    std::memcpy(call.result + place, call.y + place, call.out * sizeof(float));
  }
}

// What one thread computes: a task, or some columns of x A or of the result of a large one.
struct Piece {
  const Task* task;
  enum { kAll, kDown, kUp } what;
  int64_t first, last, multiplications;

  void run(const Tensors& call) const {
    if (what == kDown) return down(call, *task, first, last);
    if (what == kUp) return up(call, *task, first, last);
    if (task->rank == 0) return copy_rows(call, *task);
    const bool large = task->rank * std::max(call.in, call.out) > kCached;
    const int64_t size = large ? task->tokens() : kRows;
    Task part = *task;
    for (part.begin = task->begin; part.begin < task->end; part.begin = part.end) {
      part.end = std::min(part.begin + size, task->end);
      down(call, part, 0, part.rank);
      up(call, part, 0, call.out);
    }
  }
};

void run(const Call& context, const Tensors& call, std::vector<Piece>& pieces) {
  int64_t multiplications = 0;
  for (const Piece& piece : pieces) multiplications += piece.multiplications;
  if (pieces.size() > 1 && multiplications >= kParallelFrom) {
    // The largest first: a thread that began it last would keep the others waiting.
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& one, const Piece& other) {
      return one.multiplications > other.multiplications;
    });
    context.parallel(pieces.size(), [&](size_t index) { pieces[index].run(call); });
  } else {
    for (const Piece& piece : pieces) piece.run(call);
  }
}

void run(const Call& context, const Tensors& call, const std::vector<Task>& tasks) {
  std::vector<Piece> pieces, then;
  for (const Task& task : tasks) {
    const int64_t multiplications = task.multiplications(call);
    if (!task.has_few_rows() || multiplications < kDivideFrom) {
      pieces.push_back({&task, Piece::kAll, 0, 0, multiplications});
      continue;
    }
    const int64_t per_column = task.tokens() * call.in;
    for (int64_t first = 0; first < task.rank; first += kDivided) {
      const int64_t last = std::min(first + kDivided, task.rank);
      pieces.push_back({&task, Piece::kDown, first, last, (last - first) * per_column});
    }
    const int64_t width = share_of(call.out, kTasks, kVectors * kLanes);
    for (int64_t first = 0; first < call.out; first += width) {
      const int64_t last = std::min(first + width, call.out);
      then.push_back({&task, Piece::kUp, first, last, (last - first) * task.tokens() * task.rank});
    }
  }
  run(context, call, pieces);
  run(context, call, then);
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
    int64_t low_size = 0;
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
      const int64_t share = share_of(tokens, kTasks, tokens > kTasks * kFewRows ? kRows : kFewRows);
      const int64_t size = std::min(share, kTaskRows);
      for (int64_t token = 0; token < tokens; token += size) {
        tasks.push_back({batch_rows.data() + begin, slot, own_rank, token,
                         std::min(token + size, tokens), nullptr, nullptr});
      }
      low_size += tokens * own_rank;
    }
    const std::unique_ptr<float[]> low(new float[low_size * (1 + kParts)]);
    float* next = low.get();
    for (Task& task : tasks) {
      const int64_t size = task.tokens() * task.rank;
      task.low = next;
      task.sums = next + size;
      next += size * (1 + kParts);
    }
    run(call, tensors, tasks);
  }

 private:
  int64_t target_;
};

}  // namespace

const OrtCustomOp* lora_add() { return operator_of<LoraAdd>(); }

}  // namespace loradeploy
