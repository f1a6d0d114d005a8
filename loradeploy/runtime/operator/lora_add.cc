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

#include "onnxruntime_abi.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

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
struct Call {
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
void update_rows(const Call& call, const Task& task, int64_t token) {
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

void copy_rows(const Call& call, const Task& task) {
  if (call.result == call.y) return;
  for (int64_t token = task.begin; token < task.end; ++token) {
    const int64_t batch_row = task.batch_rows[token / call.sequence];
    const int64_t place = (batch_row * call.sequence + token % call.sequence) * call.out;
    std::memcpy(call.result + place, call.y + place, call.out * sizeof(float));
  }
}

void run_task(const Call& call, const Task& task) {
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

struct Work {
  Call call;
  std::vector<Task> tasks;
};

void run_task_at(void* work, size_t index) {
  const Work& own = *static_cast<const Work*>(work);
  run_task(own.call, own.tasks[index]);
}

using Shape = std::vector<int64_t>;

// Inputs that do not fit together; what() is the message.
struct Refused : std::exception {
  explicit Refused(std::string why) : message("LoraAdd: " + std::move(why)) {}
  const char* what() const noexcept override { return message.c_str(); }
  std::string message;
};

// An error of ONNX Runtime, which is returned unchanged.
struct Failed {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status != nullptr) throw Failed{status};
}

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(shape[axis]);
  }
  return text + "]";
}

struct Input {
  const char* name;
  Shape shape;
  const void* data;
};

class Kernel {
 public:
  Kernel(const OrtApi& api, const OrtKernelInfo* info) : api_(api) {
    check(api.KernelInfoGetAttribute_int64(info, "target", &target_));
  }

  void compute(OrtKernelContext* context) const {
    const Input y = input(context, 0, "y", 3), x = input(context, 1, "x", 3);
    const Input A = input(context, 2, "A", 3), B = input(context, 3, "B", 3);
    const Input ids = input(context, 4, "adapter_ids", 1);
    const Input ranks = input(context, 5, "adapter_ranks", 2);
    const int64_t batch = x.shape[0], sequence = x.shape[1], in = x.shape[2];
    const int64_t slots = A.shape[0], rank = A.shape[2], out = B.shape[2];
    require_shape(y, {batch, sequence, out});
    require_shape(A, {slots, in, rank});
    require_shape(B, {slots, rank, out});
    if (ids.shape[0] != batch) require_shape(ids, {1});
    const bool has_ranks = ranks.shape[0] != 0;
    if (has_ranks) require_shape(ranks, {slots, ranks.shape[1]});
    if (has_ranks && (target_ < 0 || target_ >= ranks.shape[1])) {
      throw Refused("target " + std::to_string(target_) + " is not in adapter_ranks " +
                    text_of(ranks.shape));
    }
    OrtValue* output = nullptr;
    check(api_.KernelContext_GetOutput(context, 0, y.shape.data(), y.shape.size(), &output));
    void* result = nullptr;
    check(api_.GetTensorMutableData(output, &result));
    if (batch == 0 || sequence == 0 || out == 0) return;

    Work work{{static_cast<const float*>(y.data), static_cast<const float*>(x.data),
               static_cast<const float*>(A.data), static_cast<const float*>(B.data),
               static_cast<float*>(result), sequence, in, rank, out},
              {}};
    // The rows of the batch, ordered by slot.
    const int64_t* own_ids = static_cast<const int64_t*>(ids.data);
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
        own_rank = static_cast<const int64_t*>(ranks.data)[slot * ranks.shape[1] + target_];
        if (own_rank < 0 || own_rank > rank) {
          throw Refused("adapter_ranks has " + std::to_string(own_rank) + ", A has the rank " +
                        std::to_string(rank));
        }
      }
      const int64_t tokens = (row - begin) * sequence;
      const int64_t share = (tokens / kTasks + kRows - 1) / kRows * kRows;
      const int64_t size = std::clamp<int64_t>(share, kRows, kTaskRows);
      for (int64_t token = 0; token < tokens; token += size) {
        work.tasks.push_back({batch_rows.data() + begin, slot, own_rank, token,
                              std::min(token + size, tokens), nullptr});
        low_size += kRows * own_rank;
      }
      multiplications += tokens * own_rank * (in + out);
    }
    std::vector<float> low(low_size);
    float* next = low.data();
    for (Task& task : work.tasks) {
      task.low = next;
      next += kRows * task.rank;
    }
    if (work.tasks.size() > 1 && multiplications >= kParallelFrom) {
      // The largest first: a thread that began it last would keep the others waiting.
      std::stable_sort(work.tasks.begin(), work.tasks.end(), [](const Task& one, const Task& other) {
        return one.rank * (one.end - one.begin) > other.rank * (other.end - other.begin);
      });
      check(api_.KernelContext_ParallelFor(context, run_task_at, work.tasks.size(), 0, &work));
    } else {
      for (const Task& task : work.tasks) run_task(work.call, task);
    }
  }

 private:
  Input input(const OrtKernelContext* context, size_t index, const char* name, size_t axes) const {
    const OrtValue* value = nullptr;
    check(api_.KernelContext_GetInput(context, index, &value));
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api_.GetTensorTypeAndShape(value, &info));
    size_t count = 0;
    OrtStatus* status = api_.GetDimensionsCount(info, &count);
    Shape shape(status == nullptr ? count : 0);
    if (status == nullptr) status = api_.GetDimensions(info, shape.data(), count);
    api_.ReleaseTensorTypeAndShapeInfo(info);
    check(status);
    if (count != axes) {
      throw Refused(std::string(name) + " is " + text_of(shape) + ", expected " +
                    std::to_string(axes) + " axes");
    }
    void* data = nullptr;  // read only: the C API has no function for constant tensors
    check(api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return {name, std::move(shape), data};
  }

  static void require_shape(const Input& input, const Shape& expected) {
    if (input.shape != expected) {
      throw Refused(std::string(input.name) + " is " + text_of(input.shape) + ", expected " +
                    text_of(expected));
    }
  }

  const OrtApi& api_;
  int64_t target_ = 0;
};

