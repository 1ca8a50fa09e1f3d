"""From the tensors of a call to kernel launches: values that can be run, compiled or emulated."""
