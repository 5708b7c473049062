"""The infrastructure of every experiment: processes, devices, checkpoints, meters, files, decoding."""
