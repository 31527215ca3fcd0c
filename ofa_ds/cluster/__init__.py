"""Many hosts: who takes part. The processes themselves are started by DeepSpeed's launcher, torchrun, Slurm or MPI."""
