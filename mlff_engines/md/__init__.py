"""Many replicas at once: molecular dynamics in torch alone, for ensembles of small systems on one core or GPU."""
