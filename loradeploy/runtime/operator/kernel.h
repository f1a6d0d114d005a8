// What the operators' kernels share: a node's attributes, a call's inputs and outputs, errors, and
// the description of a kernel that ONNX Runtime registers.
//
// A kernel is a class with
//   static constexpr const char* name               the operator
//   static constexpr Value inputs[], outputs[]      their types
//   static constexpr InPlace in_place[]             outputs that may be written over inputs (if any)
//   static void infer(const ShapeContext&)          shapes of outputs before a run (if known)
//   explicit Kernel(const Node&)                    reads attributes; throws Refused
//   void compute(const Call&) const                 throws Refused if inputs do not fit together
// and its source has a function that returns operator_of<Kernel>(), or null if this build has no fast
// kernel for the processor; library.cc lists these functions.

#pragma once

#include "onnxruntime_abi.h"

#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace loradeploy {

inline const OrtApi* api = nullptr;  // set when the library is registered

using Shape = std::vector<int64_t>;

// Inputs or attributes that do not fit; what() is the message, without the operator's name.
struct Refused : std::exception {
  explicit Refused(std::string why) : message(std::move(why)) {}
  const char* what() const noexcept override { return message.c_str(); }
  std::string message;
};

// An error of ONNX Runtime, which is returned unchanged.
struct Failed {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw Failed{status};
}

// Calls `act`, and returns its error as a status: no exception may leave the library.
template <typename Act>
OrtStatus* guarded(const char* name, Act act) {
  try {
    act();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const Refused& refused) {
    const std::string message = std::string(name) + ": " + refused.message;
    return api->CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
  } catch (const std::exception& problem) {  // out of memory
    return api->CreateStatus(ORT_FAIL, problem.what());
  }
}

inline std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(shape[axis]);
  }
  return text + "]";
}

// The node of a kernel, when the session is opened.
class Node {
 public:
  explicit Node(const OrtKernelInfo* info) : info_(info) {}

  int64_t integer(const char* attribute) const {
    int64_t value = 0;
    check(api->KernelInfoGetAttribute_int64(info_, attribute, &value));
    return value;
  }
  int64_t integer(const char* attribute, int64_t otherwise) const {
    int64_t value = otherwise;
    return has(api->KernelInfoGetAttribute_int64(info_, attribute, &value)) ? value : otherwise;
  }
  std::vector<int64_t> integers(const char* attribute) const {
    size_t size = 0;
    check(api->KernelInfoGetAttributeArray_int64(info_, attribute, nullptr, &size));
    std::vector<int64_t> values(size);
    check(api->KernelInfoGetAttributeArray_int64(info_, attribute, values.data(), &size));
    return values;
  }
  float number(const char* attribute, float otherwise) const {
    float value = otherwise;
    return has(api->KernelInfoGetAttribute_float(info_, attribute, &value)) ? value : otherwise;
  }
  std::string text(const char* attribute, const char* otherwise) const {
    size_t size = 0;
    if (!has(api->KernelInfoGetAttribute_string(info_, attribute, nullptr, &size))) {
      return otherwise;
    }
    std::string value(size, '\0');
    check(api->KernelInfoGetAttribute_string(info_, attribute, value.data(), &size));
    while (!value.empty() && value.back() == '\0') value.pop_back();
    return value;
  }
  const OrtKernelInfo* info() const { return info_; }

 private:
  static bool has(OrtStatus* status) {
    if (status != nullptr) api->ReleaseStatus(status);
    return status == nullptr;
  }
  const OrtKernelInfo* info_;
};

// An input of a call; `data` is null if an optional input is not given.
struct Input {
  const char* name;
  ONNXTensorElementDataType type;
  Shape shape;
  const void* data;

  bool given() const { return data != nullptr || !shape.empty(); }
  template <typename Element>
  const Element* as() const {
    return static_cast<const Element*>(data);
  }
  void require_axes(size_t axes) const {
    if (shape.size() != axes) {
      throw Refused(std::string(name) + " is " + text_of(shape) + ", expected " +
                    std::to_string(axes) + " axes");
    }
  }
  void require_shape(const Shape& expected) const {
    if (shape != expected) {
      throw Refused(std::string(name) + " is " + text_of(shape) + ", expected " +
                    text_of(expected));
    }
  }
};

// A call of a kernel.
class Call {
 public:
  explicit Call(OrtKernelContext* context) : context_(context) {}

  // An input with a number of axes.
  Input input(size_t index, const char* name, size_t axes) const {
    Input found = input(index, name);
    found.require_axes(axes);
    return found;
  }
  // An input with any number of axes. It may be optional.
  Input input(size_t index, const char* name) const {
    const OrtValue* value = nullptr;
    size_t inputs = 0;
    check(api->KernelContext_GetInputCount(context_, &inputs));
    if (index < inputs) check(api->KernelContext_GetInput(context_, index, &value));
    if (value == nullptr) return {name, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}, nullptr};
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api->GetTensorTypeAndShape(value, &info));
    size_t count = 0;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    OrtStatus* status = api->GetTensorElementType(info, &type);
    if (status == nullptr) status = api->GetDimensionsCount(info, &count);
    Shape shape(status == nullptr ? count : 0);
    if (status == nullptr) status = api->GetDimensions(info, shape.data(), count);
    api->ReleaseTensorTypeAndShapeInfo(info);
    check(status);
    void* data = nullptr;  // read only: the C API has no function for constant tensors
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return {name, type, std::move(shape), data};
  }
  // The data of an output, or null if the node does not have it.
  void* output(size_t index, const Shape& shape) const {
    size_t outputs = 0;
    check(api->KernelContext_GetOutputCount(context_, &outputs));
    if (index >= outputs) return nullptr;
    OrtValue* value = nullptr;
    check(api->KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    if (value == nullptr) return nullptr;
    void* data = nullptr;
    check(api->GetTensorMutableData(value, &data));
    return data;
  }
  // Runs act(0), …, act(count - 1) on the threads of the session; `act` must not throw.
  template <typename Act>
  void parallel(size_t count, const Act& act) const {
    const auto task = [](void* state, size_t index) { (*static_cast<const Act*>(state))(index); };
    check(api->KernelContext_ParallelFor(context_, task, count, 0, const_cast<Act*>(&act)));
  }

 private:
  OrtKernelContext* context_;
};

