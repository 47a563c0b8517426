#include "pair_mlff.h"

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "update.h"
#include "utils.h"

#include "generated.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <unordered_map>

using namespace LAMMPS_NS;

namespace {

std::string joined(const std::vector<std::string> &parts)
{
  std::string text;
  for (const auto &part : parts) text += (text.empty() ? "" : ", ") + part;
  return text;
}

int number_of(const std::string &symbol)
{
  for (std::size_t z = 1; z < mlff::ELEMENTS.size(); z++)
    if (symbol == mlff::ELEMENTS[z].symbol) return static_cast<int>(z);
  return 0;
}

std::string shown(double value)
{
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

}    // namespace

PairMLFF::PairMLFF(LAMMPS *lmp) : Pair(lmp)
{
  single_enable = 0;
  restartinfo = 0;    // a restart file must not depend on where an artifact lies
  one_coeff = 1;
  manybody_flag = 1;
  no_virial_fdotr_compute = 1;    // with ghosts folded onto their owners, F·r is not the virial
  centroidstressflag = CENTROID_NOTAVAIL;
}

PairMLFF::~PairMLFF()
{
  if (!allocated) return;
  memory->destroy(setflag);
  memory->destroy(cutsq);
  memory->destroy(cutghost);
}

void PairMLFF::allocate()
{
  allocated = 1;
  const int n = atom->ntypes + 1;
  memory->create(setflag, n, n, "pair:setflag");
  memory->create(cutsq, n, n, "pair:cutsq");
  memory->create(cutghost, n, n, "pair:cutghost");
  map = new int[n];
}

void PairMLFF::settings(int narg, char **arg)
{
  if (narg < 1) error->all(FLERR, "pair_style mlff needs the path of an artifact: pair_style mlff student.pt");
  options = mlff::Options();
  const char *kernel = std::getenv("MLFF_KERNEL");    // as in Python; the program itself says torch or fused
  options.compiled = kernel && std::string(kernel) == "compiled";
  outside = Outside::WARN;
  for (int i = 1; i < narg; i += 2) {
    const std::string key = arg[i];
    if (i + 1 == narg) error->all(FLERR, "pair_style mlff: no value follows " + key);
    const std::string value = arg[i + 1];
    if (key == "device") {
      options.device = value;
    } else if (key == "threads") {
      options.threads = utils::inumeric(FLERR, value, false, lmp);
      if (options.threads < 1) error->all(FLERR, "pair_style mlff: threads " + value + "; allowed: 1 or more");
    } else if (key == "dtype" && (value == "float32" || value == "float64")) {
      options.dtype = value;
    } else if (key == "kernel" && (value == "auto" || value == "compiled")) {
      options.compiled = value == "compiled";
    } else if (key == "charge") {
      options.charge = utils::numeric(FLERR, value, false, lmp);
    } else if (key == "spin") {
      options.spin = utils::numeric(FLERR, value, false, lmp);
    } else if (key == "outside" && (value == "warn" || value == "error" || value == "ignore")) {
      outside = value == "warn" ? Outside::WARN : value == "error" ? Outside::ERROR : Outside::IGNORE;
    } else {
      error->all(FLERR,
                 "pair_style mlff: " + key + " " + value + " is unknown; allowed: device cpu|cuda|cuda:N, threads N, "
                 "dtype float32|float64, kernel auto|compiled, charge Q, spin S, outside warn|error|ignore");
    }
  }

  MPI_Comm machine;
  int local_rank;
  MPI_Comm_split_type(world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
  MPI_Comm_rank(machine, &local_rank);
  MPI_Comm_free(&machine);
  std::string problem;
  try {
    model = std::make_unique<mlff::Model>(arg[0], options, local_rank);
  } catch (const std::exception &failure) {
    problem = failure.what();
  }
  agree(problem);

  const auto &manifest = model->manifest;
  check_state("charge", options.charge, manifest.takes_charge, manifest.charges);
  check_state("spin", options.spin, manifest.takes_spin, manifest.spins);
  const auto release = [](const std::string &version) {
    return version.substr(0, version.find('.', version.find('.') + 1));
  };
  if (comm->me == 0 && release(model->running_torch) != release(manifest.torch_version))
    error->warning(FLERR, "pair_style mlff: the artifact was made with torch " + manifest.torch_version +
                   " and runs on " + model->running_torch + "; check it with: mlff verify " + arg[0]);
  if (comm->me == 0 && options.device == "cpu" && manifest.could_be_fused && !manifest.fused && !options.compiled)
    utils::logmesg(lmp, std::string("pair_style mlff: ") + arg[0] + " runs in plain torch. On CPUs it is several times "
                   "faster with the fused kernel: mlff-export ARTIFACT --kernel fused -o fused.pt\n");
  // neighbours of ghosts carry the messages of the layers after the first
  ghostneigh = comm->nprocs > 1 && manifest.layers > 1;
  if (allocated)    // another artifact: its elements must be named anew
    for (int i = 1; i <= atom->ntypes; i++)
      for (int j = 1; j <= atom->ntypes; j++) setflag[i][j] = 0;
}

void PairMLFF::check_state(const std::string &name, double value, bool taken, const std::vector<double> &trained)
{
  if (std::find(trained.begin(), trained.end(), value) != trained.end()) return;
  std::vector<std::string> allowed;
  for (const double one : trained) allowed.push_back(shown(one));
  const std::string seen = " was not in the training data (" + joined(allowed) + ")";
  if (!taken)
    error->all(FLERR, "pair_style mlff: " + name + " " + shown(value) + " is not supported: the model has no " + name +
               " input and was trained at " + joined(allowed) + ". Set it to that, or train a student with model." +
               name + ": true");
  if (outside == Outside::ERROR) error->all(FLERR, "pair_style mlff: " + name + " " + shown(value) + seen);
  if (outside == Outside::WARN && comm->me == 0)
    error->warning(FLERR, "pair_style mlff: " + name + " " + shown(value) + seen + ": the model extrapolates");
}

void PairMLFF::coeff(int narg, char **arg)
{
  const int types = atom->ntypes;
  const auto &known = model->manifest.elements;
  if (narg != types + 2 || strcmp(arg[0], "*") != 0 || strcmp(arg[1], "*") != 0) {
    std::string table;
    for (int type = 1; type <= types; type++)
      table += "\n  type " + std::to_string(type) + " -> " + (type + 1 < narg ? arg[type + 1] : "?");
    error->all(FLERR, "pair_coeff of mlff is * * and one element for each of the " + std::to_string(types) +
               " atom types; got " + std::to_string(std::max(narg - 2, 0)) + ":" + table +
               "\nThe model knows " + joined(known));
  }
  numbers.assign(types + 1, 0);
  for (int type = 1; type <= types; type++) {
    const std::string symbol = arg[type + 1];
    if (symbol == "NULL") {
      if (!utils::strmatch(force->pair_style, "^hybrid"))
        error->all(FLERR, "pair_coeff maps type " + std::to_string(type) + " to NULL: its atoms would feel nothing. "
                   "Name its element, or use pair_style hybrid/overlay with another style for that type");
      continue;
    }
    if (std::find(known.begin(), known.end(), symbol) == known.end())
      error->all(FLERR, "pair_coeff maps type " + std::to_string(type) + " to " + symbol + ", which the model does not "
                 "know; it was trained for " + joined(known) + ". Train a student whose data contain " + symbol);
    numbers[type] = number_of(symbol);
  }
  if (!allocated) allocate();
  map_element2type(types, arg + 2);

  const auto &distances = model->manifest.min_distances;
  min_square.assign(types + 1, std::vector<double>(types + 1, 0.0));
  for (int i = 1; i <= types; i++)
    for (int j = 1; j <= types; j++) {
      const std::string pair = std::string(arg[i + 1]) + "-" + arg[j + 1];
      const auto found = distances.find(pair);
      if (found == distances.end()) continue;
      min_square[i][j] = min_square[j][i] = found->second * found->second;
    }
}

void PairMLFF::init_style()
{
  const std::string unit = update->unit_style;
  if (unit != "metal" && unit != "real")
    error->all(FLERR, "pair_style mlff: units " + unit + "; allowed: metal, real");
  energy_unit = unit == "real" ? 1.0 / mlff::KCAL_PER_MOL : 1.0;
  if (!force->newton_pair) error->all(FLERR, "pair_style mlff needs newton on: remove `newton off` from the input");
  if (!atom->tag_enable) error->all(FLERR, "pair_style mlff needs atom ids: remove `atom_modify id no` from the input");
  for (int k = 1; k <= 3 && atom->molecular != Atom::ATOMIC; k++)
    if (force->special_lj[k] == 0.0 && force->special_coul[k] == 0.0 && !force->kspace)
      error->all(FLERR, "pair_style mlff: special_bonds takes bonded neighbours off the list, which the model needs. "
                 "Use: special_bonds lj/coul 1 1 1, or lj 1 1 1 coul 0 0 0 beside a Coulomb style");
  if (neighbor->includegroup)
    error->all(FLERR, "pair_style mlff: `neigh_modify include` leaves atoms without neighbours; remove it");
  if (comm->me == 0 && (neighbor->nex_type || neighbor->nex_group || neighbor->nex_mol))
    error->warning(FLERR, "pair_style mlff: `neigh_modify exclude` hides neighbours from the model, "
                   "which changes the energies of all that remains");
  check_masses();

  const bool halo = comm->nprocs > 1;
  if (halo) {
    if (comm->mode != Comm::SINGLE)
      error->all(FLERR, "pair_style mlff on several ranks needs one ghost cutoff: use comm_modify mode single");
    const double needed = model->manifest.layers * model->manifest.cutoff + neighbor->skin;
    comm->cutghostuser = std::max(comm->cutghostuser, needed);
    if (comm->me == 0)
      utils::logmesg(lmp, "pair_style mlff: ghost cutoff " + shown(comm->cutghostuser) + " Angstrom (" +
                     std::to_string(model->manifest.layers) + " layers x " + shown(model->manifest.cutoff) + " + skin " +
                     shown(neighbor->skin) + ")\n");
  }
  neighbor->add_request(this, ghostneigh ? NeighConst::REQ_FULL | NeighConst::REQ_GHOST : NeighConst::REQ_FULL);
}

// the order of pair_coeff is the classic mistake; isotopes and repartitioned masses are not
void PairMLFF::check_masses()
{
  if (atom->rmass_flag || !atom->mass) return;
  for (int type = 1; type <= atom->ntypes; type++) {
    if (!numbers[type] || !atom->mass_setflag[type]) continue;
    const double mass = atom->mass[type];
    const auto &own = mlff::ELEMENTS[numbers[type]];
    if (std::abs(mass - own.mass) <= 0.5) continue;
    const std::string what = "pair_style mlff: type " + std::to_string(type) + " is mapped to " + own.symbol +
        " but has mass " + shown(mass);
    for (const auto &symbol : model->manifest.elements)
      if (std::abs(mass - mlff::ELEMENTS[number_of(symbol)].mass) <= 0.1)
        error->all(FLERR, what + ", that of " + symbol + ": correct the order of elements in pair_coeff, or the mass");
    if (comm->me == 0) error->warning(FLERR, what + "; the element has " + shown(own.mass));
  }
}

double PairMLFF::init_one(int i, int j)
{
  if (!setflag[i][j]) error->all(FLERR, "All pair coeffs are not set: pair_coeff * * needs one element per atom type");
  cutghost[i][j] = cutghost[j][i] = model->manifest.cutoff;
  return model->manifest.cutoff;
}

void PairMLFF::compute(int eflag, int vflag)
{
  ev_init(eflag, vflag);
  std::string problem, warning;
  mlff::Result result;
  try {
    build_graph(warning);
    if (graph.owned) result = model->evaluate(graph);
    check_finite(result);
  } catch (const std::exception &failure) {
    problem = failure.what();
  }
  agree(problem, warning);
  tally(result);
}

// One node per atom id. Every image of an atom of this rank is that atom; among the images of a foreign atom the first
// one met, which lies fewest hops away, stands for all. After `layers` hops nothing can be felt any more. On one rank
// all atoms are met in the first hop: the graph is that of the whole periodic system, without a halo.
void PairMLFF::build_graph(std::string &warning)
{
  const double cutoff_square = model->manifest.cutoff * model->manifest.cutoff;
  double **x = atom->x;
  const int *type = atom->type;
  const tagint *tag = atom->tag;
  std::unordered_map<tagint, int> node_of_id;
  std::vector<int> node_of_atom(atom->nlocal + atom->nghost, -1);
  graph.numbers.clear();
  graph.centre.clear();
  graph.neighbour.clear();
  graph.vec.clear();
  atoms.clear();

  const auto add = [&](int i) {
    const auto [found, fresh] = node_of_id.try_emplace(tag[i], static_cast<int>(atoms.size()));
    if (fresh) {
      atoms.push_back(i);
      graph.numbers.push_back(numbers[type[i]]);
    }
    return node_of_atom[i] = found->second;
  };
  for (int i = 0; i < atom->nlocal; i++)
    if (numbers[type[i]]) add(i);
  graph.owned = static_cast<std::int64_t>(atoms.size());

  std::size_t begin = 0, end = atoms.size();
  for (int hop = 0; hop < model->manifest.layers && begin < end; hop++) {
    for (std::size_t centre = begin; centre < end; centre++) {
      const int i = atoms[centre];
      for (int n = 0; n < list->numneigh[i]; n++) {
        const int j = list->firstneigh[i][n] & NEIGHMASK;
        const double dx = x[j][0] - x[i][0], dy = x[j][1] - x[i][1], dz = x[j][2] - x[i][2];
        const double square = dx * dx + dy * dy + dz * dz;
        if (square >= cutoff_square || !numbers[type[j]]) continue;
        if (hop == 0 && square < std::max(min_square[type[i]][type[j]], mlff::COINCIDENT * mlff::COINCIDENT))
          check_distance(i, j, square, warning);
        const int neighbour = node_of_atom[j] < 0 ? add(j) : node_of_atom[j];
        graph.centre.push_back(static_cast<std::int64_t>(centre));
        graph.neighbour.push_back(neighbour);
        graph.vec.insert(graph.vec.end(), {dx, dy, dz});
      }
    }
    begin = end;
    end = atoms.size();
  }
}

void PairMLFF::check_distance(int i, int j, double square, std::string &warning)
{
  const int a = atom->type[i], b = atom->type[j];
  const std::string distance = shown(std::sqrt(square)) + " Angstrom apart";
  const std::string pair = "atoms " + name_of(i) + " and " + name_of(j);
  if (square < mlff::COINCIDENT * mlff::COINCIDENT)
    throw mlff::Error(pair + " coincide: " + distance + ". Move one of them");
  const std::string what = pair + " are " + distance + "; the shortest distance of their elements in the training data "
      "is " + shown(std::sqrt(min_square[a][b])) + ": the model extrapolates, its forces may be wrong";
  if (outside == Outside::ERROR) throw mlff::Error(what);
  if (outside == Outside::WARN && reported.emplace(std::min(a, b), std::max(a, b)).second) warning = what;
}

void PairMLFF::check_finite(const mlff::Result &result)
{
  const auto refuse = [&](std::size_t node) {
    throw mlff::Error("the model's energy or force is not finite on atom " + name_of(atoms[node]) + " at step " +
                      std::to_string(update->ntimestep) + ": the structure is far outside the trained range, or the "
                      "time step is too long");
  };
  for (std::int64_t node = 0; node < graph.owned; node++)
    if (!std::isfinite(result.node_energy[node])) refuse(node);
  for (std::size_t k = 0; k < result.edge_gradient.size(); k++)
    if (!std::isfinite(result.edge_gradient[k])) refuse(graph.centre[k / 3]);
}

// F_i += g, F_j -= g, W = -sum of edge_vec x g: the twin of mlff_engines/potential.py
void PairMLFF::tally(const mlff::Result &result)
{
  double **f = atom->f;
  for (std::int64_t node = 0; node < graph.owned; node++) {
    const double energy = energy_unit * result.node_energy[node];
    if (eflag_global) eng_vdwl += energy;
    if (eflag_atom) eatom[atoms[node]] += energy;
  }
  const std::size_t edges = graph.owned ? graph.centre.size() : 0;
  for (std::size_t edge = 0; edge < edges; edge++) {
    const int i = atoms[graph.centre[edge]], j = atoms[graph.neighbour[edge]];
    const double *r = &graph.vec[3 * edge];
    double g[3];
    for (int k = 0; k < 3; k++) {
      g[k] = energy_unit * result.edge_gradient[3 * edge + k];
      f[i][k] += g[k];
      f[j][k] -= g[k];
    }
    if (!vflag_either) continue;
    const double w[6] = {-r[0] * g[0], -r[1] * g[1], -r[2] * g[2], -0.5 * (r[0] * g[1] + r[1] * g[0]),
                         -0.5 * (r[0] * g[2] + r[2] * g[0]), -0.5 * (r[1] * g[2] + r[2] * g[1])};
    for (int k = 0; k < 6; k++) {
      if (vflag_global) virial[k] += w[k];
      if (!vflag_atom) continue;
      vatom[i][k] += 0.5 * w[k];
      vatom[j][k] += 0.5 * w[k];
    }
  }
}

void PairMLFF::finish()
{
  double mine[2] = {static_cast<double>(atoms.size()), static_cast<double>(graph.centre.size())}, all[2];
  MPI_Reduce(mine, all, 2, MPI_DOUBLE, MPI_SUM, 0, world);
  if (comm->me != 0) return;
  utils::logmesg(lmp, "pair_style mlff: the last step evaluated " + shown(all[0]) + " atoms on " +
                 std::to_string(comm->nprocs) + " ranks for " + std::to_string(atom->natoms) + " in the box, and " +
                 shown(all[1]) + " edges\n");
  if (neighbor->ndanger > 0)
    error->warning(FLERR, "pair_style mlff: " + std::to_string(neighbor->ndanger) + " dangerous neighbor builds: some "
                   "forces missed neighbours. Use neigh_modify every 1 delay 0 check yes, or a larger skin");
}

double PairMLFF::memory_usage()
{
  return Pair::memory_usage() + static_cast<double>(graph.centre.capacity()) * model->manifest.bytes_per_edge;
}

std::string PairMLFF::name_of(int i) const
{
  return std::to_string(atom->tag[i]) + " (" + mlff::ELEMENTS[numbers[atom->type[i]]].symbol + ")";
}

// Every rank learns what went wrong on any: none is left waiting, and what is said reaches the log, which rank 0 writes.
void PairMLFF::agree(const std::string &problem, const std::string &warning)
{
  struct {
    int severity, rank;
  } mine{!problem.empty() ? 2 : !warning.empty() ? 1 : 0, comm->me}, worst;
  while (true) {
    MPI_Allreduce(&mine, &worst, 1, MPI_2INT, MPI_MAXLOC, world);
    if (worst.severity == 0) return;
    std::string message = problem.empty() ? warning : problem;
    int length = static_cast<int>(message.size());
    MPI_Bcast(&length, 1, MPI_INT, worst.rank, world);
    message.resize(length);
    MPI_Bcast(message.data(), length, MPI_CHAR, worst.rank, world);
    if (comm->nprocs > 1) message = "rank " + std::to_string(worst.rank) + ": " + message;
    if (worst.severity == 2) error->all(FLERR, "pair_style mlff: " + message);
    if (comm->me == 0) error->warning(FLERR, "pair_style mlff: " + message);
    if (comm->me == worst.rank) mine.severity = 0;
  }
}
