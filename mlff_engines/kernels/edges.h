// The edges of a graph in the order in which they are used.

#pragma once

#include "workspace.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace mlff {

template <typename T>
struct Edge {
  T u[3];           // direction
  T t;              // where in its interval, -1 to 1
  T inverse;        // 1/r
  int32_t interval; // of the table
  int32_t centre, neighbour;
};

// Edges within the cutoff: by centre, and `incoming` by neighbour.
template <typename T>
struct Edges {
  Edges(
      const at::Tensor& edge_index, const at::Tensor& edge_vec, int64_t atoms, int64_t intervals, double start,
      double cutoff)
      : row(atoms + 1), column(atoms + 1), edge(edge_vec.size(0)), input(edge_vec.size(0)), incoming(edge_vec.size(0))
  {
    const int64_t total = edge_vec.size(0);
    const int64_t *centre = edge_index.const_data_ptr<int64_t>(), *neighbour = centre + total;
    const T* vectors = edge_vec.const_data_ptr<T>();
    Buffer<int32_t> rank(total);
    std::fill_n(row.get(), atoms + 1, 0);
    std::fill_n(column.get(), atoms + 1, 0);
    const double square = cutoff * cutoff;
    for (int64_t e = 0; e < total; ++e) {
      const int64_t i = centre[e], j = neighbour[e];
      TORCH_CHECK_INDEX(
          i >= 0 && i < atoms && j >= 0 && j < atoms, "edge ", e, " joins atoms ", i, " and ", j, " of ", atoms);
      const bool far = squared(vectors + 3 * e) >= square;  // so that NaN is kept, and shows
      rank[e] = far ? -1 : row[i + 1]++;
      column[j + 1] += !far;
    }
    for (int64_t i = 0; i < atoms; ++i) row[i + 1] += row[i], column[i + 1] += column[i];
    count = row[atoms];
    const double per_angstrom = intervals / (cutoff - start);
    at::parallel_for(0, total, 4096, [&](int64_t from, int64_t to) {
      for (int64_t e = from; e < to; ++e) {
        if (rank[e] < 0) continue;
        const T* vector = vectors + 3 * e;
        const double r = std::sqrt(squared(vector)), position = (r - start) * per_angstrom;
        const int32_t k = position > 0 ? position < intervals ? int32_t(position) : int32_t(intervals - 1) : 0;
        const int32_t slot = row[centre[e]] + rank[e];
        input[slot] = int32_t(e);
        edge[slot] = {
            {T(vector[0] / r), T(vector[1] / r), T(vector[2] / r)}, T(2 * (position - k) - 1), T(1 / r), k,
            int32_t(centre[e]), int32_t(neighbour[e])};
      }
    });
    for (int64_t slot = 0; slot < count; ++slot) incoming[column[edge[slot].neighbour]++] = int32_t(slot);
    for (int64_t i = atoms; i > 0; --i) column[i] = column[i - 1];
    column[0] = 0;
  }

  static double squared(const T* v) { return double(v[0]) * v[0] + double(v[1]) * v[1] + double(v[2]) * v[2]; }

  int64_t count = 0;
  Buffer<int32_t> row, column;
  Buffer<Edge<T>> edge;
  Buffer<int32_t> input, incoming;  // input: which edge of the caller it is
};

}  // namespace mlff
