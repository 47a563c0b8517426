// What an artifact says of itself: the part of mlff_engines/artifact.py (class Manifest) that an engine reads.

#ifndef MLFF_MANIFEST_H
#define MLFF_MANIFEST_H

#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace mlff {

// what is wrong, what is allowed and what to do next
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Manifest {
  double cutoff = 0.0;    // Å
  int layers = 0;         // interaction range = layers x cutoff
  std::string dtype;      // float32 or float64
  bool takes_charge = false;
  bool takes_spin = false;
  std::vector<std::string> elements;
  std::map<std::string, double> e0;               // eV, energy of the isolated atom
  std::map<std::string, double> min_distances;    // shortest seen in training per pair such as "C-H", Å
  std::vector<double> charges, spins;             // seen in training
  double bytes_per_edge = 0.0;                    // of plain torch; 0: unknown
  bool fused = false;                             // the program names an operator of mlff_engines/kernels
  bool could_be_fused = false;                    // every member is of an architecture that has one
  std::string torch_version;
  std::string sha256;                             // of all that the artifact holds
};

// The entries of an artifact's archive: their names and a way to read one.
struct Archive {
  std::string path;    // for messages
  std::vector<std::string> names;
  std::function<std::string(const std::string &)> read;
};

// The manifest, its schema and SHA-256 checked; nothing of the artifact is executed. Throws Error.
Manifest read_manifest(const Archive &archive);

// Python's json.dumps(json.loads(text), sort_keys=True), byte by byte: the hash is taken over this form.
std::string canonical_json(const std::string &text);

}    // namespace mlff

#endif
