"""TensorRT on this machine: settings, network, build, check, inspection, execution."""
