"""What the rules need before any program runs: the config, a program's modules, SLURM."""
