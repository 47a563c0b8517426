#include "manifest.h"

#include "generated.h"
#include "nlohmann/json.hpp"
#include "sha256.h"

#include <algorithm>
#include <charconv>

using json = nlohmann_lmp::json;    // the copy that LAMMPS ships

namespace mlff {
namespace {

const std::string MANIFEST = "extra/mlff.json";

// Python's repr of a float: the shortest digits that round-trip, an exponent outside [1e-4, 1e16)
std::string python_repr(double value)
{
  char buffer[64];
  const auto scientific = std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  const std::string text(buffer, scientific.ptr);
  const int exponent = std::stoi(text.substr(text.find('e') + 1));
  if (exponent < -4 || exponent >= 16) return text;
  const auto fixed = std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::fixed);
  const std::string plain(buffer, fixed.ptr);
  return plain.find('.') == std::string::npos ? plain + ".0" : plain;
}

// nlohmann's objects are sorted by key, as sort_keys does
void write(const json &value, std::string &out)
{
  const bool object = value.is_object();
  if (!object && !value.is_array()) {
    out += value.is_number_float() ? python_repr(value.get<double>()) : value.dump(-1, ' ', true);
    return;
  }
  out += object ? '{' : '[';
  bool first = true;
  for (const auto &item : value.items()) {
    if (!first) out += ", ";
    first = false;
    if (object) out += json(item.key()).dump(-1, ' ', true) + ": ";
    write(item.value(), out);
  }
  out += object ? '}' : ']';
}

std::string digest(const Archive &archive, json claims)
{
  claims.erase("sha256");
  std::string text;
  write(claims, text);
  Sha256 hash;
  hash.update(text);
  auto names = archive.names;
  std::sort(names.begin(), names.end());
  for (const auto &name : names) {
    if (name == MANIFEST) continue;
    const std::string content = archive.read(name);
    hash.update(name + '\0' + std::to_string(content.size()) + '\0');
    hash.update(content);
  }
  return hash.digest();
}

Manifest parse(const json &content)
{
  if (content.at("units").at("length") != "Angstrom" || content.at("units").at("energy") != "eV" ||
      content.at("kind") != "potential")
    throw Error("is no potential in eV and Angstrom: its manifest says kind " + content.at("kind").dump() +
                ", units " + content.at("units").dump());
  Manifest m;
  content.at("cutoff").get_to(m.cutoff);
  content.at("layers").get_to(m.layers);
  content.at("dtype").get_to(m.dtype);
  content.at("takes_charge").get_to(m.takes_charge);
  content.at("takes_spin").get_to(m.takes_spin);
  content.at("e0").get_to(m.e0);
  content.at("torch_version").get_to(m.torch_version);
  content.at("sha256").get_to(m.sha256);
  const json &domain = content.at("domain");
  domain.at("elements").get_to(m.elements);
  domain.at("min_distances").get_to(m.min_distances);
  domain.at("charges").get_to(m.charges);
  domain.at("spins").get_to(m.spins);
  m.fused = content.value("kernel", "torch") == "fused";
  const json &members = content.at("models");
  m.could_be_fused = std::all_of(members.begin(), members.end(), [](const json &member) {
    return std::find(FUSED.begin(), FUSED.end(), member.value("arch", "")) != FUSED.end();
  });
  const json bytes = content.value("bytes_per_edge", json());
  if (bytes.is_number() && !m.fused) bytes.get_to(m.bytes_per_edge);
  if (!(m.cutoff > 0) || m.layers < 1 || m.elements.empty() || m.charges.empty() || m.spins.empty())
    throw Error("has a manifest without cutoff, layers, elements, charges or spins");
  return m;
}

}    // namespace

std::string canonical_json(const std::string &text)
{
  std::string out;
  write(json::parse(text), out);
  return out;
}

Manifest read_manifest(const Archive &archive)
{
  const std::string again = ". Export the artifact again from its checkpoint: mlff-export CHECKPOINT -o student.pt";
  const auto &path = archive.path;
  if (std::find(archive.names.begin(), archive.names.end(), MANIFEST) == archive.names.end())
    throw Error(path + " has no manifest: it is a torch file made by another program" + again);
  try {
    const json content = json::parse(archive.read(MANIFEST));
    const int schema = content.at("schema_version");
    if (schema > SCHEMA)
      throw Error("has schema version " + std::to_string(schema) + "; this plug-in reads up to " +
                  std::to_string(SCHEMA) + ": upgrade mlff-engines and build the plug-in again");
    const std::string expected = content.at("sha256"), found = digest(archive, content);
    if (found != expected)
      throw Error("was altered or damaged: SHA-256 of its content is " + found.substr(0, 12) +
                  "..., its manifest says " + expected.substr(0, 12) + "... It was not executed; copy it anew" + again);
    return parse(content);
  } catch (const json::exception &error) {
    throw Error("manifest of " + path + ": " + error.what() + again);
  } catch (const Error &error) {
    throw Error(path + " " + error.what());
  }
}

}    // namespace mlff
