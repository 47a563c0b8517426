"""From SMILES to molecular dynamics in OpenMM: molecules, their force fields, training trajectories, large steps.

| module        | what it holds                                                                         |
|---------------|---------------------------------------------------------------------------------------|
| `config`      | what `md.yaml` and `run.yaml` say                                                     |
| `molecules`   | SMILES to conformers                                                                  |
| `mmff`        | MMFF94 as OpenMM forces                                                               |
| `forcefields` | a System of a molecule, by any of the force fields                                    |
| `prepare`     | stage 1 of `mlff kstep`: molecules on disk                                            |
| `simulate`    | stage 2: training trajectories                                                        |
| `corrector`   | a student and the true potential in one System, and how often the latter was asked    |
| `hybrid`      | variant C: the integrator for such a System                                           |
| `drivers`     | variants A (jumps) and D (Metropolis), as loops around one Context                    |
| `simulations` | the simulation of each variant and baseline                                           |
| `run`         | stage 5: all variants and baselines from the same starts                              |
| `samples`     | what is kept of its runs, and the true energies of their frames                       |
| `commands`    | the command line of these stages                                                      |
"""
