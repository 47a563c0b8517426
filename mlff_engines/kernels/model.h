// PaiNN in one call: per-atom outputs and the edge gradient of their weighted sum, by a hand-written adjoint.
//
// The equations and their names are those of mlff_engines/models/painn.py; mlff_engines/kernels/painn.py prepares the
// arguments. What makes it fast: nothing per edge is ever stored but geometry and four numbers of its gradient; the
// radial filters come from a table; the vectors of the first layer are zero and those of the last unread, so neither
// is computed; a tile of atoms goes through message, update and the next message net while it is in the cache.
//
// Atoms receive in the order of their edges, and each adjoint is summed by the atom it belongs to, over its incoming
// edges in their order: no two threads add to one number, and the result is bitwise the same for any number of them.

#pragma once

#include "dense.h"
#include "edges.h"
#include "filter.h"
#include "weights.h"
#include "workspace.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mlff {

constexpr int64_t TILE = 24;  // atoms, at most

// The number of features: KNOWN to the compiler, which then keeps fewer numbers in registers, or 0 and any number.
template <int64_t KNOWN>
struct Size {
  explicit Size(int64_t) {}
  operator int64_t() const { return KNOWN; }
};

template <>
struct Size<0> {
  explicit Size(int64_t value) : value(value) {}
  operator int64_t() const { return value; }
  int64_t value;
};

template <typename T, int64_t FEATURES>
class Model {
  static constexpr int64_t W = Vec<T>::size();

 public:
  Model(
      const at::Tensor& rows, const Edges<T>& edges, const at::Tensor& seed, const at::Tensor& q0, const at::Tensor& x0,
      const Weights<T>& weights, const at::Tensor& filters, int64_t intervals, double slope, double* y, T* gradient)
      : atoms(rows.size(0)), F(q0.size(1)), H(weights.readout.out), L(weights.update.size()), slope(slope),
        rows(rows.const_data_ptr<int64_t>()), seed(seed.const_data_ptr<double>()), q0(q0.const_data_ptr<T>()),
        x0(x0.const_data_ptr<T>()), edges(edges), weights(weights), y(y), gradient(gradient), q(atoms * F),
        edge_adjoint(L > 1 ? 4 * edges.count : 0), adjoints(2 * 4 * atoms * F)
  {
    const T* table = filters.const_data_ptr<T>();
    for (int64_t l = 0; l < L; ++l) {
      tables.push_back(table);
      table += intervals * (l ? 3 : 2) * (DEGREE<T> + 1) * F;
      saved.emplace_back(l > 0 ? 7 * atoms * F : 0, l < L - 1 ? 10 * atoms * F : 0);
    }
  }

