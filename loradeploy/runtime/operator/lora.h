// What one thread computes of y + (x A) B: x A, then the sum, for a few rows together.
//
// Each number is computed in a fixed order: the sum over `in` in four parts of every fourth element,
// then the sum over the rank, then y. So the result of a row does not depend on other rows, on the
// stored rank, on the number of threads or on the width of vectors.

#pragma once

#include "gated.h"
#include "vectors.h"

#include <algorithm>

namespace loradeploy::lora {

// kSums: sums that stay in registers. kRows: rows that are computed together.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24, kRows = 8;  // of 32 registers
#else
constexpr int kSums = 12, kRows = 4;  // of 16
#endif
constexpr int kParts = 4;     // sums over every fourth element of x
constexpr int kTogether = 3;  // the largest number of vectors of A that are used together
constexpr int kVectors = 4;   // of B

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

// Columns of A that are computed together: vectors of `width` floats, of one layer or of several
// with the same stride from one row of A to the next; and where x A of the first row goes.
struct Columns {
  int count = 0;
  int64_t stride = 0;
  const float* A[kTogether];
  float* low[kTogether];
  int64_t rank[kTogether];  // from one row of x A to the next
};

// Sums over the rows [begin, end) of A, in kParts parts for each row: sums[row][part][vector]. They
// are added to what is there, unless `begin` is 0.
template <int rows, int vectors, int width>
void down_vectors(const float* const* x, int64_t begin, int64_t end, const Columns& columns,
                  float* sums) {
  using V = typename Vector<width>::Type;
  constexpr int whole = rows * vectors * kParts <= kSums ? 1 : rows * vectors * 2 <= kSums ? 2 : 4;
  constexpr int parts = kParts / whole;
  for (int part = 0; part < kParts; part += parts) {
    V own[rows][parts][vectors] = {};
    const auto each_sum = [&](const auto& act) INLINED {
      each<rows>([&](auto row) INLINED {
        each<parts>([&](auto p) INLINED {
          each<vectors>([&](auto v) INLINED {
            act(own[row][p][v], sums + ((row * kParts + part + p) * vectors + v) * width);
          });
        });
      });
    };
    if (begin > 0) each_sum([](V& sum, const float* place) INLINED { sum = load<width>(place); });
    int64_t i = begin + part, offset = i * columns.stride;
    const auto add = [&](auto p) INLINED {
      V a[vectors];
      each<vectors>([&](auto v) INLINED {
        a[v] = load<width>(columns.A[v] + offset + p * columns.stride);
      });
      each<rows>([&](auto row) INLINED {
        const float number = x[row][i + p];
        each<vectors>([&](auto v) INLINED { own[row][p][v] += a[v] * number; });
      });
    };
    for (; i + parts <= end; i += kParts, offset += kParts * columns.stride) each<parts>(add);
    each<parts>([&](auto p) INLINED {
      if (i + p < end) add(p);
    });
    each_sum([](const V& sum, float* place) INLINED { store<width>(place, sum); });
  }
}

// x A of `rows` rows from `first` on = the sums of their parts.
template <int rows, int vectors, int width>
void add_parts(const float* sums, int64_t first, const Columns& columns) {
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < vectors; ++v) {
      const auto part = [&](int number) {
        return load<width>(sums + ((row * kParts + number) * vectors + v) * width);
      };
      store<width>(columns.low[v] + (first + row) * columns.rank[v],
                   (part(0) + part(1)) + (part(2) + part(3)));
    }
  }
}

// Σ_r low[row][r] B[r][column…] for `vectors` vectors of columns
template <int rows, int vectors, int width>
INLINED inline void up_sums(const float* low, const float* B, int64_t rank, int64_t out,
                            typename Vector<width>::Type (&sums)[rows][vectors]) {
  for (int64_t r = 0; r < rank; ++r) {
    typename Vector<width>::Type b[vectors];
    each<vectors>([&](auto v) INLINED { b[v] = load<width>(B + r * out + v * width); });
    each<rows>([&](auto row) INLINED {
      const float number = low[row * rank + r];
      each<vectors>([&](auto v) INLINED { sums[row][v] += b[v] * number; });
    });
  }
}

// result[row][column…] = y + Σ_r low[row][r] B[r][column…], for `vectors` vectors of columns; plus
// the residual, if it is not null
template <int rows, int vectors, int width>
void up_vectors(const float* low, const float* B, int64_t rank, int64_t out, const float* const* y,
                const float* const* residual, float* const* result, int64_t column) {
  using V = typename Vector<width>::Type;
  V sums[rows][vectors] = {};
  up_sums<rows, vectors, width>(low, B + column, rank, out, sums);
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

// result = y + low B, for `rows` rows and `columns` columns; `low`: rows · rank. Plus the residual, if
// it is not null.
template <int rows>
void up_rows(const float* low, const float* B, int64_t rank, int64_t out, const float* const* y,
             const float* const* residual, float* const* result, int64_t columns) {
  constexpr int vectors = std::min(kSums / rows, kVectors);
  up_from<rows, vectors, kLanes>(0, columns, low, B, rank, out, y, residual, result);
}

// A layer of gate and up for some rows: x A, B from the first column on, and y.
struct Half {
  const float *low, *B;
  int64_t rank;
  const float* const* y;
};

// result[row][column…] = silu(gate) · up for `vectors` vectors of columns
template <int rows, int vectors>
void gate_vectors(const Half& gate, const Half& up, int64_t out, float* const* result,
                  int64_t column) {
  Floats sums[2][rows][vectors] = {};
  up_sums<rows, vectors, kLanes>(gate.low, gate.B + column, gate.rank, out, sums[0]);
  up_sums<rows, vectors, kLanes>(up.low, up.B + column, up.rank, out, sums[1]);
  each<rows>([&](auto row) INLINED {
    each<vectors>([&](auto v) INLINED {
      const int64_t place = column + v * kLanes;
      Floats one = load<kLanes>(gate.y[row] + place), other = load<kLanes>(up.y[row] + place);
      if (gate.rank > 0) one = one + sums[0][row][v];
      if (up.rank > 0) other = other + sums[1][row][v];
      store<kLanes>(result[row] + place, gated(one, other));
    });
  });
}

// silu(gate) · up for `rows` rows and the first `columns` columns; returns how many are done: all
// but those of the last part of a vector.
template <int rows>
int64_t gate_rows(const Half& gate, const Half& up, int64_t out, float* const* result,
                  int64_t columns) {
  constexpr int vectors = std::min(kSums / (2 * rows), kVectors);
  int64_t column = 0;
  for (; column + vectors * kLanes <= columns; column += vectors * kLanes) {
    gate_vectors<rows, vectors>(gate, up, out, result, column);
  }
  for (; column + kLanes <= columns; column += kLanes) {
    gate_vectors<rows, 1>(gate, up, out, result, column);
  }
  return column;
}

}  // namespace loradeploy::lora
