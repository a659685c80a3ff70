"""A small LLaVA that has really learned, and its world; shipped as `vtp_kernels.pocket_llava`."""
