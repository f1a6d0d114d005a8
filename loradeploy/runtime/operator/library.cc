// The library of the operators: what ONNX Runtime and loradeploy call.

#include "kernel.h"

#include <string>
#include <vector>

#if defined(__AVXVNNI__)
#include <cpuid.h>
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace loradeploy {

// One function per operator; null if this build has no fast kernel for it.
const OrtCustomOp* attention();
const OrtCustomOp* group_query_attention();
const OrtCustomOp* lora_add();
const OrtCustomOp* mat_mul_n_bits();
const OrtCustomOp* silu_mul();
const OrtCustomOp* swiglu();

namespace {

const std::vector<const OrtCustomOp*>& operators() {
  static const std::vector<const OrtCustomOp*> all = [] {
    std::vector<const OrtCustomOp*> found;
    for (const OrtCustomOp* own : {attention(), group_query_attention(), lora_add(),
                                   mat_mul_n_bits(), silu_mul(), swiglu()}) {
      if (own != nullptr) found.push_back(own);
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
  static const std::string names = [] {
    std::string text;
    for (const OrtCustomOp* own : loradeploy::operators()) {
      text += (text.empty() ? "" : " ") + std::string(own->GetName(own));
    }
    return text;
  }();
  return names.c_str();
}

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
#ifdef __AVX512VNNI__
  LACKS("avx512vnni")
#endif
#ifdef __AVXVNNI__
  // Not all compilers know this name.
  unsigned found = 0, unused = 0;
  if (!__get_cpuid_count(7, 1, &found, &unused, &unused, &unused) || !(found & 16)) {
    return "avxvnni";
  }
#endif
#endif
  return nullptr;
}

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
