#include "model.h"

#include "generated.h"
#include "sha256.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/cuda.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <torch/version.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <utility>

#include <dlfcn.h>

namespace mlff {
namespace {

// the last line of a message holds the cause; what precedes it is TorchScript's trace
std::string cause(const std::exception &error)
{
  const auto *of_torch = dynamic_cast<const c10::Error *>(&error);
  std::istringstream lines(of_torch ? of_torch->what_without_backtrace() : error.what());
  std::string line, last;
  while (std::getline(lines, line))
    if (line.find_first_not_of(" \t\r") != std::string::npos) last = line;
  return last;
}

std::string bytes_of(const std::string &path)
{
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (!file || !(content << file.rdbuf())) throw Error("cannot read " + path + ": " + std::strerror(errno));
  return content.str();
}

std::string content_of(const std::string &path)
{
  const std::string make = "mlff-export CHECKPOINT -o student.pt";
  std::error_code status;
  if (!std::filesystem::exists(path, status)) throw Error("no artifact at " + path + "; make one with: " + make);
  const auto ending = std::filesystem::path(path).extension();
  if (std::filesystem::is_directory(path, status) || ending == ".safetensors" || ending == ".yaml")
    throw Error(path + " is a checkpoint, not an artifact; export it: " + make);
  return bytes_of(path);
}

std::shared_ptr<caffe2::serialize::PyTorchStreamReader> open_archive(
    const std::string &path, const std::string &content, std::istream &stream)
{
  try {
    return std::make_shared<caffe2::serialize::PyTorchStreamReader>(&stream);
  } catch (const std::exception &) {
    const std::string what = content.starts_with("PK") ? " is a truncated artifact"
        : content.starts_with("\x80")                  ? " is a pickle"
                                                       : " is no artifact";
    throw Error(path + what + " (" + std::to_string(content.size()) +
                " bytes); copy it anew, or make it with: mlff-export CHECKPOINT -o student.pt");
  }
}

c10::Device device_for(const std::string &name, int local_rank)
{
  c10::Device device("cpu");
  try {
    device = c10::Device(name);
  } catch (const std::exception &) {
    throw Error("unknown device " + name + "; allowed: cpu, cuda, cuda:1, ...");
  }
  if (device.is_cpu()) return device;
  if (!device.is_cuda()) throw Error("device " + name + " is not supported; allowed: cpu, cuda, cuda:1, ...");
  const int count = torch::cuda::is_available() ? static_cast<int>(torch::cuda::device_count()) : 0;
  if (count == 0)
    throw Error("device " + name + " was asked for but this torch " + TORCH_VERSION + " sees no CUDA: use device cpu");
  if (device.index() >= count)
    throw Error("device " + name + " was asked for but there are " + std::to_string(count) + " GPUs");
  const int index = device.has_index() ? device.index() : local_rank % count;
  return {c10::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

std::set<std::string> words_of(const std::string &text)
{
  std::istringstream stream(text);
  std::set<std::string> words;
  for (std::string word; stream >> word;) words.insert(word);
  return words;
}

// What was compiled for one processor would end another by a signal.
void require_processor(const std::string &what, const std::string &advice)
{
  std::ifstream information("/proc/cpuinfo");
  for (std::string line; std::getline(information, line);) {
    if (!line.starts_with("flags") && !line.starts_with("Features")) continue;
    const auto has = words_of(line), needed = words_of(FEATURES);
    for (const auto &feature : needed)
      if (!has.contains(feature))
        throw Error(what + " for a processor with " + feature + ", which this one lacks" + advice);
    break;
  }
}

// Registers the operators that fused artifacts name.
void load_kernels(const std::string &path)
{
  for (const auto &name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.starts_with("mlff::")) return;    // by another pair style, or by Python
  const std::string again = ". Build them here: mlff lammps build-plugin; or export the artifact with --kernel torch";
  require_processor(path + " needs the fused kernels, and those of this plug-in are", again);
  if (!dlopen(KERNELS, RTLD_NOW | RTLD_LOCAL))
    throw Error(path + " needs the fused kernels, and they cannot be loaded: " + dlerror() + again);
}

void cast(torch::jit::Module &module, at::ScalarType dtype, const std::string &name)
{
  const auto convert = [&](const auto &tensors) {
    for (const auto &item : tensors) {
      // energy references are float64 in every artifact
      if (!item.value.is_floating_point() || item.name.find(".reference.") != std::string::npos) continue;
      item.value.set_data(item.value.to(dtype));
      if (!item.value.isfinite().all().template item<bool>())
        throw Error(item.name + " is not finite in " + name + ": use the artifact in its own dtype");
    }
  };
  convert(module.named_parameters());
  convert(module.named_buffers());
}

template <typename T> at::Tensor view(const std::vector<T> &values, at::IntArrayRef shape)
{
  return at::from_blob(const_cast<T *>(values.data()), shape, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>()));
}

std::vector<double> copied(const at::Tensor &tensor)
{
  const at::Tensor flat = tensor.detach().to(at::kCPU, at::kDouble).contiguous();
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

// Python puts a package there only after it has reproduced the artifact.
std::unique_ptr<torch::inductor::AOTIModelPackageLoader> load_package(
    const std::string &path, const std::string &sha256, const std::string &dtype)
{
  const char *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");    // as in native.py
  const auto caches = cache && *cache ? std::filesystem::path(cache) : std::filesystem::path(home ? home : "") / ".cache";
  const auto package = caches / PACKAGES / (sha256 + "-" + dtype + ".pt2");
  const std::string again = ". Compile it here: mlff-export " + path + " --compile --dtype " + dtype;
  std::error_code status;
  if (!std::filesystem::exists(package, status))
    throw Error("there is no compiled form of " + path + " at " + package.string() + again);
  require_processor("the compiled models of this plug-in are", "; or use kernel auto");
  // torch's own reader would run what is damaged
  Sha256 digest;
  digest.update(bytes_of(package));
  if (digest.digest() != bytes_of(std::filesystem::path(package).replace_extension(".sha256")))
    throw Error(package.string() + " is damaged. Delete it" + again);
  try {
    return std::make_unique<torch::inductor::AOTIModelPackageLoader>(package.string());
  } catch (const std::exception &error) {
    throw Error("cannot load " + package.string() + ": " + cause(error) + ". Delete it" + again);
  }
}

}    // namespace

struct Model::Impl {
  torch::jit::Module module;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> package;    // in its place, where there is one
  c10::Device device{c10::kCPU};
  at::ScalarType dtype{at::kFloat};
  std::map<std::int64_t, double> correction;    // eV, by atomic number
};

Model::Model(const std::string &path, const Options &chosen, int local_rank) :
    running_torch(TORCH_VERSION), impl(std::make_shared<Impl>()), options(chosen)
{
  const std::string content = content_of(path);
  std::istringstream stream(content);
  const auto reader = open_archive(path, content, stream);
  try {
    manifest = read_manifest({path, reader->getAllRecords(), [&](const std::string &name) {
                                const auto [data, size] = reader->getRecord(name);
                                return std::string(static_cast<const char *>(data.get()), size);
                              }});
  } catch (const c10::Error &error) {
    throw Error(path + " is damaged (" + cause(error) + "); copy it anew or export it again");
  }
  if (manifest.fused && !options.compiled && !options.dtype.empty() && options.dtype != manifest.dtype)
    throw Error("dtype " + options.dtype + ": the tables of a fused kernel are for one dtype, and those of " + path +
                " for " + manifest.dtype + ". Export it again: mlff-export ARTIFACT --kernel fused --dtype " +
                options.dtype + " -o student.pt");
  if (manifest.fused && !options.compiled) load_kernels(path);
  impl->device = device_for(options.device, local_rank);
  if (options.compiled && !impl->device.is_cpu())
    throw Error("kernel compiled runs on the CPU, not on " + impl->device.str() + ": use device cpu, or kernel auto");
  at::set_num_threads(options.threads);
  const std::string dtype = options.dtype.empty() ? manifest.dtype : options.dtype;
  // decks that loop over `clear` ask for the same one again and again
  static std::pair<std::string, std::shared_ptr<Impl>> last;
  const std::string wanted =
      manifest.sha256 + " " + dtype + " " + impl->device.str() + (options.compiled ? " compiled" : "");
  if (last.first == wanted) {
    impl = last.second;
    return;
  }
  impl->dtype = dtype == "float64" ? at::kDouble : at::kFloat;
  if (options.compiled) {
    impl->package = load_package(path, manifest.sha256, dtype);
    last = {wanted, impl};
    return;
  }
  try {
    // from the bytes that were hashed, not from the file anew
    std::istringstream verified(content);
    impl->module = torch::jit::load(verified, impl->device);
    impl->module.eval();
  } catch (const std::exception &error) {
    const std::string trace = error.what(), sign = "Unknown builtin op: ";
    if (const auto start = trace.find(sign); start != std::string::npos) {
      const std::string name = trace.substr(start + sign.size());
      throw Error(path + " uses the operator " + name.substr(0, name.find_first_of(".\n")) + ", which this torch " +
                  running_torch + " does not have. Export the checkpoint again on this machine");
    }
    throw Error("torch " + running_torch + " cannot load " + path + " (made with torch " + manifest.torch_version +
                "): " + cause(error) + ". Export the checkpoint again on this machine");
  }
  if (dtype != manifest.dtype) {
    cast(impl->module, impl->dtype, dtype);
    if (dtype == "float64") fix_isolated_atoms();
  }
  last = {wanted, impl};
}

// The network's output for lone atoms was recorded in float32: off by its rounding, they would miss their E0
void Model::fix_isolated_atoms()
{
  Graph lone;
  for (std::size_t z = 1; z < ELEMENTS.size(); z++)
    if (manifest.e0.contains(ELEMENTS[z].symbol)) lone.numbers.push_back(static_cast<std::int64_t>(z));
  lone.owned = static_cast<std::int64_t>(lone.numbers.size());
  const Options asked = std::exchange(options, Options());    // neutral
  const auto found = evaluate(lone).node_energy;
  options = asked;
  for (std::size_t i = 0; i < found.size(); i++)
    impl->correction[lone.numbers[i]] = manifest.e0.at(ELEMENTS[lone.numbers[i]].symbol) - found[i];
}

Model::~Model() = default;

Result Model::evaluate(const Graph &graph) const
{
  const auto nodes = static_cast<std::int64_t>(graph.numbers.size());
  const auto edges = static_cast<std::int64_t>(graph.centre.size());
  const auto real = at::TensorOptions().dtype(impl->dtype).device(impl->device);
  try {
    const at::AutoGradMode with_gradients(true);
    // the optimising executor recompiles for each new shape, tens of milliseconds at a time, and gains nothing
    const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
    // in the order of INPUTS in graph.py, which a package takes them in
    const std::vector<std::pair<std::string, at::Tensor>> inputs{
        {"numbers", view(graph.numbers, {nodes}).to(impl->device)},
        {"edge_index", at::stack({view(graph.centre, {edges}), view(graph.neighbour, {edges})}).to(impl->device)},
        {"edge_vec", view(graph.vec, {edges, 3}).to(real)},
        {"owned", at::arange(nodes, impl->device) < graph.owned},
        {"batch", at::zeros({nodes}, at::TensorOptions().dtype(at::kLong).device(impl->device))},
        {"charge", at::full({1}, options.charge, real)},
        {"spin", at::full({1}, options.spin, real)}};
    if (impl->package) {
      std::vector<at::Tensor> in;
      for (const auto &input : inputs) in.push_back(input.second);
      const at::NoGradGuard no_gradients;    // they are part of what was compiled
      const auto out = impl->package->run(in);
      return {copied(out.at(0)), copied(out.at(1))};
    }
    c10::Dict<std::string, at::Tensor> in;
    for (const auto &[name, tensor] : inputs) in.insert(name, tensor);
    const auto out = impl->module.forward({in}).toGenericDict();
    Result result{copied(out.at("node_energy").toTensor()), copied(out.at("edge_gradient").toTensor())};
    if (!impl->correction.empty())
      for (std::size_t i = 0; i < graph.numbers.size(); i++)
        result.node_energy[i] += impl->correction.at(graph.numbers[i]);
    return result;
  } catch (const std::exception &error) {
    const std::string what = cause(error);
    const bool memory = dynamic_cast<const std::bad_alloc *>(&error) != nullptr ||
        what.find("memory") != std::string::npos || what.find("DefaultCPUAllocator") != std::string::npos;
    if (!memory) throw Error("the artifact failed: " + what);
    std::ostringstream advice;
    advice << "out of memory for " << nodes << " atoms with " << edges << " edges on " << impl->device.str();
    if (manifest.bytes_per_edge > 0)
      advice << ": it needs about " << edges * manifest.bytes_per_edge / 0x1p30 << " GiB";
    throw Error(advice.str() + ". Use a smaller box, more ranks on more machines, float32, or another device");
  }
}

}    // namespace mlff
