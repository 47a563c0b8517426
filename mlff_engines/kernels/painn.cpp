// All operators of the library. painn.py and geometry.py in mlff_engines/kernels say what their arguments are.

#include "geometry.h"
#include "model.h"

#include <torch/library.h>

#include <limits>
#include <tuple>

namespace mlff {
namespace {

template <typename T>
void compute(
    const at::Tensor& rows, const at::Tensor& edge_index, const at::Tensor& edge_vec, const at::Tensor& seed,
    const at::Tensor& q, const at::Tensor& x, const at::Tensor& weights, const at::Tensor& filters, int64_t hidden,
    int64_t layers, double start, double cutoff, at::Tensor& y, at::Tensor& gradient)
{
  const int64_t features = q.size(1), per_interval = (3 * layers - 1) * (DEGREE<T> + 1) * features;
  const int64_t intervals = filters.numel() / per_interval;
  TORCH_CHECK(intervals > 0 && filters.numel() == intervals * per_interval, "the filter table is of another model");
  const struct Return {
    ~Return() { Workspace::of_this_thread().reset(); }
  } at_the_end;
  const Weights<T> unpacked(weights, features, hidden, layers);
  const Edges<T> edges(edge_index, edge_vec, rows.size(0), intervals, start, cutoff);
  const auto run = [&](auto known) {
    Model<T, known>(
        rows, edges, seed, q, x, unpacked, filters, intervals, 2 * intervals / (cutoff - start),
        y.mutable_data_ptr<double>(), gradient.mutable_data_ptr<T>())
        .run();
  };
  constexpr int64_t usual = 64;
  if (std::is_same_v<T, float> && features == usual)
    run(std::integral_constant<int64_t, usual>{});
  else
    run(std::integral_constant<int64_t, 0>{});
}

// See mlff_engines/kernels/painn.py for the arguments.
std::tuple<at::Tensor, at::Tensor> painn(
    const at::Tensor& rows, const at::Tensor& edge_index, const at::Tensor& edge_vec, const at::Tensor& seed,
    const at::Tensor& q, const at::Tensor& x, const at::Tensor& weights, const at::Tensor& filters, int64_t hidden,
    int64_t layers, double start, double cutoff)
{
  const int64_t atoms = rows.size(0), edges = edge_vec.size(0);
  const at::ScalarType type = weights.scalar_type();
  TORCH_CHECK(
      edge_vec.scalar_type() == type && q.scalar_type() == type && x.scalar_type() == type &&
          filters.scalar_type() == type,
      "edge_vec is ", edge_vec.scalar_type(), " but the model ", type);
  TORCH_CHECK(rows.scalar_type() == at::kLong && edge_index.scalar_type() == at::kLong, "indices must be int64");
  TORCH_CHECK(edge_index.sizes() == at::IntArrayRef({2, edges}), "edge_index is not (2, E)");
  TORCH_CHECK(edge_vec.dim() == 2 && edge_vec.size(1) == 3, "edge_vec is not (E, 3)");
  TORCH_CHECK(seed.numel() == atoms && seed.scalar_type() == at::kDouble, "seed is not (N,) in float64");
  TORCH_CHECK(q.dim() == 2 && x.dim() == 2 && x.size(1) == 2 * q.size(1) && q.size(1) % WIDTH == 0, "q or x misfit");
  TORCH_CHECK(std::max(atoms, edges) < std::numeric_limits<int32_t>::max(), "too many edges for 32-bit indices");
  const at::Tensor own_rows = rows.contiguous();
  if (atoms) {
    const auto [low, high] = std::minmax_element(
        own_rows.const_data_ptr<int64_t>(), own_rows.const_data_ptr<int64_t>() + atoms);
    TORCH_CHECK_INDEX(*low >= 0 && *high < q.size(0), "no element ", *low < 0 ? *low : *high);
  }
  at::Tensor y = at::empty({atoms}, at::kDouble), gradient = at::zeros({edges, 3}, edge_vec.options());
  if (atoms)
    AT_DISPATCH_FLOATING_TYPES(type, "painn", [&] {
      compute<scalar_t>(
          own_rows, edge_index.contiguous(), edge_vec.contiguous(), seed.contiguous(), q.contiguous(), x.contiguous(),
          weights.contiguous(), filters.contiguous(), hidden, layers, start, cutoff, y, gradient);
    });
  return {y, gradient};
}

}  // namespace
}  // namespace mlff

// the number changes with the meaning of the arguments, so that an old artifact meets no new operator
TORCH_LIBRARY(mlff, m)
{
  m.def(
      "painn_v1(Tensor rows, Tensor edge_index, Tensor edge_vec, Tensor seed, Tensor q, Tensor x, Tensor weights, "
      "Tensor filters, int hidden, int layers, float start, float cutoff) -> (Tensor, Tensor)");
  m.def(
      "near_v1(Tensor positions, Tensor origin, float reach, Tensor pairs, Tensor? offset, float cutoff) -> "
      "(Tensor?, Tensor?)");
  m.def(
      "forces_v1(Tensor edge_index, Tensor edge_vec, Tensor gradient, Tensor numbers, Tensor least) -> "
      "(Tensor, Tensor, bool, bool)");
}

TORCH_LIBRARY_IMPL(mlff, CPU, m)
{
  m.impl("painn_v1", &mlff::painn);
  m.impl("near_v1", &mlff::near);
  m.impl("forces_v1", &mlff::forces);
}
