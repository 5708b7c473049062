"""What every experiment needs and none is about: processes, devices, checkpoints, meters, files, decoding."""
