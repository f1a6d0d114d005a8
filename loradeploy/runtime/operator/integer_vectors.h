// Vectors of 128-bit lanes for products of 8-bit integers, for the processors that have fast ones.
//
// LORADEPLOY_INTEGER_VECTORS is defined if this processor is one of them, and LORADEPLOY_DOT_PRODUCTS
// if one instruction adds four products to a sum.
//
// A lane holds four columns: 4 integers of 32 bits, or 16 bytes, four of each column. kLanes lanes
// are one vector, and each of them belongs to another block.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define LORADEPLOY_INTEGER_VECTORS
#define LORADEPLOY_DOT_PRODUCTS
#include <immintrin.h>

namespace loradeploy {

constexpr int kLanes = 4;
// Rows and vectors of columns that are multiplied together: all sums stay in registers.
template <int bits>
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
using Integers = __m512i;
using Floats = __m512;

inline Integers load(const void* from) { return _mm512_loadu_si512(from); }
inline void store(void* to, Integers value) { _mm512_storeu_si512(to, value); }
inline Floats load_floats(const void* from) { return _mm512_loadu_ps(from); }
inline void store_floats(void* to, Floats value) { _mm512_storeu_ps(to, value); }
inline Integers all_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline Integers zeros() { return _mm512_setzero_si512(); }
inline Floats float_zeros() { return _mm512_setzero_ps(); }

// A vector of lane(0), lane(1), …
template <typename Lane>
__attribute__((always_inline)) inline Integers joined(const Lane& lane) {
  Integers all = _mm512_castsi128_si512(lane(0));
  all = _mm512_inserti32x4(all, lane(1), 1);
  all = _mm512_inserti32x4(all, lane(2), 2);
  return _mm512_inserti32x4(all, lane(3), 3);
}

// The 16 bytes number `piece` of each of the first `count` blocks of `stride` bytes; zeros for others.
template <int stride>
__attribute__((always_inline)) inline Integers lanes_at(const uint8_t* blocks, int piece, int count) {
  if constexpr (stride == 16) {
    if (count == kLanes) return load(blocks);
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << (4 * count)) - 1), blocks);
  }
  if constexpr (stride == 32) {  // fewer loads, of which both pieces use each
    if (count == kLanes) {
      const Integers one = load(blocks), other = load(blocks + 64);
      return piece == 0 ? _mm512_shuffle_i32x4(one, other, 0x88)
                        : _mm512_shuffle_i32x4(one, other, 0xdd);
    }
  }
  const uint8_t* from = blocks + 16 * piece;
  const auto lane = [&](int index) {
    return index < count ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + index * stride))
                         : _mm_setzero_si128();
  };
  return joined(lane);
}

// The 16 bytes at `from` of every fourth column.
inline Integers every_fourth(const uint8_t* const* columns, int64_t from) {
  const auto lane = [&](int index) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns[4 * index] + from));
  };
  return joined(lane);
}

// Numbers of the first `count` blocks of four columns, [column][block] → [block][column].
inline Floats scales_at(const float* const* columns, int count) {
  const __mmask8 mask = static_cast<__mmask8>((1u << count) - 1);
  Floats all = _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, columns[0]));
  all = _mm512_insertf32x4(all, _mm_maskz_loadu_ps(mask, columns[1]), 1);
  all = _mm512_insertf32x4(all, _mm_maskz_loadu_ps(mask, columns[2]), 2);
  all = _mm512_insertf32x4(all, _mm_maskz_loadu_ps(mask, columns[3]), 3);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, all);
}

// Bytes [column][4][4] of four vectors → [4][column][4].
inline void transpose(Integers (&v)[4]) {
  const Integers a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const Integers c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c);
  v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d);
  v[3] = _mm512_unpackhi_epi64(b, d);
}

// Each lane's 32 bits at `index` in the whole lane.
template <int index>
Integers spread(Integers v) {
  return _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(index * 0x55));
}

// Of each eight bytes those at even places, then those at odd places.
inline Integers evens_first(Integers v) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(order));
}

inline Integers low_nibbles(Integers v) { return _mm512_and_si512(v, all_bytes(15)); }
inline Integers high_nibbles(Integers v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }

// What is subtracted from weights of 8 bits before they are multiplied.
constexpr int kOffset = 0;
inline Integers without_offset(Integers weights) { return weights; }

// The sum of products of weights and activations (signed), which begins with `start`. The start is
// given twice, so that kernels can add it first or last.
template <int bits>
struct Sum {
  Integers sum;
  void begin(Integers start) { sum = start; }
  void add(Integers weights, Integers x) { sum = _mm512_dpbusd_epi32(sum, weights, x); }
  void widen() {}  // after at most eight steps of four products
  Integers total(Integers) const { return sum; }
};

