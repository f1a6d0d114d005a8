// Whether the processor has the instructions that the library was built with.

#pragma once

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace loradeploy {

#if defined(__x86_64__) || defined(__i386__)

// A bit of what CPUID reports: for a leaf and a subleaf, in register 0 (eax) to 3 (edx).
struct Instructions {
  const char* name;
  unsigned leaf, subleaf, reg, bit;
};

// Those that compilers use on their own for some -march, and those that the kernels use.
inline constexpr Instructions kBuiltWith[] = {
    {"the instructions of x86-64", 1, 0, 3, 26},  // SSE2
#ifdef __SSE4_2__
    {"sse4.2", 1, 0, 2, 20},
#endif
#ifdef __POPCNT__
    {"popcnt", 1, 0, 2, 23},
#endif
#ifdef __MOVBE__
    {"movbe", 1, 0, 2, 22},
#endif
#ifdef __AVX__
    {"avx", 1, 0, 2, 28},
#endif
#ifdef __F16C__
    {"f16c", 1, 0, 2, 29},
#endif
#ifdef __FMA__
    {"fma", 1, 0, 2, 12},
#endif
#ifdef __AVX2__
    {"avx2", 7, 0, 1, 5},
#endif
#ifdef __BMI__
    {"bmi1", 7, 0, 1, 3},
#endif
#ifdef __BMI2__
    {"bmi2", 7, 0, 1, 8},
#endif
#ifdef __LZCNT__
    {"lzcnt", 0x80000001, 0, 2, 5},
#endif
#ifdef __AVX512F__
    {"avx512f", 7, 0, 1, 16},
#endif
#ifdef __AVX512DQ__
    {"avx512dq", 7, 0, 1, 17},
#endif
#ifdef __AVX512BW__
    {"avx512bw", 7, 0, 1, 30},
#endif
#ifdef __AVX512VL__
    {"avx512vl", 7, 0, 1, 31},
#endif
#ifdef __AVX512VNNI__
    {"avx512vnni", 7, 0, 2, 11},
#endif
#ifdef __AVXVNNI__
    {"avxvnni", 7, 1, 0, 4},
#endif
};

// The vector instructions that the kernels use.
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
inline constexpr const char* kVectorInstructions = "AVX-512 with VNNI";
#elif defined(__AVX512F__)
inline constexpr const char* kVectorInstructions = "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__) && defined(__AVXVNNI__)
inline constexpr const char* kVectorInstructions = "AVX2 with VNNI";
#elif defined(__AVX2__) && defined(__FMA__)
inline constexpr const char* kVectorInstructions = "AVX2";
#elif defined(__AVX__)
inline constexpr const char* kVectorInstructions = "AVX";
#else
inline constexpr const char* kVectorInstructions = "SSE2";
#endif

// The registers that the system keeps for each thread: 6 for those of AVX, 0xe6 for AVX-512.
inline bool keeps_registers(unsigned wanted) {
  unsigned registers[4] = {};
  __get_cpuid(1, &registers[0], &registers[1], &registers[2], &registers[3]);
  if (!(registers[2] >> 27 & 1)) return false;  // no XGETBV
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & wanted) == wanted;
}

// The first that the processor lacks, or null. The compilers' own function for it
// (__builtin_cpu_supports) does not know all names, and finds nothing in a library of clang's that
// is linked without libgcc.
inline const char* lacking() {
  for (const Instructions& wanted : kBuiltWith) {
    unsigned found[4] = {};
    if (!__get_cpuid_count(wanted.leaf, wanted.subleaf, &found[0], &found[1], &found[2],
                           &found[3]) ||
        !(found[wanted.reg] >> wanted.bit & 1)) {
      return wanted.name;
    }
  }
#if defined(__AVX512F__)
  if (!keeps_registers(0xe6)) return "avx512f";
#elif defined(__AVX__)
  if (!keeps_registers(6)) return "avx";
#endif
  return nullptr;
}

#else

inline constexpr const char* kVectorInstructions = "the compiler's own vectors";

inline const char* lacking() { return nullptr; }  // not checked

#endif

}  // namespace loradeploy
