// pair_style mlff: an mlff-engines artifact in LAMMPS.
//
//   pair_style mlff student.pt [device cpu|cuda|cuda:N] [threads N] [dtype float32|float64]
//                              [kernel auto|compiled] [charge Q] [spin S] [outside warn|error|ignore]
//   pair_coeff * * H C N O

#ifndef LMP_PAIR_MLFF_H
#define LMP_PAIR_MLFF_H

#include "model.h"
#include "pair.h"

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace LAMMPS_NS {

class PairMLFF : public Pair {
 public:
  PairMLFF(class LAMMPS *);
  ~PairMLFF() override;

  void settings(int, char **) override;
  void coeff(int, char **) override;
  void init_style() override;
  double init_one(int, int) override;
  void compute(int, int) override;
  void finish() override;
  double memory_usage() override;

 private:
  enum class Outside { WARN, ERROR, IGNORE };

  std::unique_ptr<mlff::Model> model;
  mlff::Options options;
  Outside outside = Outside::WARN;
  std::vector<int> numbers;                        // (ntypes + 1) atomic number of each type, 0 for NULL
  std::vector<std::vector<double>> min_square;     // (ntypes + 1)² shortest distance of the training data, squared
  std::set<std::pair<int, int>> reported;          // pairs of types already warned of
  double energy_unit = 1.0;                        // one eV in units of the input

  mlff::Graph graph;
  std::vector<int> atoms;    // (N) the atom, local or ghost, that stands for each node

  void allocate();
  void check_state(const std::string &name, double value, bool taken, const std::vector<double> &trained);
  void check_masses();
  void build_graph(std::string &warning);
  void check_distance(int i, int j, double square, std::string &warning);
  void check_finite(const mlff::Result &result);
  void tally(const mlff::Result &result);
  std::string name_of(int i) const;
  void agree(const std::string &problem, const std::string &warning = "");
};

}    // namespace LAMMPS_NS

#endif
