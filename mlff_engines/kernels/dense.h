// Small dense layers: row-major products blocked for registers, and SiLU. Sizes are multiples of WIDTH elements.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define CPU_CAPABILITY_AVX2
#endif
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace mlff {

// every array is padded to this many elements, the widest vector of any machine
constexpr int64_t WIDTH = 16;

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
inline Vec<T> load(const T* from)
{
  return Vec<T>::loadu(from);
}

template <typename T>
inline Vec<T> dot(const Vec<T> (&a)[3], const Vec<T> (&b)[3])
{
  return at::vec::fmadd(a[0], b[0], at::vec::fmadd(a[1], b[1], a[2] * b[2]));
}

template <typename T>
inline void load3(Vec<T> (&v)[3], const T* from, int64_t stride)
{
  for (int k = 0; k < 3; ++k) v[k] = load(from + k * stride);
}

template <typename T>
inline T total(const Vec<T>& v)
{
  return at::vec::vec_reduce_all<T>([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, v);
}

// A weight (in, out), row-major, and its bias (out), or none.
template <typename T>
struct Dense {
  const T* weight;
  const T* bias;
  int64_t in, out;
};

// C (R, V vectors) = start + A (R, in) B (in, out), where `start` has rows `start_stride` apart. Each element is summed
// in the order of `in`, whatever the blocking: so results do not depend on how atoms are shared out.
template <typename T, int R, int V>
inline void block(
    int64_t in, const T* a, int64_t a_stride, const T* b, int64_t b_stride, const T* start, int64_t start_stride, T* c,
    int64_t c_stride)
{
  constexpr int64_t W = Vec<T>::size();
  Vec<T> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = start ? load(start + r * start_stride + v * W) : Vec<T>(0);
  for (int64_t k = 0; k < in; ++k) {
    Vec<T> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + k * b_stride + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> factor(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = at::vec::fmadd(factor, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v].store(c + r * c_stride + v * W);
}

template <typename T, int V>
inline void columns(
    int64_t rows, int64_t in, const T* a, int64_t a_stride, const T* b, int64_t b_stride, const T* start,
    int64_t start_stride, T* c, int64_t c_stride)
{
  constexpr int R = 6;
  int64_t r = 0;
  const auto run = [&](auto height) {
    block<T, decltype(height)::value, V>(
        in, a + r * a_stride, a_stride, b, b_stride, start ? start + r * start_stride : nullptr, start_stride,
        c + r * c_stride, c_stride);
    r += decltype(height)::value;
  };
  while (r + R <= rows) run(std::integral_constant<int, R>{});
  switch (rows - r) {
    case 5: run(std::integral_constant<int, 5>{}); break;
    case 4: run(std::integral_constant<int, 4>{}); break;
    case 3: run(std::integral_constant<int, 3>{}); break;
    case 2: run(std::integral_constant<int, 2>{}); break;
    case 1: run(std::integral_constant<int, 1>{}); break;
  }
}

// C (rows, out) = A (rows, in) W + b, or with `add` C + A W.
template <typename T>
void multiply(int64_t rows, const T* a, int64_t a_stride, const Dense<T>& w, T* c, int64_t c_stride, bool add = false)
{
  constexpr int64_t W = Vec<T>::size();
  constexpr int V = W * sizeof(T) == 64 ? 4 : 2;  // as many accumulators as there are registers
  const T* start = add ? c : w.bias;
  const int64_t start_stride = add ? c_stride : 0;
  int64_t n = 0;
  const auto run = [&](auto width) {
    columns<T, decltype(width)::value>(
        rows, w.in, a, a_stride, w.weight + n, w.out, start ? start + n : nullptr, start_stride, c + n, c_stride);
    n += decltype(width)::value * W;
  };
  while (n + V * W <= w.out) run(std::integral_constant<int, V>{});
  while (n < w.out) run(std::integral_constant<int, 1>{});
}

// h -> h σ(h), and its derivative.
template <typename T>
inline void silu(T* h, T* slope, int64_t n)
{
  for (int64_t k = 0; k < n; k += Vec<T>::size()) {
    const Vec<T> one(1), value = load(h + k), sigmoid = one / (one + value.neg().exp());
    (value * sigmoid).store(h + k);
    (sigmoid * at::vec::fmadd(value, one - sigmoid, one)).store(slope + k);
  }
}

// h *= factor.
template <typename T>
inline void scale(T* h, const T* factor, int64_t n)
{
  for (int64_t k = 0; k < n; k += Vec<T>::size()) (load(h + k) * load(factor + k)).store(h + k);
}

}  // namespace mlff