// Products of two integers of 16 bits.
inline Integers multiply_short(Integers a, Integers b) { return _mm512_madd_epi16(a, b); }
inline Integers subtract(Integers a, Integers b) { return _mm512_sub_epi32(a, b); }
inline Integers and_bits(Integers a, Integers b) { return _mm512_and_si512(a, b); }
inline Integers all_integers(int value) { return _mm512_set1_epi32(value); }
inline Floats all_floats(float value) { return _mm512_set1_ps(value); }

inline Floats to_floats(Integers v) { return _mm512_cvtepi32_ps(v); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }

// The sum of the four lanes, of which each belongs to another part.
inline void store_sum(float* to, const Floats (&parts)[1]) {
  const __m128 first = _mm_add_ps(_mm512_castps512_ps128(parts[0]),
                                  _mm512_extractf32x4_ps(parts[0], 1));
  const __m128 second = _mm_add_ps(_mm512_extractf32x4_ps(parts[0], 2),
                                   _mm512_extractf32x4_ps(parts[0], 3));
  _mm_storeu_ps(to, _mm_add_ps(first, second));
}

// The largest magnitude of `count` numbers, a multiple of 16; infinite or not a number if one is.
inline float largest(const float* x, int count) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16) {
    const __m512i own = _mm512_and_si512(load(x + i), _mm512_set1_epi32(0x7fffffff));
    most = _mm512_max_epi32(most, own);
  }
  const int bits = _mm512_reduce_max_epi32(most);
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// x · factor, rounded to nearest, ties to even.
inline void round_to_bytes(const float* x, int count, float factor, uint8_t* result) {
  for (int i = 0; i < count; i += 16) {
    const __m512i own = _mm512_cvtps_epi32(_mm512_mul_ps(load_floats(x + i), _mm512_set1_ps(factor)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(result + i), _mm512_cvtepi32_epi8(own));
  }
}

}  // namespace loradeploy

#elif defined(__AVX2__) && defined(__FMA__)
#define LORADEPLOY_INTEGER_VECTORS
#include <immintrin.h>

namespace loradeploy {

constexpr int kLanes = 2;
constexpr int kTileVectors = 2;
using Integers = __m256i;
using Floats = __m256;

inline Integers load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline void store(void* to, Integers value) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}
inline Floats load_floats(const void* from) {
  return _mm256_loadu_ps(static_cast<const float*>(from));
}
inline void store_floats(void* to, Floats value) {
  _mm256_storeu_ps(static_cast<float*>(to), value);
}
inline Integers all_bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
inline Integers zeros() { return _mm256_setzero_si256(); }
inline Floats float_zeros() { return _mm256_setzero_ps(); }

template <int stride>
Integers lanes_at(const uint8_t* blocks, int piece, int count) {
  const uint8_t* from = blocks + 16 * piece;
  const auto lane = [&](int index) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + index * stride));
  };
  return _mm256_set_m128i(count > 1 ? lane(1) : _mm_setzero_si128(), lane(0));
}

inline Integers every_fourth(const uint8_t* const* columns, int64_t from) {
  const auto lane = [&](int index) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns[4 * index] + from));
  };
  return _mm256_set_m128i(lane(1), lane(0));
}

inline Floats scales_at(const float* const* columns, int count) {
  const auto both = [&](int column) {
    if (count == 1) return _mm_load_ss(columns[column]);
    return _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(columns[column])));
  };
  const __m128 first = _mm_movelh_ps(both(0), both(1)), last = _mm_movelh_ps(both(2), both(3));
  return _mm256_set_m128(_mm_shuffle_ps(first, last, 0xdd), _mm_shuffle_ps(first, last, 0x88));
}

inline void transpose(Integers (&v)[4]) {
  const Integers a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const Integers c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm256_unpacklo_epi64(a, c);
  v[1] = _mm256_unpackhi_epi64(a, c);
  v[2] = _mm256_unpacklo_epi64(b, d);
  v[3] = _mm256_unpackhi_epi64(b, d);
}

template <int index>
Integers spread(Integers v) {
  return _mm256_shuffle_epi32(v, index * 0x55);
}

inline Integers evens_first(Integers v) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order));
}

