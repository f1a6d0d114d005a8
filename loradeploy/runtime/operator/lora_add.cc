// Low-rank updates: y + (x A[id]) B[id] for each row of a batch, on the CPU.
//
//   LoraAdd              y of one layer                              → one output
//   LoraAdd2, LoraAdd3   y of two or three layers, side by side      → an output for each
//   LoraSwiGLU           y of two layers: gate, then up              → silu(gate) · up
//   LoraAddResidual      y of one layer, and a residual              → residual + the sum
//
//   y              float [batch, sequence, out]   the base's product; out is that of all layers
//   x              float [batch, sequence, in]
//   A              float [adapters, in, rank]     padded to the largest rank
//   B              float [adapters, rank, out]    with zeros in rows beyond an adapter's own rank;
//                                                 A and B follow for each further layer
//   adapter_ids    int64 [batch] or [1]           the slot of each row in A and B
//   adapter_ranks  int64 [adapters, targets], or [0, targets]: all adapters have the full rank
//   residual       float [batch, sequence, out], of LoraAddResidual
//   target         attribute of operators of one layer, the column of adapter_ranks
//   targets        attribute of the others, the column for each layer
//   sizes          attribute of the others, `out` of each layer
//
// The factors of an adapter are read once for all of its rows, and only up to its rank. x and y are
// read once: a block of rows goes through all layers while it is in the cache. How each number is
// computed is described in lora.h.

