// An artifact loaded with libtorch: edges in, energies and edge gradients out (the contract is mlff_engines/graph.py).
// No LAMMPS here, and no torch outside model.cpp.

#ifndef MLFF_MODEL_H
#define MLFF_MODEL_H

#include "manifest.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace mlff {

struct Options {
  std::string device = "cpu";    // cpu, cuda (one per process of a machine, in turn) or cuda:N
  std::string dtype;             // float32 or float64 in place of the artifact's own
  bool compiled = false;         // run the package that torch has compiled of it for this machine, not its program
  int threads = 1;               // of the CPU
  double charge = 0.0;           // e, of the whole system
  double spin = 0.0;             // unpaired electrons
};

// N nodes, the owned ones first; E directed edges
struct Graph {
  std::vector<std::int64_t> numbers;              // (N) atomic numbers
  std::int64_t owned = 0;                         // nodes whose energy counts
  std::vector<std::int64_t> centre, neighbour;    // (E)
  std::vector<double> vec;                        // (E, 3) r_j - r_i in Å, differenced in double
};

struct Result {
  std::vector<double> node_energy;      // (N) eV
  std::vector<double> edge_gradient;    // (E, 3) eV/Å, d(sum of owned node_energy)/d vec
};

class Model {
 public:
  // Checks manifest and hash before anything is executed; `local_rank` chooses among several GPUs. Throws Error.
  Model(const std::string &path, const Options &options, int local_rank);
  ~Model();

  Result evaluate(const Graph &graph) const;    // throws Error

  Manifest manifest;
  std::string running_torch;    // version

 private:
  struct Impl;
  std::shared_ptr<Impl> impl;
  Options options;

  void fix_isolated_atoms();
};

}    // namespace mlff

#endif
