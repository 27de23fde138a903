"""The reference arithmetic: number formats, quantizers, rotation, packing and error measures."""
