// What surrounds a model in a step of dynamics: edges from positions, forces and virial from edge gradients. Both do
// in one pass what mlff_engines/kernels/geometry.py says; single-threaded, for they take a hundredth of the model.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace mlff {

inline void check_tensor(const at::Tensor& tensor, at::ScalarType type, at::IntArrayRef sizes, const char* name)
{
  TORCH_CHECK(
      tensor.scalar_type() == type && tensor.sizes() == sizes, name, " is ", tensor.scalar_type(), tensor.sizes(),
      ", not ", type, sizes);
}

inline void check_pair(int64_t i, int64_t j, int64_t atoms)
{
  TORCH_CHECK_INDEX(i >= 0 && i < atoms && j >= 0 && j < atoms, "atoms ", i, " and ", j, " of ", atoms);
}

inline double squared(double x, double y, double z) { return x * x + y * y + z * z; }

inline std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>> near(
    const at::Tensor& positions, const at::Tensor& origin, double reach, const at::Tensor& pairs,
    const std::optional<at::Tensor>& offset, double cutoff)
{
  const int64_t atoms = positions.size(0), total = pairs.size(-1);
  check_tensor(positions, at::kDouble, {atoms, 3}, "positions");
  check_tensor(origin, at::kDouble, {atoms, 3}, "origin");
  check_tensor(pairs, at::kLong, {2, total}, "pairs");
  if (offset) check_tensor(*offset, at::kDouble, {total, 3}, "offset");
  TORCH_CHECK(total < std::numeric_limits<int32_t>::max(), "too many pairs for 32-bit indices");
  const at::Tensor r = positions.contiguous(), from_where = origin.contiguous(), own_pairs = pairs.contiguous();
  const at::Tensor images = offset ? offset->contiguous() : at::Tensor();
  const double *position = r.const_data_ptr<double>(), *was = from_where.const_data_ptr<double>();
  const double* image = offset ? images.const_data_ptr<double>() : nullptr;
  for (int64_t i = 0; i < 3 * atoms; i += 3) {
    const double x = position[i] - was[i], y = position[i + 1] - was[i + 1], z = position[i + 2] - was[i + 2];
    if (squared(x, y, z) > reach * reach) return {};
  }
  const int64_t *centre = own_pairs.const_data_ptr<int64_t>(), *neighbour = centre + total;
  const at::Tensor vectors = at::empty({total, 3}, at::kDouble), kept = at::empty({total}, at::kInt);
  double* vector = vectors.mutable_data_ptr<double>();
  int32_t* which = kept.mutable_data_ptr<int32_t>();
  int64_t edges = 0;
  for (int64_t p = 0; p < total; ++p) {
    check_pair(centre[p], neighbour[p], atoms);
    const double *from = position + 3 * centre[p], *to = position + 3 * neighbour[p];
    double x = to[0] - from[0], y = to[1] - from[1], z = to[2] - from[2];
    if (image) x += image[3 * p], y += image[3 * p + 1], z += image[3 * p + 2];
    double* out = vector + 3 * edges;
    out[0] = x, out[1] = y, out[2] = z;
    which[edges] = int32_t(p);
    edges += squared(x, y, z) < cutoff * cutoff;  // a branch would be guessed wrong too often
  }
  const at::Tensor index = at::empty({2, edges}, at::kLong);
  int64_t *i = index.mutable_data_ptr<int64_t>(), *j = i + edges;
  for (int64_t e = 0; e < edges; ++e) i[e] = centre[which[e]], j[e] = neighbour[which[e]];
  return {index, vectors.narrow(0, 0, edges)};
}

struct Sums {
  bool finite, too_close;
};

// In the order of edge_forces in mlff_engines/potential.py: every centre, then every neighbour.
template <typename T>
Sums sum_forces(
    int64_t atoms, int64_t edges, const int64_t* centre, const double* vector, const T* gradient, const int64_t* number,
    const double* least, int64_t elements, double* forces, double* virial)
{
  const int64_t* neighbour = centre + edges;
  double w[3][3] = {};
  bool too_close = false;
  for (int64_t e = 0; e < edges;) {
    const int64_t i = centre[e];
    TORCH_CHECK_INDEX(i >= 0 && i < atoms, "edge ", e, " is of atom ", i, " of ", atoms);
    double sum[3] = {forces[3 * i], forces[3 * i + 1], forces[3 * i + 2]};
    for (; e < edges && centre[e] == i; ++e) {  // one centre after another, mostly
      const int64_t j = neighbour[e];
      TORCH_CHECK_INDEX(j >= 0 && j < atoms, "edge ", e, " is of atom ", j, " of ", atoms);
      const double* v = vector + 3 * e;
      for (int k = 0; k < 3; ++k) {
        const double g = gradient[3 * e + k];
        sum[k] += g;
        for (int c = 0; c < 3; ++c) w[c][k] += v[c] * g;
      }
      too_close |= squared(v[0], v[1], v[2]) < least[number[i] * elements + number[j]];
    }
    for (int k = 0; k < 3; ++k) forces[3 * i + k] = sum[k];
  }
  for (int64_t e = 0; e < edges; ++e)
    for (int k = 0; k < 3; ++k) forces[3 * neighbour[e] + k] -= double(gradient[3 * e + k]);
  for (int c = 0; c < 3; ++c)
    for (int k = 0; k < 3; ++k) virial[3 * c + k] = -0.5 * (w[c][k] + w[k][c]);
  const bool finite = std::all_of(forces, forces + 3 * atoms, [](double f) { return std::isfinite(f); });
  return {finite, too_close};
}

inline std::tuple<at::Tensor, at::Tensor, bool, bool> forces(
    const at::Tensor& edge_index, const at::Tensor& edge_vec, const at::Tensor& gradient, const at::Tensor& numbers,
    const at::Tensor& least)
{
  const int64_t edges = edge_vec.size(0), atoms = numbers.size(0), elements = least.size(0);
  check_tensor(edge_index, at::kLong, {2, edges}, "edge_index");
  check_tensor(edge_vec, at::kDouble, {edges, 3}, "edge_vec");
  check_tensor(gradient, gradient.scalar_type(), {edges, 3}, "gradient");
  check_tensor(numbers, at::kLong, {atoms}, "numbers");
  check_tensor(least, at::kDouble, {elements, elements}, "least");
  const at::Tensor index = edge_index.contiguous(), vectors = edge_vec.contiguous(), g = gradient.contiguous();
  const at::Tensor kinds = numbers.contiguous(), squares = least.contiguous();
  const int64_t* number = kinds.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < atoms; ++i)
    TORCH_CHECK_INDEX(number[i] >= 0 && number[i] < elements, "no element ", number[i]);
  at::Tensor out = at::zeros({atoms, 3}, at::kDouble), virial = at::empty({3, 3}, at::kDouble);
  Sums sums{};
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "forces", [&] {
    sums = sum_forces(
        atoms, edges, index.const_data_ptr<int64_t>(), vectors.const_data_ptr<double>(), g.const_data_ptr<scalar_t>(),
        number, squares.const_data_ptr<double>(), elements, out.mutable_data_ptr<double>(),
        virial.mutable_data_ptr<double>());
  });
  return {out, virial, sums.finite, sums.too_close};
}

}  // namespace mlff
