// What one thread computes of y + (x A) B: x A, then the sum, for a few rows together.
//
// Each number is computed in a fixed order: the sum over `in` in four parts of every fourth element,
// then the sum over the rank, then y. So the result of a row does not depend on other rows, on the
// stored rank, on the number of threads or on the width of vectors.

#pragma once

#include "vectors.h"

#include <algorithm>

namespace loradeploy::lora {

// kSums: sums that stay in registers. kRows: rows that are computed together.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24, kRows = 8;  // of 32 registers
#else
constexpr int kSums = 12, kRows = 4;  // of 16
#endif
constexpr int kParts = 4;    // sums over every fourth element of x
constexpr int kVectors = 4;  // the largest number of vectors of A or B that are used together

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

// result[row][column…] = y + Σ_r low[row][r] B[r][column…], for `vectors` vectors of columns; plus
// the residual, if it is not null
template <int rows, int vectors, int width>
void up_vectors(const float* low, const float* B, int64_t rank, int64_t out, const float* const* y,
                const float* const* residual, float* const* result, int64_t column) {
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
      V sum = load<width>(y[row] + place) + sums[row][v];
      if (residual != nullptr) sum = load<width>(residual[row] + place) + sum;
      store<width>(result[row] + place, sum);
    });
  });
}

template <int rows, int vectors, int width>
void up_from(int64_t column, int64_t last, const float* low, const float* B, int64_t rank,
             int64_t out, const float* const* y, const float* const* residual,
             float* const* result) {
  for (; column + vectors * width <= last; column += vectors * width) {
    up_vectors<rows, vectors, width>(low, B, rank, out, y, residual, result, column);
  }
  if constexpr (vectors > 1) {
    up_from<rows, 1, width>(column, last, low, B, rank, out, y, residual, result);
  } else if constexpr (width > 1) {
    up_from<rows, 1, width / 2>(column, last, low, B, rank, out, y, residual, result);
  }
}

// Adds x A to the sums of `rows` rows, which are one after another.
template <int rows>
void down_rows(const float* const* x, const Block& block, const Sums& sums) {
  constexpr int parts = rows * kParts <= kSums ? kParts : kParts / 2;
  constexpr int vectors = std::clamp(kSums / (rows * parts), 1, kVectors);
  down_from<rows, parts, vectors, kLanes>(block.first, x, block, sums);
}

// result = y + low B, for `rows` rows and `columns` columns; `low`: rows · rank. Plus the residual, if
// it is not null.
template <int rows>
void up_rows(const float* low, const float* B, int64_t rank, int64_t out, const float* const* y,
             const float* const* residual, float* const* result, int64_t columns) {
  constexpr int vectors = std::min(kSums / rows, kVectors);
  up_from<rows, vectors, kLanes>(0, columns, low, B, rank, out, y, residual, result);
}

}  // namespace loradeploy::lora
