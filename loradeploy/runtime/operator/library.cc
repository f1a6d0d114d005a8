// The library of the operators: what ONNX Runtime and loradeploy call.

#include "kernel.h"
#include "processor.h"

#include <string>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace loradeploy {

// One function per operator; null if this build has no fast kernel for it.
const OrtCustomOp* attention();
const OrtCustomOp* group_query_attention();
const OrtCustomOp* lora_add();
const OrtCustomOp* lora_add_2();
const OrtCustomOp* lora_add_3();
const OrtCustomOp* lora_add_residual();
const OrtCustomOp* lora_swiglu();
const OrtCustomOp* mat_mul_n_bits();
const OrtCustomOp* silu_mul();
const OrtCustomOp* swiglu();

namespace {

// Statics are never destroyed: ONNX Runtime unloads the library while the process ends, and not every
// compiler removes their destructors from those that run then.
const std::vector<const OrtCustomOp*>& operators() {
  static const auto& all = *[] {
    auto* found = new std::vector<const OrtCustomOp*>;
    for (const OrtCustomOp* own :
         {attention(), group_query_attention(), lora_add(), lora_add_2(), lora_add_3(),
          lora_add_residual(), lora_swiglu(), mat_mul_n_bits(), silu_mul(), swiglu()}) {
      if (own != nullptr) found->push_back(own);
    }
    return found;
  }();
  return all;
}

OrtCustomOpDomain* make_domain() {
  OrtCustomOpDomain* domain = nullptr;  // lives as long as the process, as sessions may use it
  check(api->CreateCustomOpDomain("loradeploy", &domain));
  for (const OrtCustomOp* own : operators()) check(api->CustomOpDomain_Add(domain, own));
  return domain;
}

}  // namespace
}  // namespace loradeploy

// The names of the operators, separated by spaces. A graph's calls of others are inlined.
EXPORTED const char* loradeploy_operators() {
  static const auto& names = *[] {
    auto* text = new std::string;
    for (const OrtCustomOp* own : loradeploy::operators()) {
      *text += (text->empty() ? "" : " ") + std::string(own->GetName(own));
    }
    return text;
  }();
  return names.c_str();
}

// Identifies the source that the library was built from.
EXPORTED const char* loradeploy_operator() { return LORADEPLOY_SOURCE; }

// An instruction set that the library was built with and this processor lacks; null if it has all.
EXPORTED const char* loradeploy_operator_lacks() { return loradeploy::lacking(); }

// The vector instructions that the kernels use.
EXPORTED const char* loradeploy_operator_instructions() { return loradeploy::kVectorInstructions; }

EXPORTED OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* found = base->GetApi(kApiVersion);
  if (found == nullptr) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "the operators need onnxruntime 1.18 or later");
  }
  loradeploy::api = found;
  return loradeploy::guarded("loradeploy", [&] {
    static OrtCustomOpDomain* const domain = loradeploy::make_domain();
    loradeploy::check(found->AddCustomOpDomain(options, domain));
  });
}
