"""Plain PyTorch definitions of everything the kernels compute: any float dtype, any device, what is right."""