#include "gated.h"
#include "kernel.h"
#include "lora.h"

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace loradeploy {
namespace {

using namespace lora;

constexpr int kLayers = 3;  // the largest number of layers of a call
// Rows of a task: at least kFewRows and at most kTaskRows, a multiple of kRows, so that an adapter
// has kTasks tasks or more.
constexpr int64_t kFewRows = 4, kTaskRows = 32, kTasks = 8;
// A task whose factors have more floats than kCached uses a block of them for all of its rows before
// the next, of kBlockA or kBlockB floats, which stays in the second cache.
constexpr int64_t kCached = 1 << 17, kBlockA = 1 << 15, kBlockB = 1 << 17;
// The number of multiplications from which several threads are faster than one, and from which they
// divide a task of few rows: its factors are then divided by columns, those of A into kDivided.
constexpr int64_t kParallelFrom = 1 << 17, kDivideFrom = 1 << 18, kDivided = 32;
constexpr int64_t kGatedCost = 8;       // multiplications that take as long as silu(gate) · up

// A layer of a call: its factors, and its columns in y and in the result.
struct Layer {
  const float *A, *B, *y;
  float* result;  // null for gate and up
  int64_t stored_rank, out;
};

// The inputs of a call, whose sizes were checked.
struct Tensors {
  const float* x;
  int64_t sequence, in, width;  // width: of y
  int64_t count;                // of layers
  Layer layers[kLayers];
  float* gated;           // the result of LoraSwiGLU; else null
  const float* residual;  // of LoraAddResidual; else null

  int64_t outputs() const { return gated == nullptr ? count : 1; }
};

// x A of the rows of a task.
struct Low {
  int64_t rank;
  float* low;  // rows · rank
};

// Rows of the batch, each `sequence` long, that use the same slot; `begin`, `end`: of their tokens.
struct Task {
  const int64_t* batch_rows;
  int64_t slot, begin, end;
  Low own[kLayers];
  float* sums;  // rows · kParts · rank(), if the factors are used block by block; else null

  int64_t tokens() const { return end - begin; }
  bool has_few_rows() const { return tokens() <= kRows; }
  // The place of a token in x and y.
  int64_t place(const Tensors& call, int64_t token) const {
    return batch_rows[token / call.sequence] * call.sequence + token % call.sequence;
  }
  bool is_large(const Tensors& call) const {
    int64_t size = 0;
    for (int64_t at = 0; at < call.count; ++at) {
      size = std::max(size, own[at].rank * std::max(call.in, call.layers[at].out));
    }
    return size > kCached;
  }
  int64_t rank() const { return own[0].rank + own[1].rank + own[2].rank; }
  // Multiplications for a token and a column of an output.
  int64_t per_column(const Tensors& call, int64_t output) const {
    if (call.gated != nullptr) return own[0].rank + own[1].rank + kGatedCost;
    return own[output].rank + (call.residual == nullptr ? 0 : 1);
  }
  int64_t multiplications(const Tensors& call) const {
    int64_t per_token = 0;
    for (int64_t at = 0; at < call.count; ++at) per_token += own[at].rank * call.in;
    for (int64_t at = 0; at < call.outputs(); ++at) {
      per_token += call.layers[at].out * per_column(call, at);
    }
    return tokens() * per_token;
  }
};

// act(rows, token) for all tokens of a task: kRows at once, then half as many, and so on.
template <int rows = kRows, typename Act>
void each_rows(int64_t token, int64_t end, const Act& act) {
  for (; token + rows <= end; token += rows) act(std::integral_constant<int, rows>(), token);
  if constexpr (rows > 1) {
    if (token < end) each_rows<rows / 2>(token, end, act);
  }
}

// `size` in equal shares, as many as `wanted`, each a multiple of `multiple` (but for the last).
int64_t share_of(int64_t size, int64_t wanted, int64_t multiple) {
  const int64_t shares = std::max<int64_t>(1, wanted);
  return std::max<int64_t>(1, (size + shares * multiple - 1) / (shares * multiple)) * multiple;
}

// Some columns of x A of a layer.
struct Span {
  int64_t layer, first, last;
};

// act(width, columns, before) for all columns of x A of some spans, which are as wide as possible;
// `before`: the number of columns before.
template <int width = kLanes, typename Act>
void each_columns(const Tensors& call, const Task& task, const Span* spans, int64_t count,
                  int64_t before, const Act& act) {
  Columns columns;
  const auto act_on_all = [&] {
    if (columns.count > 0) act(std::integral_constant<int, width>(), columns, before);
    before += columns.count * width;
    columns.count = 0;
  };
  for (int64_t at = 0; at < count; ++at) {
    const Span& span = spans[at];
    const Layer& layer = call.layers[span.layer];
    const Low& own = task.own[span.layer];
    const int64_t size = span.last - span.first, end = span.first + size / width * width;
    int64_t column = width == kLanes ? span.first : span.first + size / (2 * width) * (2 * width);
    for (; column < end; column += width) {
      if (columns.count == kTogether || columns.stride != layer.stored_rank) {
        act_on_all();
      }
      columns.stride = layer.stored_rank;
      columns.A[columns.count] = layer.A + task.slot * call.in * layer.stored_rank + column;
      columns.low[columns.count] = own.low + column;
      columns.rank[columns.count] = own.rank;
      ++columns.count;
    }
  }
  act_on_all();
  if constexpr (width > 1) each_columns<width / 2>(call, task, spans, count, before, act);
}

// Some columns of x A for all tokens of a task.
void down(const Tensors& call, const Task& task, const Span* spans, int64_t count) {
  const int64_t blocks = task.sums == nullptr ? 1 : task.rank() * call.in / kBlockA;
  const int64_t depth = share_of(call.in, blocks, 16 * kParts);
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + depth, call.in);
    each_rows(task.begin, task.end, [&](auto rows, int64_t token) {
      const float* x[rows];
      for (int row = 0; row < rows; ++row) x[row] = call.x + task.place(call, token + row) * call.in;
      alignas(64) float own[rows * kParts * kTogether * kLanes];
      const int64_t row = token - task.begin;
      const auto add = [&](auto width, const Columns& columns, int64_t before) {
        const auto of = [&](auto vectors) {
          float* sums = own;
          if (task.sums != nullptr) {
            sums = task.sums + (before * task.tokens() + row * vectors * width) * kParts;
          }
          down_vectors<rows, vectors, width>(x, begin, end, columns, sums);
          if (end == call.in) add_parts<rows, vectors, width>(sums, row, columns);
        };
        if (columns.count == 3) return of(std::integral_constant<int, 3>());
        if (columns.count == 2) return of(std::integral_constant<int, 2>());
        of(std::integral_constant<int, 1>());
      };
      each_columns(call, task, spans, count, 0, add);
    });
    begin = end;
  } while (begin < call.in);
}

