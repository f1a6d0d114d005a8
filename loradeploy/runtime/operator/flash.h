// Attention of a few queries to all keys, block by block, which Attention and GroupQueryAttention
// share: softmax(softcap(scale · q kᵀ) + mask) v without the matrix of all scores.
//
// The heads of queries that share a head of keys are computed together, so that keys are read once.
// Keys are divided into blocks of kKeys, beginning with key 0. A row (one query of one head) gets
// from each block its largest score, the sum of e^(score - largest) and the sum of e^… v; blocks are
// merged in their order. Masked keys add exact zeros. So a row's result depends neither on other
// rows, nor on the division into tasks, nor on the number of threads, nor on keys after the last one
// that it sees: a prompt's rows are the same, bit for bit, if it is read in parts.

#pragma once

#include "kernel.h"
#include "vectors.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <thread>

namespace loradeploy {

#if defined(__AVX512F__)
inline constexpr int kVectors = 4;  // vectors of sums that are computed together, for each row
#else
inline constexpr int kVectors = 2;
#endif
inline constexpr int kRows = 6;    // rows that are computed together
inline constexpr int kKeys = 128;   // of a block; a multiple of kVectors · kLanes
inline constexpr int kPanel = kVectors * kLanes;
inline constexpr int64_t kTaskRows = 192;  // the largest number of rows of a task
inline constexpr int64_t kTasks = 16;      // of a call, if it is large enough
// The largest number of rows of a task whose keys are divided among threads.
inline constexpr int64_t kPieceRows = 8 * kRows;
// The number of multiplications from which several threads are faster than one.
inline constexpr int64_t kParallelFrom = 1 << 17;

// Floats [batch, heads, rows, size] at any distances, except that a row is contiguous.
template <typename Float>
struct Rows {
  Float* data;
  int64_t batch, head, row;
  Float* at(int64_t of_batch, int64_t of_head, int64_t of_row) const {
    return data + of_batch * batch + of_head * head + of_row * row;
  }
};

// Which keys a query sees: boolean, or numbers that are added to the scores; or none of both.
struct Mask {
  const uint8_t* seen = nullptr;
  const float* added = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // distances
  bool given() const { return seen != nullptr || added != nullptr; }
};

struct Attention {
  int64_t batch, heads, key_heads, queries, size, value_size;
  float scale, softcap;
  Rows<const float> q, k, v;
  Rows<float> y;
  Mask mask;
  // For each row of the batch: the number of keys, and of those that its first query sees, its
  // second query one more (causal), or kAll.
  std::vector<int64_t> keys, first;
  static constexpr int64_t kAll = std::numeric_limits<int64_t>::max() / 2;

