"""Several processes: launching them, process groups, Accelerate and DeepSpeed."""