// The columns of a layer from `first` on for `rows` tokens: y + low B in `result`.
template <int rows>
void add_rows(const Tensors& call, const Task& task, int64_t layer, int64_t token, int64_t first,
              int64_t columns, float* const* result) {
  const Layer& own = call.layers[layer];
  const auto [rank, low] = task.own[layer];
  const float *y[rows], *residual[rows];
  for (int row = 0; row < rows; ++row) {
    const int64_t place = task.place(call, token + row);
    y[row] = own.y + place * call.width + first;
    if (call.residual != nullptr) residual[row] = call.residual + place * own.out + first;
  }
  const float* B = own.B + task.slot * own.stored_rank * own.out + first;
  up_rows<rows>(low + (token - task.begin) * rank, B, rank, own.out, y,
                call.residual == nullptr ? nullptr : residual, result, columns);
}

// The columns [first, last) of silu(gate) · up for `rows` tokens.
template <int rows>
void gate_rows(const Tensors& call, const Task& task, int64_t token, int64_t first, int64_t last) {
  Half halves[2];
  const float* y[2][rows];
  float* result[rows];
  const int64_t out = call.layers[0].out;
  for (int row = 0; row < rows; ++row) {
    const int64_t place = task.place(call, token + row);
    for (int layer = 0; layer < 2; ++layer) {
      y[layer][row] = call.layers[layer].y + place * call.width + first;
    }
    result[row] = call.gated + place * out + first;
  }
  for (int layer = 0; layer < 2; ++layer) {
    const auto [rank, low] = task.own[layer];
    const Layer& own = call.layers[layer];
    const float* B = own.B + task.slot * own.stored_rank * out + first;
    halves[layer] = {low + (token - task.begin) * rank, B, rank, y[layer]};
  }
  const int64_t done = gate_rows<rows>(halves[0], halves[1], out, result, last - first);
  const int64_t rest = last - first - done;
  if (rest == 0) return;
  float sums[2][rows][kLanes];
  for (int layer = 0; layer < 2; ++layer) {
    float* own[rows];
    for (int row = 0; row < rows; ++row) {
      own[row] = sums[layer][row];
      std::copy_n(y[layer][row] + done, rest, own[row]);
    }
    if (halves[layer].rank > 0) {
      add_rows<rows>(call, task, layer, token, first + done, rest, own);
    }
  }
  for (int row = 0; row < rows; ++row) {
    multiply_gated(sums[0][row], sums[1][row], result[row] + done, rest);
  }
}

void copy_rows(const Tensors& call, const Task& task, const Layer& layer, int64_t first,
               int64_t last) {
  if (layer.result == layer.y) return;
  for (int64_t token = task.begin; token < task.end; ++token) {
    const int64_t place = task.place(call, token);
    std::memcpy(layer.result + place * layer.out + first, layer.y + place * call.width + first,
                (last - first) * sizeof(float));
  }
}

// The columns [first, last) of an output for all tokens of a task.
void up(const Tensors& call, const Task& task, int64_t output, int64_t first, int64_t last) {
  const Layer& layer = call.layers[output];
  const int64_t per_column = task.per_column(call, output);
  if (per_column == 0) return copy_rows(call, task, layer, first, last);
  const int64_t blocks = task.has_few_rows() ? 1 : (last - first) * per_column / kBlockB;
  const int64_t width = share_of(last - first, blocks, kVectors * kSums / kRows * kLanes);
  for (int64_t column = first; column < last; column += width) {
    const int64_t end = std::min(column + width, last);
    if (call.gated != nullptr) {
      each_rows<kRows / 2>(task.begin, task.end, [&](auto rows, int64_t token) {
        gate_rows<rows>(call, task, token, column, end);
      });
      continue;
    }
    each_rows(task.begin, task.end, [&](auto rows, int64_t token) {
      float* result[rows];
      for (int row = 0; row < rows; ++row) {
        result[row] = layer.result + task.place(call, token + row) * layer.out + column;
      }
      add_rows<rows>(call, task, output, token, column, end - column, result);
    });
  }
}

