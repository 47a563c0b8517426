// A radial filter: a polynomial in t, from -1 to 1 along its interval of the table, for one vector of channels.

#pragma once

#include "dense.h"

namespace mlff {

// degree of the polynomials of the table; mlff_engines/kernels/table.py has the same
template <typename T>
constexpr int DEGREE = sizeof(T) == 4 ? 5 : 11;

// Value, and value and slope, of one filter at t; its coefficients lie WIDTH apart, from the highest power down.
template <typename T>
inline Vec<T> filter(const T* c, Vec<T> t)
{
  Vec<T> value = load(c);
#pragma GCC unroll 16
  for (int d = 1; d <= DEGREE<T>; ++d) value = at::vec::fmadd(value, t, load(c + d * WIDTH));
  return value;
}

template <typename T>
inline Vec<T> filter(const T* c, Vec<T> t, Vec<T>& slope)
{
  Vec<T> value = load(c);
  slope = value;
  value = at::vec::fmadd(value, t, load(c + WIDTH));
#pragma GCC unroll 16
  for (int d = 2; d <= DEGREE<T>; ++d) {
    slope = at::vec::fmadd(slope, t, value);
    value = at::vec::fmadd(value, t, load(c + d * WIDTH));
  }
  return value;
}

}  // namespace mlff