  void run()
  {
    const int64_t allowed = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t threads = std::max<int64_t>(1, std::min(allowed, atoms));
    const int64_t tile = std::min(TILE, (atoms + threads - 1) / threads), tiles = (atoms + tile - 1) / tile;
    const int64_t size = scratch_size(tile);
    Buffer<T> scratch(threads * size);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
      T* mine = scratch.get() + omp_get_thread_num() * size;
#else
      T* mine = scratch.get();
#endif
      for (int64_t l = 0; l < L; ++l) {
#pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < tiles; ++k) forward(l, k * tile, std::min(atoms, (k + 1) * tile), mine);
      }
      for (int64_t l = L - 1; l > 0; --l) {
#pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < tiles; ++k) backward(l, k * tile, std::min(atoms, (k + 1) * tile), mine);
      }
#pragma omp for schedule(dynamic, 8)
      for (int64_t i = 0; i < atoms; ++i) finish(i);
    }
  }

 private:
  // what the adjoint needs of a layer: x (N, 3F), mu (N, 3, F) and the slope of the message net's hidden layer (N, F)
  // of what enters it; mix (N, 3, 2F), a (N, 3F) and the slope (N, F) of its update
  struct Saved {
    Saved(int64_t message, int64_t update) : message(message), update(update) {}
    Buffer<T> message, update;
  };

  T* x(int64_t l, int64_t i) const { return saved[l].message.get() + 3 * F * i; }
  T* mu(int64_t l, int64_t i) const { return saved[l].message.get() + 3 * F * (atoms + i); }
  T* message_slope(int64_t l, int64_t i) const { return saved[l].message.get() + F * (6 * atoms + i); }
  // adjoint of q (N, F) and mu (N, 3, F) before the update of layer l
  T* q_adjoint(int64_t l, int64_t i) const { return adjoints.get() + F * (4 * atoms * (l % 2) + i); }
  T* mu_adjoint(int64_t l, int64_t i) const { return q_adjoint(l, atoms + 3 * i); }

  // the intermediate results of an update: in `saved`, or in scratch memory for the last
  struct Mixed {
    T *mix, *a, *slope;
  };

  Mixed mixed(int64_t l, int64_t i, T* scratch, int64_t tile) const
  {
    if (l == L - 1) return {scratch, scratch + 6 * F * tile, scratch + 9 * F * tile};
    T* base = saved[l].update.get();
    return {base + 6 * F * i, base + F * (6 * atoms + 3 * i), base + F * (9 * atoms + i)};
  }

  int64_t scratch_size(int64_t tile) const { return tile * (28 * F + 2 * H); }

  // Message of layer l to the tile's atoms, their update, and the next message net or the readout.
  void forward(int64_t l, int64_t from, int64_t to, T* scratch)
  {
    const int64_t n = to - from;
    T* state = scratch;             // (n, 2F): q and |V mu|
    T* vectors = state + 2 * F * n; // (n, 3, F)
    T* hidden = vectors + 3 * F * n;
    T* rest = hidden + F * n;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = from + k;
      T *own = state + 2 * F * k, *own_mu = vectors + 3 * F * k;
      if (l == 0) {
        std::copy_n(q0 + F * rows[i], F, own);
        std::fill_n(own_mu, 3 * F, T(0));
        receive<true>(l, i, own, own_mu);
      } else {
        std::copy_n(q.get() + F * i, F, own);
        std::copy_n(mu(l, i), 3 * F, own_mu);
        receive<false>(l, i, own, own_mu);
      }
    }
    const Mixed m = mixed(l, from, rest, n);
    update(l, n, state, vectors, hidden, m);
    if (l < L - 1) {
      for (int64_t k = 0; k < n; ++k) {
        std::copy_n(state + 2 * F * k, F, q.get() + F * (from + k));
        std::copy_n(vectors + 3 * F * k, 3 * F, mu(l + 1, from + k));
      }
      const MessageNet<T>& net = weights.message[l + 1];
      multiply(n, state, 2 * F, net.first, hidden, F);
      silu(hidden, message_slope(l + 1, from), n * F);
      multiply(n, hidden, F, net.second, x(l + 1, from), 3 * F);
      return;
    }
    T* more = rest + 10 * F * n;
    read_out(from, n, state, more);  // leaves the adjoint of q in state
    std::fill_n(vectors, 3 * F * n, T(0));
    for (int64_t k = 0; k < n; ++k) std::copy_n(state + 2 * F * k, F, hidden + F * k);
    update_adjoint(l, n, hidden, vectors, m, more);
    leave(l, from, n, hidden, vectors);
  }

  // Adjoint of the message of layer l, by sender, then of its message net and of the update before it.
  void backward(int64_t l, int64_t from, int64_t to, T* scratch)
  {
    const int64_t n = to - from;
    T* g = scratch;                   // (n, F)
    T* g_mu = g + F * n;              // (n, 3, F)
    T* g_x = g_mu + 3 * F * n;        // (n, 3F)
    T* g_hidden = g_x + 3 * F * n;    // (n, F)
    std::copy_n(q_adjoint(l, from), F * n, g);
    std::copy_n(mu_adjoint(l, from), 3 * F * n, g_mu);
    std::fill_n(g_x, 3 * F * n, T(0));
    for (int64_t k = 0; k < n; ++k) send_adjoint(l, from + k, g_x + 3 * F * k, g_mu + 3 * F * k);
    const MessageNet<T>& net = weights.message[l];
    multiply(n, g_x, 3 * F, net.second_t, g_hidden, F);
    scale(g_hidden, message_slope(l, from), n * F);
    multiply(n, g_hidden, F, net.first_t, g, F, true);
    update_adjoint(l - 1, n, g, g_mu, mixed(l - 1, from, nullptr, n), g_x);
    leave(l - 1, from, n, g, g_mu);
  }

  // The adjoints before the update of layer l, for all to see.
  void leave(int64_t l, int64_t from, int64_t n, const T* g, const T* g_mu)
  {
    std::copy_n(g, F * n, q_adjoint(l, from));
    std::copy_n(g_mu, 3 * F * n, mu_adjoint(l, from));
  }

  // The coefficients of an edge, and in them those of part k of the message from channel f on.
  const T* table(int64_t l, const Edge<T>& e) const
  {
    return tables[l] + (l ? 3 : 2) * (DEGREE<T> + 1) * F * e.interval;
  }

  static const T* part(const T* c, int64_t parts, int64_t k, int64_t f)
  {
    return c + (DEGREE<T> + 1) * WIDTH * (f / WIDTH * parts + k) + f % WIDTH;
  }

  static void prefetch(const T* from, int64_t size)
  {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t k = 0; k < size; k += line) __builtin_prefetch(from + k);
  }

  // Eq. 7-8: what the neighbours of i send, added to its q (F) and mu (3, F).
  template <bool first>
  void receive(int64_t l, int64_t i, T* __restrict own, T* __restrict own_mu) const
  {
    constexpr int64_t parts = first ? 2 : 3;
    for (int64_t slot = edges.row[i]; slot < edges.row[i + 1]; ++slot) {
      const Edge<T>& e = edges.edge[slot];
      const T* c = table(l, e);
      const T* sent = first ? x0 + 2 * F * rows[e.neighbour] : x(l, e.neighbour);
      const T* their = first ? nullptr : mu(l, e.neighbour);
      const Edge<T>& next = edges.edge[slot + 1 < edges.count ? slot + 1 : slot];
      if constexpr (!first) {
        prefetch(x(l, next.neighbour), 3 * F);
        prefetch(mu(l, next.neighbour), 3 * F);
      }

      const Vec<T> t(e.t);
      for (int64_t f = 0; f < F; f += W) {
        at::vec::fmadd(filter(part(c, parts, 0, f), t), load(sent + f), load(own + f)).store(own + f);
        const Vec<T> along = filter(part(c, parts, 1, f), t) * load(sent + F + f);
        Vec<T> scaled;
        if constexpr (!first) scaled = filter(part(c, parts, 2, f), t) * load(sent + 2 * F + f);
        for (int k = 0; k < 3; ++k) {
          T* sum = own_mu + k * F + f;
          Vec<T> value = at::vec::fmadd(Vec<T>(e.u[k]), along, load(sum));
          if constexpr (!first) value = at::vec::fmadd(scaled, load(their + k * F + f), value);
          value.store(sum);
        }
      }
    }
  }

  // Adjoint of `receive` with respect to what j sent, x (3F) and mu (3, F), and to its edges.
  void send_adjoint(int64_t l, int64_t j, T* __restrict g_x, T* __restrict g_mu) const
  {
    constexpr int64_t parts = 3;
    const T *sent = x(l, j), *own = mu(l, j);
    for (int64_t p = edges.column[j]; p < edges.column[j + 1]; ++p) {
      const int64_t slot = edges.incoming[p];
      const Edge<T>& e = edges.edge[slot];
      const T* c = table(l, e);
      const T *g = q_adjoint(l, e.centre), *g_vector = mu_adjoint(l, e.centre);
      __builtin_prefetch(&edges.edge[edges.incoming[p + 4 < edges.count ? p + 4 : p]]);
      const Edge<T>& next = edges.edge[edges.incoming[p + 1 < edges.count ? p + 1 : p]];
      prefetch(q_adjoint(l, next.centre), F);
      prefetch(mu_adjoint(l, next.centre), 3 * F);

      const Vec<T> t(e.t), u[3] = {Vec<T>(e.u[0]), Vec<T>(e.u[1]), Vec<T>(e.u[2])};
      Vec<T> radial(0), direction[3] = {Vec<T>(0), Vec<T>(0), Vec<T>(0)};
      for (int64_t f = 0; f < F; f += W) {
        Vec<T> v[3], their[3], slope;
        load3(v, g_vector + f, F);
        load3(their, own + f, F);
        const Vec<T> g_s = load(g + f), g_along = dot(v, u), g_scaled = dot(v, their);
        const Vec<T> s = load(sent + f), vs = load(sent + F + f), vv = load(sent + 2 * F + f);
        at::vec::fmadd(g_s, filter(part(c, parts, 0, f), t, slope), load(g_x + f)).store(g_x + f);
        radial = at::vec::fmadd(g_s * s, slope, radial);

        Vec<T> weight = filter(part(c, parts, 1, f), t, slope);
        at::vec::fmadd(g_along, weight, load(g_x + F + f)).store(g_x + F + f);
        radial = at::vec::fmadd(g_along * vs, slope, radial);
        const Vec<T> along = weight * vs;

        weight = filter(part(c, parts, 2, f), t, slope);
        at::vec::fmadd(g_scaled, weight, load(g_x + 2 * F + f)).store(g_x + 2 * F + f);
        radial = at::vec::fmadd(g_scaled * vv, slope, radial);
        const Vec<T> scaled = weight * vv;
        for (int k = 0; k < 3; ++k) {
          direction[k] = at::vec::fmadd(along, v[k], direction[k]);
          T* sum = g_mu + k * F + f;
          at::vec::fmadd(scaled, v[k], load(sum)).store(sum);
        }
      }
      T* out = edge_adjoint.get() + 4 * slot;
      const T sums[4] = {total(radial), total(direction[0]), total(direction[1]), total(direction[2])};
      for (int k = 0; k < 4; ++k) out[k] = l == L - 1 ? sums[k] : out[k] + sums[k];
    }
  }

  // The first layer's part, and from the adjoints of r and of the direction the gradient of each edge of i.
  void finish(int64_t i) const
  {
    constexpr int64_t parts = 2;
    const T *g = q_adjoint(0, i), *g_mu = mu_adjoint(0, i);
    for (int64_t slot = edges.row[i]; slot < edges.row[i + 1]; ++slot) {
      const Edge<T>& e = edges.edge[slot];
      const T* c = table(0, e);
      const T* sent = x0 + 2 * F * rows[e.neighbour];
      const Vec<T> t(e.t), u[3] = {Vec<T>(e.u[0]), Vec<T>(e.u[1]), Vec<T>(e.u[2])};
      Vec<T> radial(0), direction[3] = {Vec<T>(0), Vec<T>(0), Vec<T>(0)};
      for (int64_t f = 0; f < F; f += W) {
        Vec<T> v[3], slope;
        load3(v, g_mu + f, F);
        filter(part(c, parts, 0, f), t, slope);
        radial = at::vec::fmadd(load(g + f) * load(sent + f), slope, radial);
        const Vec<T> vs = load(sent + F + f), along = filter(part(c, parts, 1, f), t, slope) * vs;
        radial = at::vec::fmadd(dot(v, u) * vs, slope, radial);
        for (int k = 0; k < 3; ++k) direction[k] = at::vec::fmadd(along, v[k], direction[k]);
      }
      T sums[4] = {total(radial), total(direction[0]), total(direction[1]), total(direction[2])};
      if (L > 1)
        for (int k = 0; k < 4; ++k) sums[k] += edge_adjoint[4 * slot + k];
      const T parallel = sums[1] * e.u[0] + sums[2] * e.u[1] + sums[3] * e.u[2];
      const T along_r = sums[0] * T(slope) - parallel * e.inverse;
      T* out = gradient + 3 * int64_t(edges.input[slot]);
      for (int k = 0; k < 3; ++k) out[k] = along_r * e.u[k] + sums[k + 1] * e.inverse;
    }
  }

  // Eq. 9-10 for n atoms, in place: q in the first half of state (n, 2F), mu (n, 3, F).
  void update(int64_t l, int64_t n, T* state, T* vectors, T* hidden, const Mixed& m) const
  {
    const UpdateNet<T>& net = weights.update[l];
    const int64_t width = net.second.out;
    multiply(3 * n, vectors, F, net.mix, m.mix, 2 * F);
    for (int64_t k = 0; k < n; ++k)
      for (int64_t f = 0; f < F; f += W) {
        Vec<T> v[3];
        load3(v, m.mix + 6 * F * k + f, 2 * F);
        (dot(v, v) + Vec<T>(T(1e-8))).sqrt().store(state + 2 * F * k + F + f);
      }
    multiply(n, state, 2 * F, net.first, hidden, F);
    silu(hidden, m.slope, n * F);
    multiply(n, hidden, F, net.second, m.a, 3 * F);
    for (int64_t k = 0; k < n; ++k)
      for (int64_t f = 0; f < F; f += W) {
        Vec<T> v[3], u[3];
        load3(v, m.mix + 6 * F * k + f, 2 * F);
        load3(u, m.mix + 6 * F * k + F + f, 2 * F);
        const T* a = m.a + 3 * F * k + f;
        T* own = state + 2 * F * k + f;
        at::vec::fmadd(load(a + F), dot(v, u), load(own) + load(a)).store(own);
        if (width == 3 * F)
          for (int c = 0; c < 3; ++c) {
            T* out = vectors + F * (3 * k + c) + f;
            at::vec::fmadd(load(a + 2 * F), u[c], load(out)).store(out);
          }
      }
  }

  // Adjoint of `update` in place: g (n, F) and g_mu (n, 3, F), of what left it, become those of what entered it.
  void update_adjoint(int64_t l, int64_t n, T* g, T* g_mu, const Mixed& m, T* scratch) const
  {
    const UpdateNet<T>& net = weights.update[l];
    const bool last = net.second.out == 2 * F;
    T* g_a = scratch;               // (n, 3F)
    T* g_hidden = g_a + 3 * F * n;  // (n, F)
    T* g_state = g_hidden + F * n;  // (n, 2F)
    T* g_mix = g_state + 2 * F * n; // (n, 3, 2F)
    for (int64_t k = 0; k < n; ++k)
      for (int64_t f = 0; f < F; f += W) {
        Vec<T> v[3], u[3], w[3];
        load3(v, m.mix + 6 * F * k + f, 2 * F);
        load3(u, m.mix + 6 * F * k + F + f, 2 * F);
        const Vec<T> own = load(g + F * k + f);
        T* out = g_a + 3 * F * k + f;
        own.store(out);
        (own * dot(v, u)).store(out + F);
        if (!last) {
          load3(w, g_mu + 3 * F * k + f, F);
          dot(w, u).store(out + 2 * F);
        }
      }
    multiply(n, g_a, 3 * F, net.second_t, g_hidden, F);
    scale(g_hidden, m.slope, n * F);
    multiply(n, g_hidden, F, net.first_t, g_state, 2 * F);
    for (int64_t k = 0; k < n; ++k)
      for (int64_t f = 0; f < F; f += W) {
        Vec<T> v[3], u[3], w[3];
        T* mix = g_mix + 6 * F * k + f;
        load3(v, m.mix + 6 * F * k + f, 2 * F);
        load3(u, m.mix + 6 * F * k + F + f, 2 * F);
        load3(w, g_mu + 3 * F * k + f, F);
        const T* a = m.a + 3 * F * k + f;
        const Vec<T> own = load(g + F * k + f), g_dot = own * load(a + F);
        const Vec<T> g_norm = load(g_state + 2 * F * k + F + f) / (dot(v, v) + Vec<T>(T(1e-8))).sqrt();
        (own + load(g_state + 2 * F * k + f)).store(g + F * k + f);
        for (int c = 0; c < 3; ++c) {
          at::vec::fmadd(g_dot, u[c], g_norm * v[c]).store(mix + 2 * F * c);
          Vec<T> g_u = g_dot * v[c];
          if (!last) g_u = at::vec::fmadd(load(a + 2 * F), w[c], g_u);
          g_u.store(mix + 2 * F * c + F);
        }
      }
    multiply(3 * n, g_mix, 2 * F, net.mix_t, g_mu, F, true);
  }

  // y of n atoms from q in state (n, 2F), which becomes the adjoint of q.
  void read_out(int64_t from, int64_t n, T* state, T* scratch) const
  {
    T *hidden = scratch, *hidden_slope = hidden + H * n;
    multiply(n, state, 2 * F, weights.readout, hidden, H);
    silu(hidden, hidden_slope, n * H);
    for (int64_t k = 0; k < n; ++k) {
      double sum = weights.last_bias[0];
      for (int64_t h = 0; h < H; ++h) sum += double(hidden[H * k + h]) * weights.last[h];
      y[from + k] = sum;
      for (int64_t h = 0; h < H; ++h)
        hidden[H * k + h] = T(seed[from + k]) * weights.last[h] * hidden_slope[H * k + h];
    }
    multiply(n, hidden, H, weights.readout_t, state, 2 * F);
  }

  const int64_t atoms;
  const Size<FEATURES> F;
  const int64_t H, L;
  const double slope;  // dt/dr
  const int64_t* rows;
  const double* seed;
  const T *q0, *x0;
  const Edges<T>& edges;
  const Weights<T>& weights;
  double* y;
  T* gradient;
  Buffer<T> q, edge_adjoint, adjoints;
  std::vector<const T*> tables;
  std::vector<Saved> saved;
};

}  // namespace mlff
