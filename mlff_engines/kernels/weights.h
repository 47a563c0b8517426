// The weights of PaiNN as they are packed by mlff_engines/kernels/painn.py, in the same order.

#pragma once

#include "dense.h"

#include <ATen/ATen.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace mlff {

template <typename T>
struct MessageNet {
  Dense<T> first, second, second_t, first_t;
};

template <typename T>
struct UpdateNet {
  Dense<T> mix, mix_t, first, second, second_t, first_t;
};

template <typename T>
struct Weights {
  Weights(const at::Tensor& packed, int64_t features, int64_t hidden, int64_t layers)
      : next(packed.const_data_ptr<T>()), end(next + packed.numel())
  {
    const int64_t f = features;
    for (int64_t l = 0; l < layers; ++l) {
      MessageNet<T> m{};
      if (l > 0) m = {dense(f, f), dense(f, 3 * f), dense(3 * f, f, false), dense(f, f, false)};
      message.push_back(m);
      const int64_t parts = l == layers - 1 ? 2 : 3;
      update.push_back(
          {dense(f, 2 * f, false), dense(2 * f, f, false), dense(2 * f, f), dense(f, parts * f),
           dense(parts * f, f, false), dense(f, 2 * f, false)});
    }
    readout = dense(f, hidden);
    readout_t = dense(hidden, f, false);
    last = take(hidden);
    last_bias = take(WIDTH);
    TORCH_CHECK(next == end, "the packed weights are of another model");
  }

  const T* take(int64_t size)
  {
    TORCH_CHECK(end - next >= size, "the packed weights are of another model");
    return std::exchange(next, next + size);
  }

  Dense<T> dense(int64_t in, int64_t out, bool bias = true)
  {
    const T* weight = take(in * out);
    return {weight, bias ? take(out) : nullptr, in, out};
  }

  const T *next, *end;
  std::vector<MessageNet<T>> message;
  std::vector<UpdateNet<T>> update;
  Dense<T> readout, readout_t;
  const T *last, *last_bias;
};

}  // namespace mlff
