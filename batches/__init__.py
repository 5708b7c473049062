"""Batches: decoded by workers, cached, copied to the device, and resized there."""
