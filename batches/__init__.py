"""The way of a batch: decoded by workers, kept in a cache, copied to the device."""