inline Integers low_nibbles(Integers v) { return _mm256_and_si256(v, all_bytes(15)); }
inline Integers high_nibbles(Integers v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

#if defined(__AVXVNNI__)
#define LORADEPLOY_DOT_PRODUCTS
template <int bits>
constexpr int kTileRows = 4;
constexpr int kOffset = 0;
inline Integers without_offset(Integers weights) { return weights; }

template <int bits>
struct Sum {
  Integers sum;
  void begin(Integers start) { sum = start; }
  void add(Integers weights, Integers x) { sum = _mm256_dpbusd_avx_epi32(sum, weights, x); }
  void widen() {}
  Integers total(Integers) const { return sum; }
};
#else
template <int bits>
constexpr int kTileRows = bits == 4 ? 6 : 4;

// _mm256_maddubs_epi16 needs a first factor without a sign, and a sum of two products that fits in
// 16 bits: |w| times x with the sign of w is at most 128 · 127.
constexpr int kOffset = 128;
inline Integers without_offset(Integers weights) {
  return _mm256_xor_si256(weights, all_bytes(kOffset));
}

template <int bits>
struct Sum {
  Integers sum;
  void begin(Integers) { sum = zeros(); }
  void add(Integers weights, Integers x) {
    const Integers pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    asm("" : "+x"(sum));  // or the compiler adds in another order, with more registers
  }
  void widen() {}
  Integers total(Integers start) const { return _mm256_add_epi32(sum, start); }
};

// The sums of eight steps fit in 16 bits: 8 · 2 · 15 · 127.
template <>
struct Sum<4> {
  Integers sum, pairs;
  void begin(Integers) { sum = pairs = zeros(); }
  void add(Integers weights, Integers x) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(weights, x));
    asm("" : "+x"(pairs));
  }
  void widen() {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    pairs = zeros();
  }
  Integers total(Integers start) const { return _mm256_add_epi32(sum, start); }
};
#endif

// Of each of four vectors the sum of the low lane, then of each the sum of the high lane.
inline Integers lane_sums(const Integers (&v)[4]) {
  const Integers a = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]),
                                      _mm256_unpackhi_epi32(v[0], v[1]));
  const Integers b = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]),
                                      _mm256_unpackhi_epi32(v[2], v[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

// A lane for each of two vectors: the sum of its lanes.
inline Integers lanes_added(Integers one, Integers other) {
  return _mm256_add_epi32(_mm256_permute2x128_si256(one, other, 0x20),
                          _mm256_permute2x128_si256(one, other, 0x31));
}

inline Integers lower_lane(const void* from) {
  return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

// The bytes at even places of 64, then those at odd places.
inline void store_evens_first(const uint8_t* from, uint8_t* to) {
  const auto parted = [](Integers v) {
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi32(evens_first(v), 0xd8), 0xd8);
  };
  const Integers one = parted(load(from)), other = parted(load(from + 32));
  store(to, _mm256_permute2x128_si256(one, other, 0x20));
  store(to + 32, _mm256_permute2x128_si256(one, other, 0x31));
}

inline Integers multiply_short(Integers a, Integers b) { return _mm256_madd_epi16(a, b); }
inline Integers subtract(Integers a, Integers b) { return _mm256_sub_epi32(a, b); }
inline Integers and_bits(Integers a, Integers b) { return _mm256_and_si256(a, b); }
inline Integers all_integers(int value) { return _mm256_set1_epi32(value); }
inline Floats all_floats(float value) { return _mm256_set1_ps(value); }

inline Floats to_floats(Integers v) { return _mm256_cvtepi32_ps(v); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }

inline void store_sum(float* to, const Floats (&parts)[2]) {
  const __m128 first = _mm_add_ps(_mm256_castps256_ps128(parts[0]),
                                  _mm256_extractf128_ps(parts[0], 1));
  const __m128 second = _mm_add_ps(_mm256_castps256_ps128(parts[1]),
                                   _mm256_extractf128_ps(parts[1], 1));
  _mm_storeu_ps(to, _mm_add_ps(first, second));
}

inline float largest(const float* x, int count) {
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < count; i += 8) {
    const __m256i own = _mm256_and_si256(load(x + i), _mm256_set1_epi32(0x7fffffff));
    most = _mm256_max_epi32(most, own);
  }
  alignas(32) int32_t all[8];
  store(all, most);
  int32_t bits = 0;
  for (int32_t own : all) bits = own > bits ? own : bits;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void round_to_bytes(const float* x, int count, float factor, uint8_t* result) {
  const __m256 factors = _mm256_set1_ps(factor);
  for (int i = 0; i < count; i += 16) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(load_floats(x + i), factors));
    const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(load_floats(x + i + 8), factors));
    const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(result + i),
                     _mm_packs_epi16(_mm256_castsi256_si128(shorts),
                                     _mm256_extracti128_si256(shorts, 1)));
  }
}

}  // namespace loradeploy

#endif

#ifdef LORADEPLOY_INTEGER_VECTORS
namespace loradeploy {

// Keeps the compiler from loading it again at each use.
inline Integers in_register(Integers v) {
  asm("" : "+x"(v));
  return v;
}

// The four bytes, or the float, at `from` in every column.
inline Integers spread_integer(const void* from) {
  int32_t value;
  std::memcpy(&value, from, sizeof value);
  return all_integers(value);
}
inline Floats spread_float(const void* from) {
  float value;
  std::memcpy(&value, from, sizeof value);
  return all_floats(value);
}

// The sum of `count` signed bytes, a multiple of 32.
inline int32_t sum_of_bytes(const uint8_t* bytes, int count) {
  __m256i sums = _mm256_setzero_si256();
  for (int at = 0; at < count; at += 32) {
    const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + at));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), own);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

}  // namespace loradeploy
#endif
