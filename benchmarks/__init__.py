"""Measurements of vtp_kernels, and the small trained model that its accuracy is measured on."""