// What one thread computes: a task, or some columns of x A or of the result of a large one.
struct Piece {
  const Task* task;
  enum { kAll, kDown, kUp } what;
  int64_t at;  // the layer or the output
  int64_t first, last, multiplications;

  void run(const Tensors& call) const {
    if (what == kUp) return up(call, *task, at, first, last);
    Span spans[kLayers] = {{at, first, last}};
    if (what == kDown) return down(call, *task, spans, 1);
    for (int64_t layer = 0; layer < call.count; ++layer) {
      spans[layer] = {layer, 0, task->own[layer].rank};
    }
    down(call, *task, spans, call.count);
    for (int64_t output = 0; output < call.outputs(); ++output) {
      up(call, *task, output, 0, call.layers[output].out);
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

// The columns of x A and of the outputs of a task of few rows, for several threads.
void divide(const Tensors& call, const Task& task, std::vector<Piece>& downs,
            std::vector<Piece>& ups) {
  for (int64_t layer = 0; layer < call.count; ++layer) {
    const int64_t rank = task.own[layer].rank, per_column = task.tokens() * call.in;
    for (int64_t first = 0; first < rank; first += kDivided) {
      const int64_t last = std::min(first + kDivided, rank);
      downs.push_back({&task, Piece::kDown, layer, first, last, (last - first) * per_column});
    }
  }
  for (int64_t output = 0; output < call.outputs(); ++output) {
    const int64_t out = call.layers[output].out;
    const int64_t per_column = task.tokens() * task.per_column(call, output);
    const int64_t width = share_of(out, kTasks, kVectors * kLanes);
    for (int64_t first = 0; first < out; first += width) {
      const int64_t last = std::min(first + width, out);
      ups.push_back({&task, Piece::kUp, output, first, last, (last - first) * per_column});
    }
  }
}

void run(const Call& context, const Tensors& call, const std::vector<Task>& tasks) {
  std::vector<Piece> pieces, then;
  for (const Task& task : tasks) {
    const int64_t multiplications = task.multiplications(call);
    if (!task.has_few_rows() || multiplications < kDivideFrom) {
      pieces.push_back({&task, Piece::kAll, 0, 0, 0, multiplications});
    } else {
      divide(call, task, pieces, then);
    }
  }
  run(context, call, pieces);
  run(context, call, then);
}

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kInteger = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr const char* kNamesOfA[kLayers] = {"A", "A_1", "A_2"};
constexpr const char* kNamesOfB[kLayers] = {"B", "B_1", "B_2"};

// The slot of each row of a batch, and the row, ordered.
std::vector<std::pair<int64_t, int64_t>> rows_by_slot(const Input& ids, int64_t batch,
                                                      int64_t slots) {
  std::vector<std::pair<int64_t, int64_t>> rows(batch);
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t id = ids.as<int64_t>()[ids.shape[0] == 1 ? 0 : row];
    if (id < -slots || id >= slots) {
      throw Refused("adapter_ids has " + std::to_string(id) + ", there are " +
                    std::to_string(slots) + " slots");
    }
    rows[row] = {id < 0 ? id + slots : id, row};
  }
  std::sort(rows.begin(), rows.end());
  return rows;
}

int64_t rank_of(const Input& ranks, int64_t slot, int64_t target, int64_t stored_rank) {
  if (ranks.shape[0] == 0) return stored_rank;
  const int64_t rank = ranks.as<int64_t>()[slot * ranks.shape[1] + target];
  if (rank < 0 || rank > stored_rank) {
    throw Refused("adapter_ranks has " + std::to_string(rank) + ", A has the rank " +
                  std::to_string(stored_rank));
  }
  return rank;
}

// Divides the rows of one slot, `tokens` tokens, into tasks.
void add_tasks(Task task, int64_t tokens, std::vector<Task>& tasks) {
  const int64_t share = share_of(tokens, kTasks, tokens > kTasks * kFewRows ? kRows : kFewRows);
  const int64_t size = std::min(share, kTaskRows);
  for (task.begin = 0; task.begin < tokens; task.begin = task.end) {
    task.end = std::min(task.begin + size, tokens);
    tasks.push_back(task);
  }
}

// The memory for x A of all tasks.
std::unique_ptr<float[]> allocate(const Tensors& call, std::vector<Task>& tasks) {
  const auto parts = [&](const Task& task) {
    return task.is_large(call) && !task.has_few_rows() ? kParts : 0;
  };
  int64_t size = 0;
  for (const Task& task : tasks) size += task.tokens() * task.rank() * (1 + parts(task));
  std::unique_ptr<float[]> memory(new float[size]);
  float* next = memory.get();
  for (Task& task : tasks) {
    for (int64_t layer = 0; layer < call.count; ++layer) {
      task.own[layer].low = next;
      next += task.tokens() * task.own[layer].rank;
    }
    task.sums = parts(task) > 0 ? next : nullptr;
    next += task.tokens() * task.rank() * parts(task);
  }
  return memory;
}

template <int count, bool is_gated = false, bool has_residual = false>
class Update {
  static constexpr size_t kIds = 2 + 2 * count, kRanks = kIds + 1;

 public:
  static constexpr auto inputs = [] {
    std::array<Value, 4 + 2 * count + (has_residual ? 1 : 0)> all{};
    for (Value& own : all) own = {kFloat};
    all[kIds] = all[kRanks] = {kInteger};
    return all;
  }();
  static constexpr auto outputs = [] {
    std::array<Value, is_gated ? 1 : count> all{};
    for (Value& own : all) own = {kFloat};
    return all;
  }();

  static void infer(const ShapeContext& context) {
    for (size_t output = 0; output < outputs.size(); ++output) {
      OpenShape shape = context.input(0);
      const OpenShape B = context.input(3 + 2 * output);
      if (shape.sizes.empty() || B.sizes.empty()) return;
      shape.sizes.back() = B.sizes.back();
      shape.names.back() = B.names.back();
      context.output(output, shape);
    }
  }

  explicit Update(const Node& node) {
    if constexpr (count == 1) {
      targets_ = {node.integer("target")};
    } else {
      targets_ = node.integers("targets");
      sizes_ = node.integers("sizes");
      if (targets_.size() != count || sizes_.size() != count) {
        throw Refused("targets and sizes must have " + std::to_string(count) + " values");
      }
    }
  }

  void compute(const Call& call) const {
    const Input y = call.input(0, "y", 3), x = call.input(1, "x", 3);
    const Input ids = call.input(kIds, "adapter_ids", 1);
    const Input ranks = call.input(kRanks, "adapter_ranks", 2);
    const int64_t batch = x.shape[0], slots = call.input(2, "A", 3).shape[0];
    Tensors tensors{x.as<float>(), x.shape[1], x.shape[2], 0, count, {}, nullptr, nullptr};
    for (int layer = 0; layer < count; ++layer) {
      read_factors(call, layer, slots, tensors);
      tensors.width += tensors.layers[layer].out;
    }
    y.require_shape({batch, tensors.sequence, tensors.width});
    if constexpr (has_residual) {
      const Input residual = call.input(kRanks + 1, "residual");
      residual.require_shape(y.shape);
      tensors.residual = residual.as<float>();
    }
    if (ids.shape[0] != batch) ids.require_shape({1});
    check_ranks(ranks, slots);
    set_outputs(call, y, tensors);
    if (batch == 0 || tensors.sequence == 0 || tensors.width == 0) return;

    const auto rows = rows_by_slot(ids, batch, slots);
    std::vector<int64_t> batch_rows;
    for (const auto& [slot, row] : rows) batch_rows.push_back(row);
    std::vector<Task> tasks;
    for (int64_t row = 0, begin = 0; row < batch; begin = row) {
      Task task{batch_rows.data() + begin, rows[begin].first, 0, 0, {}, nullptr};
      while (row < batch && rows[row].first == task.slot) ++row;
      for (int layer = 0; layer < count; ++layer) {
        const int64_t stored_rank = tensors.layers[layer].stored_rank;
        task.own[layer].rank = rank_of(ranks, task.slot, targets_[layer], stored_rank);
      }
      add_tasks(task, (row - begin) * tensors.sequence, tasks);
    }
    const auto memory = allocate(tensors, tasks);
    run(call, tensors, tasks);
  }

 private:
  void read_factors(const Call& call, int layer, int64_t slots, Tensors& tensors) const {
    const Input A = call.input(2 + 2 * layer, kNamesOfA[layer], 3);
    const Input B = call.input(3 + 2 * layer, kNamesOfB[layer], 3);
    const int64_t rank = A.shape[2], out = count == 1 ? B.shape[2] : sizes_[layer];
    A.require_shape({slots, tensors.in, rank});
    B.require_shape({slots, rank, out});
    tensors.layers[layer] = {A.as<float>(), B.as<float>(), nullptr, nullptr, rank, out};
  }

  void check_ranks(const Input& ranks, int64_t slots) const {
    if (ranks.shape[0] == 0) return;
    ranks.require_shape({slots, ranks.shape[1]});
    for (int64_t target : targets_) {
      if (target < 0 || target >= ranks.shape[1]) {
        throw Refused("target " + std::to_string(target) + " is not in adapter_ranks " +
                      text_of(ranks.shape));
      }
    }
  }

  void set_outputs(const Call& call, const Input& y, Tensors& tensors) const {
    const float* next = y.as<float>();
    for (int layer = 0; layer < count; ++layer) {
      Layer& own = tensors.layers[layer];
      own.y = next;
      next += own.out;
      if (is_gated && own.out != tensors.layers[0].out) {
        throw Refused("gate and up have different sizes");
      }
      if (is_gated && layer > 0) continue;
      Shape shape = y.shape;
      shape.back() = own.out;
      float* result = static_cast<float*>(call.output(layer, shape));
      (is_gated ? tensors.gated : own.result) = result;
    }
  }

  std::vector<int64_t> targets_, sizes_;
};

struct LoraAdd : Update<1> {
  using Update::Update;
  static constexpr const char* name = "LoraAdd";
  static constexpr InPlace in_place[] = {{0, 0}};  // the result may be written over y
};
struct LoraAdd2 : Update<2> {
  using Update::Update;
  static constexpr const char* name = "LoraAdd2";
};
struct LoraAdd3 : Update<3> {
  using Update::Update;
  static constexpr const char* name = "LoraAdd3";
};
struct LoraAddResidual : Update<1, false, true> {
  using Update::Update;
  static constexpr const char* name = "LoraAddResidual";
  static constexpr InPlace in_place[] = {{0, 0}, {6, 0}};  // over y or the residual
};
struct LoraSwiGLU : Update<2, true> {
  using Update::Update;
  static constexpr const char* name = "LoraSwiGLU";
};

}  // namespace

const OrtCustomOp* lora_add() { return operator_of<LoraAdd>(); }
const OrtCustomOp* lora_add_2() { return operator_of<LoraAdd2>(); }
const OrtCustomOp* lora_add_3() { return operator_of<LoraAdd3>(); }
const OrtCustomOp* lora_add_residual() { return operator_of<LoraAddResidual>(); }
const OrtCustomOp* lora_swiglu() { return operator_of<LoraSwiGLU>(); }

}  // namespace loradeploy
