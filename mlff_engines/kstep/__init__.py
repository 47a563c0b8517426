"""k-step jumps and correctors: update equations as pure functions of arrays, in Å, Å/fs, amu, eV and fs.

| module        | what it holds                                                                            |
|---------------|------------------------------------------------------------------------------------------|
| `particles`   | kick, drift and noise, on the manifold of the bond constraints where there are any       |
| `constraints` | SHAKE and RATTLE for bond lengths                                                        |
| `propagators` | velocity Verlet, drift-kick-drift, BAOAB, and variant C: RESPA with a student inside     |
| `jumps`       | variants A1 and A2: a jump of k steps, then one step of the true force                   |
| `metropolis`  | variant D: proposals accepted on the true energy                                         |
| `stability`   | which macro-steps are safe                                                               |
| `temperature` | that of configurations, under constraints too                                            |
| `learned`     | a trained jump from its artifact, refused for runs it was not made for                   |
| `meter`       | counts what the true potential is asked                                                  |
| `ladder`      | jumps of more and more steps, as long as nothing gets worse                              |
| `pipeline`    | all stages one after another, each by its own command                                    |
"""