  int64_t group() const { return heads / key_heads; }
  int64_t seen_by(int64_t of_batch, int64_t query) const {
    return std::min(keys[of_batch], first[of_batch] + query);
  }
};

namespace flash {

// The keys of a block that a row sees: from `begin` up to `end`, plus `bias` (null: nothing).
struct Seen {
  int begin = 0, end = 0;
  const float* bias = nullptr;
};

inline bool is_zero(const uint8_t* bytes) {  // eight of them
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word == 0;
}

// `room`: kKeys floats for the bias.
inline Seen seen_in_block(const Attention& own, int64_t batch, int64_t head, int64_t query,
                          int64_t block, float* room) {
  const int64_t visible = own.seen_by(batch, query) - block;
  Seen seen{0, static_cast<int>(std::clamp<int64_t>(visible, 0, kKeys)), nullptr};
  if (!own.mask.given()) return seen;
  const int64_t place = batch * own.mask.batch + head * own.mask.head + query * own.mask.row + block;
  if (own.mask.seen != nullptr) {
    const uint8_t* mask = own.mask.seen + place;
    while (seen.begin + 8 <= seen.end && is_zero(mask + seen.begin)) seen.begin += 8;
    while (seen.begin < seen.end && !mask[seen.begin]) ++seen.begin;
    while (seen.end - 8 >= seen.begin && is_zero(mask + seen.end - 8)) seen.end -= 8;
    while (seen.begin < seen.end && !mask[seen.end - 1]) --seen.end;
    const int count = seen.end - seen.begin;
    if (count > 0 && std::memchr(mask + seen.begin, 0, count) != nullptr) {
      for (int key = seen.begin; key < seen.end; ++key) room[key] = mask[key] ? 0.0f : -kInfinity;
      seen.bias = room;
    }
    return seen;
  }
  // A masked key has -infinity or the lowest float.
  constexpr float lowest = std::numeric_limits<float>::lowest();
  const float* added = own.mask.added + place;
  while (seen.begin < seen.end && added[seen.begin] <= lowest) ++seen.begin;
  while (seen.begin < seen.end && added[seen.end - 1] <= lowest) --seen.end;
  for (int key = seen.begin; key < seen.end; ++key) {
    room[key] = added[key] <= lowest ? -kInfinity : added[key];
    if (room[key] != 0.0f) seen.bias = room;
  }
  return seen;
}

// -- transposed keys -------------------------------------------------------------------------------

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

#ifdef LORADEPLOY_SHUFFLES
// The four floats at `place`, `place + 4 · stride`, …: as many as fit into a vector.
inline Floats fours_at(const float* place, int64_t stride) {
  const auto four = [&](int number) {
    return *reinterpret_cast<const Four*>(place + 4 * number * stride);
  };
#if defined(__AVX512F__)
  const auto low = __builtin_shufflevector(four(0), four(1), 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(four(2), four(3), 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX__)
  return __builtin_shufflevector(four(0), four(1), 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return four(0);
#endif
}

// In each group of four lanes: the lanes of `one` and `other` in turn, from the first or third on;
// and the first or last two lanes of both.
#if defined(__AVX512F__)
#define IN_GROUPS(one, other, a, b, c, d)                                                          \
  __builtin_shufflevector(one, other, a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, \
                          d + 8, a + 12, b + 12, c + 12, d + 12)
#elif defined(__AVX__)
#define IN_GROUPS(one, other, a, b, c, d) \
  __builtin_shufflevector(one, other, a, b, c, d, a + 4, b + 4, c + 4, d + 4)
#else
#define IN_GROUPS(one, other, a, b, c, d) __builtin_shufflevector(one, other, a, b, c, d)
#endif
inline Floats first_in_turn(Floats one, Floats other) {
  return IN_GROUPS(one, other, 0, kLanes, 1, kLanes + 1);
}
inline Floats last_in_turn(Floats one, Floats other) {
  return IN_GROUPS(one, other, 2, kLanes + 2, 3, kLanes + 3);
}
inline Floats first_two(Floats one, Floats other) {
  return IN_GROUPS(one, other, 0, 1, kLanes, kLanes + 1);
}
inline Floats last_two(Floats one, Floats other) {
  return IN_GROUPS(one, other, 2, 3, kLanes + 2, kLanes + 3);
}
#undef IN_GROUPS
#endif

// Writes keys [count, size] as panels [kKeys / kPanel, size, kPanel]; after the last key, zeros up to
// a whole vector.
inline void transpose_keys(const float* keys, int64_t stride, int count, int64_t size, float* out) {
  for (int first = 0; first < count; first += kLanes) {
    float* panel = out + (first / kPanel) * size * kPanel + first % kPanel;
    const float* key = keys + first * stride;
    const int lanes = std::min(kLanes, count - first);
    int64_t i = 0;
#ifdef LORADEPLOY_SHUFFLES
    if (lanes == kLanes) {
      for (; i + 4 <= size; i += 4) {
        const Floats a = fours_at(key + i, stride), b = fours_at(key + i + stride, stride);
        const Floats c = fours_at(key + i + 2 * stride, stride);
        const Floats d = fours_at(key + i + 3 * stride, stride);
        const Floats ab = first_in_turn(a, b), cd = first_in_turn(c, d);
        const Floats last_ab = last_in_turn(a, b), last_cd = last_in_turn(c, d);
        store(panel + i * kPanel, first_two(ab, cd));
        store(panel + (i + 1) * kPanel, last_two(ab, cd));
        store(panel + (i + 2) * kPanel, first_two(last_ab, last_cd));
        store(panel + (i + 3) * kPanel, last_two(last_ab, last_cd));
      }
    }
#endif
    for (; i < size; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {
        panel[i * kPanel + lane] = lane < lanes ? key[lane * stride + i] : 0.0f;
      }
    }
  }
}

// -- products --------------------------------------------------------------------------------------

// scores[row][0…vectors · kLanes) = Σ_i q[row][i] panel[i][…].
template <int rows, int vectors>
void score_vectors(const float* const* queries, const float* panel, int64_t size, float* scores) {
  const float* q[rows];
  for (int row = 0; row < rows; ++row) q[row] = queries[row];
  Floats sums[rows][vectors] = {};
  for (int64_t i = 0; i < size; ++i) {
    Floats k[vectors];
    for (int vector = 0; vector < vectors; ++vector) k[vector] = load(panel + vector * kLanes);
    for (int row = 0; row < rows; ++row) {
      for (int vector = 0; vector < vectors; ++vector) sums[row][vector] += k[vector] * q[row][i];
    }
    panel += kPanel;
  }
  for (int row = 0; row < rows; ++row) {
    for (int vector = 0; vector < vectors; ++vector) {
      store(scores + row * kKeys + vector * kLanes, sums[row][vector]);
    }
  }
}

// The scores of the vectors from `first` up to `last` of a block.
template <int rows>
void score(const float* const* q, const float* panels, int64_t size, int first, int last, float* scores) {
  for (int vector = first; vector < last;) {
    const int in_panel = vector % kVectors;
    const int count = std::min(kVectors - in_panel, last - vector);
    const float* panel = panels + (vector / kVectors) * size * kPanel + in_panel * kLanes;
    float* place = scores + vector * kLanes;
    if (count == 4) {
      if constexpr (kVectors == 4) score_vectors<rows, 4>(q, panel, size, place);
      vector += 4;
    } else if (count >= 2) {
      score_vectors<rows, 2>(q, panel, size, place);
      vector += 2;
    } else {
      score_vectors<rows, 1>(q, panel, size, place);
      vector += 1;
    }
  }
}

// sums[row][0…vectors · kLanes) = Σ_key weights[row][key] v[key][…], of the keys begin…end.
template <int rows, int vectors>
void weigh_vectors(const float* weights, const float* v, int64_t stride, int begin, int end,
                   float* out, int64_t out_stride) {
  Floats sums[rows][vectors] = {};
  for (int key = begin; key < end; ++key) {
    Floats values[vectors];
    for (int vector = 0; vector < vectors; ++vector) {
      values[vector] = load(v + key * stride + vector * kLanes);
    }
    for (int row = 0; row < rows; ++row) {
      for (int vector = 0; vector < vectors; ++vector) {
        sums[row][vector] += values[vector] * weights[row * kKeys + key];
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int vector = 0; vector < vectors; ++vector) {
      store(out + row * out_stride + vector * kLanes, sums[row][vector]);
    }
  }
}

// `size`: a multiple of kLanes.
template <int rows>
void weigh(const float* weights, const float* v, int64_t stride, int begin, int end, float* out,
           int64_t size) {
  int64_t at = 0;
  for (; at + kPanel <= size; at += kPanel) {
    weigh_vectors<rows, kVectors>(weights, v + at, stride, begin, end, out + at, size);
  }
  if constexpr (kVectors > 2) {
    for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
      weigh_vectors<rows, 2>(weights, v + at, stride, begin, end, out + at, size);
    }
  }
  for (; at < size; at += kLanes) {
    weigh_vectors<rows, 1>(weights, v + at, stride, begin, end, out + at, size);
  }
}

template <template <int> class Kernel, typename... Given>
void with_rows(int rows, Given... given) {
  switch (rows) {
    case 1: return Kernel<1>::run(given...);
    case 2: return Kernel<2>::run(given...);
    case 3: return Kernel<3>::run(given...);
    case 4: return Kernel<4>::run(given...);
    case 5: return Kernel<5>::run(given...);
    default: return Kernel<kRows>::run(given...);
  }
}
template <int rows>
struct Score {
  template <typename... Given>
  static void run(Given... given) { score<rows>(given...); }
};
template <int rows>
struct Weigh {
  template <typename... Given>
  static void run(Given... given) { weigh<rows>(given...); }
};

// -- softmax ---------------------------------------------------------------------------------------

// Turns a row's products q k in the vectors first…last into e^(score - largest), and into exact
// zeros where it sees no key. Writes the largest score (-infinity: it sees no key) and the sum.
inline void exponentiate(float* row, const Seen& seen, int first, int last, float scale,
                         float softcap, float* largest, float* sum) {
  Floats most = all(-kInfinity);
  for (int vector = first; vector < last; ++vector) {
    const int key = vector * kLanes;
    Floats score = load(row + key) * scale;
    if (softcap > 0) score = hyperbolic_tangent(score / softcap) * softcap;
    const bool inside = seen.begin <= key && key + kLanes <= seen.end;
    Integers visible{};
    if (!inside) {
      const Integers keys = *reinterpret_cast<const Integers*>(kLaneNumbers) + key;
      visible = (keys >= seen.begin) & (keys < seen.end);
    }
    if (seen.bias != nullptr) {
      Floats bias = all(-kInfinity);
      if (inside) {
        bias = load(seen.bias + key);
      } else {
        float lanes[kLanes];
        store(lanes, bias);
        const int begin = std::max(seen.begin, key), end = std::min(seen.end, key + kLanes);
        for (int at = begin; at < end; ++at) lanes[at - key] = seen.bias[at];
        bias = load(lanes);
      }
      score = score + bias;
    }
    if (!inside) score = visible ? score : all(-kInfinity);
    store(row + key, score);
    most = larger(score, most);
  }
  *largest = largest_of(most);
  // A score of -infinity is an overflow, unlike a key that is not seen: if all are, the result is NaN.
  if (*largest == -kInfinity && seen.begin < seen.end) {
    *largest = std::numeric_limits<float>::lowest();
  }
  const float shift = *largest == -kInfinity ? 0.0f : *largest;  // -inf - -inf is NaN
  Floats sums{};
  for (int vector = first; vector < last; ++vector) {
    const Floats weight = exponential<false>(load(row + vector * kLanes) - shift);
    store(row + vector * kLanes, weight);
    sums = sums + weight;
  }
  *sum = sum_of(sums);
}

// What a row has from one or more blocks.
struct Merged {
  float largest = -kInfinity, sum = 0;
};

// Adds a block's part to a row. Not inlined: its rounding must be the same everywhere.
__attribute__((noinline)) inline void merge(Merged& row, float* values, const Merged& part,
                                            const float* part_values, int64_t size) {
  const float largest = part.largest > row.largest ? part.largest : row.largest;
  const float shift = largest == -kInfinity ? 0.0f : largest;
  Floats exponents{};
  exponents[0] = row.largest - shift;
  exponents[1] = part.largest - shift;
  const Floats factors = exponential<false>(exponents);
  const float own = factors[0], other = factors[1];
  row = {largest, row.sum * own + part.sum * other};
  for (int64_t i = 0; i < size; i += kLanes) {
    store(values + i, load(values + i) * own + load(part_values + i) * other);
  }
}

// -- tasks -----------------------------------------------------------------------------------------

// The queries begin…end of all heads that share `head`, in one row of the batch; and their blocks of
// keys first…last.
struct Task {
  int64_t batch, head, begin, end, first, last;
  float* parts;  // where the parts of its blocks are kept, or null: they are merged at once
};

inline int64_t rounded_up(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

// Memory of one task after the other.
class Scratch {
 public:
  Scratch(const Attention& own, int64_t queries) {
    const int64_t rows = queries * own.group();
    const int64_t width = rounded_up(own.value_size, kLanes);
    const int64_t sizes[] = {kKeys * own.size, kKeys * width, kRows * kKeys,
                             kRows * width,    rows * width,  rows * int64_t{kKeys}};
    int64_t total = 0;
    for (int64_t size : sizes) total += rounded_up(size, 16);
    memory_.reset(new float[total + 16]);
    auto place = reinterpret_cast<uintptr_t>(memory_.get());
    float* next = memory_.get() + (64 - place % 64) % 64 / sizeof(float);
    float** const pointers[] = {&keys, &values, &scores, &sums, &merged_values, &bias};
    for (size_t at = 0; at < std::size(sizes); ++at) {
      *pointers[at] = next;
      next += rounded_up(sizes[at], 16);
    }
    q.resize(rows);
    merged.resize(rows);
    seen.resize(rows);
  }
  float *keys, *values, *scores, *sums, *merged_values, *bias;
  std::vector<const float*> q;
  std::vector<Merged> merged;
  std::vector<Seen> seen;

 private:
  std::unique_ptr<float[]> memory_;
};

// A row of a part: its values [width], then its largest score and its sum.
inline int64_t part_size(const Attention& own) { return rounded_up(own.value_size, kLanes) + 2; }

inline void finish(const Attention& own, const Merged& row, const float* values, int64_t batch,
                   int64_t head, int64_t query) {
  float* y = own.y.at(batch, head, query);
  const float divisor = row.largest == -kInfinity ? 1.0f : row.sum;  // it sees no key: zeros
  int64_t i = 0;
  for (; i + kLanes <= own.value_size; i += kLanes) store(y + i, load(values + i) / divisor);
  for (; i < own.value_size; ++i) y[i] = values[i] / divisor;
}

inline void run(const Attention& own, const Task& task, Scratch& scratch) {
  const int64_t group = own.group(), rows = (task.end - task.begin) * group;
  const int64_t width = rounded_up(own.value_size, kLanes);
  // Row = query · group + head: the rows of a tile see nearly the same keys.
  const auto head_of = [&](int64_t row) { return task.head * group + row % group; };
  const auto query_of = [&](int64_t row) { return task.begin + row / group; };
  for (int64_t row = 0; row < rows; ++row) {
    scratch.q[row] = own.q.at(task.batch, head_of(row), query_of(row));
  }
  const bool keeps = task.parts != nullptr;
  if (!keeps) {
    std::fill_n(scratch.merged.begin(), rows, Merged{});
    std::fill_n(scratch.merged_values, rows * width, 0.0f);
  }
  const int64_t shared = own.mask.head == 0 ? group : 1;  // rows that see the same keys
  for (int64_t block = task.first; block < task.last; ++block) {
    const int64_t first_key = block * kKeys;
    bool sees = false;
    for (int64_t at = 0; at < rows / shared; ++at) {
      Seen& seen = scratch.seen[at];
      seen = seen_in_block(own, task.batch, head_of(at * shared), query_of(at * shared), first_key,
                           scratch.bias + at * kKeys);
      sees = sees || seen.begin < seen.end;
    }
    float* parts = keeps ? task.parts + (block - task.first) * rows * part_size(own) : nullptr;
    if (!sees) {
      for (int64_t row = 0; keeps && row < rows; ++row) {
        float* part = parts + row * part_size(own);
        std::fill_n(part, width, 0.0f);
        part[width] = -kInfinity, part[width + 1] = 0.0f;
      }
      continue;
    }
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, own.keys[task.batch] - first_key));
    transpose_keys(own.k.at(task.batch, task.head, first_key), own.k.row, keys, own.size,
                   scratch.keys);
    const float* values = own.v.at(task.batch, task.head, first_key);
    int64_t value_stride = own.v.row;
    if (own.value_size != width) {
      for (int key = 0; key < keys; ++key) {
        float* to = scratch.values + key * width;
        std::memcpy(to, values + key * value_stride, own.value_size * sizeof(float));
        std::fill(to + own.value_size, to + width, 0.0f);
      }
      values = scratch.values, value_stride = width;
    }
    for (int64_t tile = 0; tile < rows; tile += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, rows - tile));
      int begin = kKeys, end = 0;
      for (int row = 0; row < count; ++row) {
        const Seen& seen = scratch.seen[(tile + row) / shared];
        if (seen.begin >= seen.end) continue;
        begin = std::min(begin, seen.begin), end = std::max(end, seen.end);
      }
      Merged part[kRows];
      if (begin < end) {
        const int first = begin / kLanes, last = (end + kLanes - 1) / kLanes;
        with_rows<Score>(count, scratch.q.data() + tile, scratch.keys, own.size, first, last,
                         scratch.scores);
        for (int row = 0; row < count; ++row) {
          exponentiate(scratch.scores + row * kKeys, scratch.seen[(tile + row) / shared], first,
                       last, own.scale, own.softcap, &part[row].largest, &part[row].sum);
        }
        with_rows<Weigh>(count, scratch.scores, values, value_stride, begin, end, scratch.sums,
                         width);
      } else if (keeps) {
        std::fill_n(scratch.sums, kRows * width, 0.0f);
      } else {
        continue;
      }
      for (int row = 0; row < count; ++row) {
        const float* sums = scratch.sums + row * width;
        if (keeps) {
          float* kept = parts + (tile + row) * part_size(own);
          std::memcpy(kept, sums, width * sizeof(float));
          kept[width] = part[row].largest, kept[width + 1] = part[row].sum;
        } else {
          merge(scratch.merged[tile + row], scratch.merged_values + (tile + row) * width, part[row],
                sums, width);
        }
      }
    }
  }
  for (int64_t row = 0; !keeps && row < rows; ++row) {
    finish(own, scratch.merged[row], scratch.merged_values + row * width, task.batch, head_of(row),
           query_of(row));
  }
}

// The tasks of a call. No result depends on their sizes.
inline std::vector<Task> tasks_of(const Attention& own) {
  const int64_t group = own.group(), pairs = own.batch * own.key_heads;
  // As many queries per task as keep its memory small and all threads busy; whole tiles.
  const int64_t step = kRows / std::gcd<int64_t>(kRows, group);
  const int64_t share = (own.queries * pairs + kTasks - 1) / kTasks;
  const int64_t most = std::max<int64_t>(kTaskRows / group, 1);
  const int64_t least = std::min<int64_t>((4 * kRows + group - 1) / group, most);
  const int64_t size = std::min(rounded_up(std::clamp(share, least, most), step), own.queries);
  std::vector<Task> tasks;
  // The last queries first, as causal ones see the most keys: a thread that began them last would
  // keep the others waiting.
  for (int64_t begin = (own.queries - 1) / size * size; begin >= 0; begin -= size) {
    const int64_t end = std::min(begin + size, own.queries);
    for (int64_t batch = 0; batch < own.batch; ++batch) {
      const int64_t blocks = rounded_up(own.seen_by(batch, end - 1), kKeys) / kKeys;
      for (int64_t head = 0; head < own.key_heads; ++head) {
        tasks.push_back({batch, head, begin, end, 0, blocks, nullptr});
      }
    }
  }
  return tasks;
}

// Calls act(task, scratch) for all tasks on the threads of the session.
template <typename Act>
void in_parallel(const Attention& own, const std::vector<Task>& tasks, const Call& call,
                 const Act& act) {
  int64_t queries = 0;
  for (const Task& task : tasks) queries = std::max(queries, task.end - task.begin);
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  // Asked once: each time takes several system calls.
  static const size_t threads = std::max(std::thread::hardware_concurrency(), 1u);
  call.parallel(std::min(tasks.size(), threads), [&](size_t) {
    size_t at = next++;
    if (at >= tasks.size()) return;
    try {
      Scratch scratch(own, queries);
      for (; at < tasks.size(); at = next++) act(tasks[at], scratch);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

// Divides the keys of a few tasks, such as those of one query with a long past, among the threads:
// the parts of all blocks are kept, and merged as one task would merge them.
inline void attend_in_pieces(const Attention& own, std::vector<Task> tasks, const Call& call) {
  const auto rows_of = [&](const Task& task) { return (task.end - task.begin) * own.group(); };
  int64_t floats = 0;
  for (const Task& task : tasks) floats += task.last * rows_of(task) * part_size(own);
  const std::unique_ptr<float[]> parts(new float[floats]);
  const int64_t share = kTasks / static_cast<int64_t>(tasks.size());
  std::vector<Task> pieces;
  float* place = parts.get();
  for (Task& task : tasks) {
    task.parts = place;
    const int64_t blocks = std::max<int64_t>((task.last + share - 1) / share, 2);
    for (int64_t first = 0; first < task.last; first += blocks) {
      Task piece = task;
      piece.first = first, piece.last = std::min(first + blocks, task.last);
      piece.parts = place;
      place += (piece.last - first) * rows_of(task) * part_size(own);
      pieces.push_back(piece);
    }
  }
  in_parallel(own, pieces, call, [&](const Task& task, Scratch& scratch) {
    run(own, task, scratch);
  });
  const int64_t width = rounded_up(own.value_size, kLanes), group = own.group();
  std::vector<float> values(width);
  for (const Task& task : tasks) {
    for (int64_t row = 0; row < rows_of(task); ++row) {
      Merged merged;
      std::fill(values.begin(), values.end(), 0.0f);
      for (int64_t block = 0; block < task.last; ++block) {
        const float* part = task.parts + (block * rows_of(task) + row) * part_size(own);
        merge(merged, values.data(), {part[width], part[width + 1]}, part, width);
      }
      finish(own, merged, values.data(), task.batch, task.head * group + row % group,
             task.begin + row / group);
    }
  }
}

}  // namespace flash

// Computes the attention on the threads of the session.
inline void attend(const Attention& own, const Call& call) {
  using namespace flash;
  if (own.batch * own.key_heads == 0 || own.queries == 0 || own.value_size == 0) return;
  const std::vector<Task> tasks = tasks_of(own);
  int64_t multiplications = 0, queries = 0;
  for (const Task& task : tasks) {
    const int64_t rows = (task.end - task.begin) * own.group();
    multiplications += rows * task.last * kKeys * (own.size + own.value_size);
    queries = std::max(queries, task.end - task.begin);
  }
  const auto run_one = [&](const Task& task, Scratch& scratch) { run(own, task, scratch); };
  if (multiplications < kParallelFrom) {
    Scratch scratch(own, queries);
    for (const Task& task : tasks) run_one(task, scratch);
  } else if (static_cast<int64_t>(tasks.size()) <= kTasks / 2 &&
             queries * own.group() <= kPieceRows) {
    attend_in_pieces(own, tasks, call);
  } else {
    in_parallel(own, tasks, call, run_one);
  }
}

}  // namespace loradeploy
