"""The operations on CPUs, through kernels that are compiled on first use."""