// A shape before a run: an unknown size is -1, and may have a name.
struct OpenShape {
  Shape sizes;
  std::vector<std::string> names;  // as many as sizes
};

// Shapes of a node before a run. ONNX Runtime has none for nodes that leave out an optional input
// before a given one: kernels of such operators must not infer shapes.
class ShapeContext {
 public:
  explicit ShapeContext(OrtShapeInferContext* context) : context_(context) {}

  OpenShape input(size_t index) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
    check(api->ShapeInferContext_GetInputTypeShape(context_, index, &info));
    size_t count = 0;
    check(api->GetDimensionsCount(info, &count));
    OpenShape shape{Shape(count), {}};
    std::vector<const char*> names(count);
    check(api->GetDimensions(info, shape.sizes.data(), count));
    check(api->GetSymbolicDimensions(info, names.data(), count));
    shape.names.assign(names.begin(), names.end());
    return shape;
  }
  int64_t integer(const char* attribute) const {
    const OrtOpAttr* found = nullptr;  // owned by the context
    int64_t value = 0;
    size_t size = 0;
    check(api->ShapeInferContext_GetAttribute(context_, attribute, &found));
    check(api->ReadOpAttr(found, ORT_OP_ATTR_INT, &value, sizeof value, &size));
    return value;
  }
  // ONNX Runtime reports a shape that is not known at all as one without axes.
  void output(size_t index, const OpenShape& shape) const {
    if (shape.sizes.empty()) return;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api->CreateTensorTypeAndShapeInfo(&info));
    std::vector<const char*> names;
    for (const std::string& name : shape.names) names.push_back(name.c_str());
    OrtStatus* status = api->SetDimensions(info, shape.sizes.data(), shape.sizes.size());
    if (status == nullptr) status = api->SetSymbolicDimensions(info, names.data(), names.size());
    if (status == nullptr) {
      status = api->ShapeInferContext_SetOutputTypeShape(context_, index, info);
    }
    api->ReleaseTensorTypeAndShapeInfo(info);
    check(status);
  }

 private:
  OrtShapeInferContext* context_;
};

// The type of an input or output of an operator. UNDEFINED: any type.
struct Value {
  ONNXTensorElementDataType type;
  bool optional = false;
};

inline OrtCustomOpInputOutputCharacteristic characteristic_of(const Value& value) {
  return value.optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

// An output that may be written over an input.
struct InPlace {
  int input, output;
};

template <typename Kernel, typename = void>
struct Infers : std::false_type {};
template <typename Kernel>
struct Infers<Kernel, std::void_t<decltype(&Kernel::infer)>> : std::true_type {};
template <typename Kernel, typename = void>
struct IsInPlace : std::false_type {};
template <typename Kernel>
struct IsInPlace<Kernel, std::void_t<decltype(Kernel::in_place[0])>> : std::true_type {};

// What ONNX Runtime registers for a kernel. It lives as long as the process.
template <typename Kernel>
const OrtCustomOp* operator_of() {
  static const OrtCustomOp row = [] {
    OrtCustomOp own{};
    own.version = kApiVersion;
    own.GetName = [](const OrtCustomOp*) { return Kernel::name; };
    own.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    own.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::inputs); };
    own.GetInputType = [](const OrtCustomOp*, size_t at) { return Kernel::inputs[at].type; };
    own.GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::outputs); };
    own.GetOutputType = [](const OrtCustomOp*, size_t at) { return Kernel::outputs[at].type; };
    own.GetInputCharacteristic = [](const OrtCustomOp*, size_t at) {
      return characteristic_of(Kernel::inputs[at]);
    };
    own.GetOutputCharacteristic = [](const OrtCustomOp*, size_t at) {
      return characteristic_of(Kernel::outputs[at]);
    };
    own.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    own.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    own.GetEndVersion = own.GetStartVersion;
    own.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info,
                            void** kernel) {
      return guarded(Kernel::name, [&] { *kernel = new Kernel(Node(info)); });
    };
    own.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded(Kernel::name,
                     [&] { static_cast<const Kernel*>(kernel)->compute(Call(context)); });
    };
    own.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    if constexpr (Infers<Kernel>::value) {
      own.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
        return guarded(Kernel::name, [&] { Kernel::infer(ShapeContext(context)); });
      };
    }
    if constexpr (IsInPlace<Kernel>::value) {
      own.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
        constexpr size_t count = std::size(Kernel::in_place);
        *inputs = new int[count];
        *outputs = new int[count];
        for (size_t at = 0; at < count; ++at) {
          (*inputs)[at] = Kernel::in_place[at].input;
          (*outputs)[at] = Kernel::in_place[at].output;
        }
        return count;
      };
      own.ReleaseMayInplace = [](int* inputs, int* outputs) {
        delete[] inputs;
        delete[] outputs;
      };
    }
    return own;
  }();
  return &row;
}

}  // namespace loradeploy
