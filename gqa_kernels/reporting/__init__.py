"""Progress bars, figures, device names, atomic file writes and UsageError, for every layer."""
