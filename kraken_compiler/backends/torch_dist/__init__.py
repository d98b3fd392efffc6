"""The torch.distributed backend: one process per lane, NCCL on GPUs, gloo on CPUs."""