const OrtApi* api = nullptr;

// Calls `act`, and returns its error as a status: no exception may leave the library.
template <typename Act>
OrtStatus* guarded(Act act) {
  try {
    act();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const Refused& refused) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, refused.what());
  } catch (const std::exception& problem) {  // out of memory
    return api->CreateStatus(ORT_FAIL, problem.what());
  }
}

OrtCustomOp make_operator() {
  OrtCustomOp own{};
  own.version = kApiVersion;
  own.GetName = [](const OrtCustomOp*) { return "LoraAdd"; };
  own.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  own.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 6; };
  own.GetInputType = [](const OrtCustomOp*, size_t index) {
    return index < 4 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  };
  own.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  own.GetOutputType = [](const OrtCustomOp*, size_t) {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  };
  own.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  own.GetOutputCharacteristic = own.GetInputCharacteristic;
  own.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  own.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  own.GetEndVersion = own.GetStartVersion;
  own.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* given, const OrtKernelInfo* info,
                          void** kernel) {
    return guarded([&] { *kernel = new Kernel(*given, info); });
  };
  own.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
  };
  own.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  own.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
    OrtTensorTypeAndShapeInfo* y = nullptr;
    OrtStatus* status = api->ShapeInferContext_GetInputTypeShape(context, 0, &y);
    return status != nullptr ? status : api->ShapeInferContext_SetOutputTypeShape(context, 0, y);
  };
  // The result may be written over y.
  own.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
    *inputs = new int[1]{0};
    *outputs = new int[1]{0};
    return 1;
  };
  own.ReleaseMayInplace = [](int* inputs, int* outputs) {
    delete[] inputs;
    delete[] outputs;
  };
  return own;
}

OrtCustomOpDomain* make_domain() {
  static const OrtCustomOp own = make_operator();
  OrtCustomOpDomain* domain = nullptr;  // lives as long as the process, as sessions may use it
  check(api->CreateCustomOpDomain("loradeploy", &domain));
  check(api->CustomOpDomain_Add(domain, &own));
  return domain;
}

}  // namespace

// Identifies the source that the library was built from.
EXPORTED const char* loradeploy_operator() { return LORADEPLOY_SOURCE; }

// An instruction set that the library was built with and this processor lacks; null if it has all.
EXPORTED const char* loradeploy_operator_lacks() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#define LACKS(name) \
  if (!__builtin_cpu_supports(name)) return name;
#ifdef __SSE4_2__
  LACKS("sse4.2")
#endif
#ifdef __AVX__
  LACKS("avx")
#endif
#ifdef __AVX2__
  LACKS("avx2")
#endif
#ifdef __FMA__
  LACKS("fma")
#endif
#ifdef __BMI2__
  LACKS("bmi2")
#endif
#ifdef __AVX512F__
  LACKS("avx512f")
#endif
#ifdef __AVX512VL__
  LACKS("avx512vl")
#endif
#ifdef __AVX512BW__
  LACKS("avx512bw")
#endif
#ifdef __AVX512DQ__
  LACKS("avx512dq")
#endif
#endif
  return nullptr;
}

EXPORTED OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* found = base->GetApi(kApiVersion);
  if (found == nullptr) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "LoraAdd needs onnxruntime 1.18 or later");
  }
  api = found;
  return guarded([&] {
    static OrtCustomOpDomain* const domain = make_domain();
    check(api->AddCustomOpDomain(options, domain));
  });
}
