"""Progress bars, pictures, names of devices, whole files and UsageError, for every layer."""
